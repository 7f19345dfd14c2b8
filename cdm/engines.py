"""Teacher engines: token ids -> one row of statistics per wanted token (layer 1). Chosen by name in ENGINES.

Legend: N wanted tokens of a sequence, R rows of a block, D hidden size, K top-k, V vocabulary. Row r predicts token r.
A sequence is fed without its last token: each position's logits predict the next one. Entropies are exact.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

LOWEST_LOGP = -65504.0  # the lowest finite float16; -inf (masked vocabulary rows) is stored as this, exp() of it is 0
BLOCK_ROWS = 1024
BLOCK_ELEMENTS = 2**25  # float32 logits held at once: rows are fewer where the vocabulary is large


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Statistics of rows: logp, entropy, tail [N] float32, topk_ids [N, K] int32, topk_logp [N, K] float32."""

    logp: np.ndarray
    entropy: np.ndarray
    tail: np.ndarray
    topk_ids: np.ndarray
    topk_logp: np.ndarray

    @classmethod
    def empty(cls, n: int, k: int) -> TokenRows:
        logp, entropy, tail = (np.empty(n, np.float32) for _ in range(3))
        return cls(logp, entropy, tail, np.empty((n, k), np.int32), np.empty((n, k), np.float32))

    def put(self, start: int, rows: TokenRows, begin: int, end: int) -> None:
        """Copy rows begin:end of `rows` to start onwards."""
        for column in fields(self):
            source = getattr(rows, column.name)[begin:end]
            getattr(self, column.name)[start : start + len(source)] = source


class Engine(Protocol):
    """A model that gives the rows of given tokens."""

    def token_rows(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TokenRows]:
        """Rows of the tokens from `starts[i]` (at least 1) to the end of each sequence."""
        ...


# --- rows of logits ----------------------------------------------------------------------------------------------


def row_statistics(logits: torch.Tensor, targets: torch.Tensor, top_k: int) -> TokenRows:
    """Statistics of logits [R, V] whose rows predict targets [R], in float32; entropy over the whole vocabulary."""
    logp = torch.log_softmax(logits, dim=-1, dtype=torch.float32).clamp_(min=LOWEST_LOGP)
    topk_logp, topk_ids = logp.topk(top_k)
    own = logp.gather(-1, targets[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(logp.exp(), logp)
    tail = (1 - topk_logp.exp().sum(-1)).clamp_(min=0)
    columns = (own, entropy, tail, topk_ids.to(torch.int32), topk_logp)
    return TokenRows(*(column.cpu().numpy() for column in columns))


Head = Callable[[torch.Tensor], torch.Tensor]


def rows_in_blocks(head: Head, hidden: torch.Tensor, targets: torch.Tensor, top_k: int, vocab_size: int) -> TokenRows:
    """`row_statistics` of head(hidden [R, D]) without ever holding [R, V]."""
    block = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // vocab_size))
    rows = TokenRows.empty(len(targets), top_k)
    for start in range(0, len(targets), block):
        part = slice(start, start + block)
        rows.put(start, row_statistics(head(hidden[part]), targets[part], top_k), 0, block)
    return rows


# --- transformers ------------------------------------------------------------------------------------------------


class TransformersEngine:
    """Hugging Face's own model: padded batches of like lengths, logits only for response rows, in blocks."""

    def __init__(
        self, model: str, *, revision: str | None, top_k: int, max_length: int, dtype: str, batch_tokens: int
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.top_k = top_k
        self.batch_tokens = batch_tokens
        self.model = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True
        )
        self.model.eval().requires_grad_(False).to(self.device)
        self.vocab_size = self.model.config.get_text_config().vocab_size
        # The decoder runs by itself; the model around it is then its head with whatever scaling or soft-capping it has.
        decoder = self.model.get_decoder()
        self._decode = decoder.forward
        decoder.forward = _pass_through

    @torch.inference_mode()
    def token_rows(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TokenRows]:
        """See Engine."""
        out: dict[int, TokenRows] = {}
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        for batch in _batches(order, [len(s) for s in sequences], self.batch_tokens):
            out.update(self._batch_rows(batch, sequences, starts))
        return [out[i] for i in range(len(sequences))]

    def _batch_rows(
        self, batch: list[int], sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> dict[int, TokenRows]:
        length = max(len(sequences[i]) for i in batch) - 1
        input_ids = torch.zeros(len(batch), length, dtype=torch.long)
        for b, i in enumerate(batch):
            input_ids[b, : len(sequences[i]) - 1] = torch.tensor(sequences[i][:-1])
        # Padding is on the right and attention causal: no mask is needed, which keeps the fast kernels.
        hidden = self._decode(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state
        kept = [hidden[b, starts[i] - 1 : len(sequences[i]) - 1] for b, i in enumerate(batch)]
        targets = torch.tensor([token for i in batch for token in sequences[i][starts[i] :]], device=self.device)
        rows = rows_in_blocks(self._head, torch.cat(kept), targets, self.top_k, self.vocab_size)
        return _split(rows, batch, [len(part) for part in kept], self.top_k)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]


def _pass_through(inputs_embeds: torch.Tensor, **_: Any) -> Any:
    """A decoder's forward that returns what it is given."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _batches(order: list[int], lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Runs of `order` (ascending lengths) whose padded size stays within batch_tokens; one sequence at least."""
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _split(rows: TokenRows, keys: Sequence[int], counts: Sequence[int], top_k: int) -> dict[int, TokenRows]:
    out = {}
    start = 0
    for key, count in zip(keys, counts, strict=True):
        out[key] = TokenRows.empty(count, top_k)
        out[key].put(0, rows, start, start + count)
        start += count
    return out


# --- vLLM --------------------------------------------------------------------------------------------------------


class VllmEngine:
    """vLLM in this very process, so that a crash of the engine is a crash of the process that Ray watches.

    The rows are computed by RowsExtension inside vLLM's worker: as tensors, with the exact entropy.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        top_k: int,
        max_length: int,
        dtype: str,
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
        kv_cache_gib: float,
        max_num_batched_tokens: int,
    ) -> None:
        self.llm = start_vllm(
            model,
            revision=revision,
            max_length=max_length,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_gib=kv_cache_gib,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=False,  # a cached prefix has no hidden states
            worker_extension_cls=f"{RowsExtension.__module__}.{RowsExtension.__qualname__}",
        )
        self.llm.collective_rpc("keep_rows", args=(top_k,))

    def token_rows(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TokenRows]:
        """See Engine."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(ids[:-1])} for ids in sequences]
        wanted = [{"key": i, "targets": list(ids[starts[i] :])} for i, ids in enumerate(sequences)]
        params = [SamplingParams(max_tokens=1, temperature=0, detokenize=False, extra_args=extra) for extra in wanted]
        self.llm.generate(prompts, params, use_tqdm=False)
        rows: dict[int, TokenRows] = self.llm.collective_rpc("take_rows")[0]
        return [rows[i] for i in range(len(sequences))]


def start_vllm(
    model: str,
    *,
    revision: str | None,
    max_length: int,
    dtype: str,
    tensor_parallel_size: int,
    gpu_memory_utilization: float,
    kv_cache_gib: float,
    max_num_batched_tokens: int,
    **more: Any,
) -> Any:
    """vLLM's LLM in this very process; `more` are arguments of its own."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read by vLLM when the engine starts
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # RowsExtension knows the first one
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    memory: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
    if on_cpu:  # without a size vLLM wants nearly all of the machine's memory
        memory = {"kv_cache_memory_bytes": int(kv_cache_gib * 2**30)}
    with _hidden("llvmlite.binding.ffi"):  # vLLM scans all modules; this one's `lib.__dict__` is no dictionary
        return LLM(
            model=model,
            revision=revision,
            dtype=dtype,
            load_format="safetensors",
            max_model_len=max_length,
            max_num_batched_tokens=max_num_batched_tokens,
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="uni" if tensor_parallel_size == 1 else "mp",
            enforce_eager=on_cpu,
            seed=0,
            **memory,
            **more,
        )


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """The body runs as if `module` had not been imported yet."""
    found = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if found is not None:
            sys.modules[module] = found


class RowsExtension:
    """Mixed into vLLM's worker: computes rows where vLLM would compute prompt log-probabilities.

    That method of the model runner is called after every step with all hidden states of the step, whichever requests
    are scheduled; a request's share may be a chunk of its prompt, and comes again after a preemption.
    """

    model_runner: Any

    def keep_rows(self, top_k: int) -> None:
        self._rows: dict[int, TokenRows] = {}
        self.model_runner._get_prompt_logprobs_dict = partial(self._step_rows, top_k)

    def take_rows(self) -> dict[int, TokenRows]:
        rows, self._rows = self._rows, {}
        return rows

    def _step_rows(
        self, top_k: int, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, None]:
        runner = self.model_runner
        places: list[tuple[int, int, int]] = []  # key, first row, rows
        positions: list[int] = []
        targets: list[int] = []
        for request_id, scheduled in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            extra = request.sampling_params.extra_args
            if extra is None:  # vLLM's own warm-up requests
                continue
            first = request.num_prompt_tokens - len(extra["targets"])  # its logits predict the first target
            begin = max(first, request.num_computed_tokens)
            end = min(request.num_computed_tokens + scheduled, request.num_prompt_tokens)
            if begin >= end:
                continue
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
            offset -= request.num_computed_tokens
            self._rows.setdefault(extra["key"], TokenRows.empty(len(extra["targets"]), top_k))
            places.append((extra["key"], begin - first, end - begin))
            positions.extend(range(offset + begin, offset + end))
            targets.extend(extra["targets"][begin - first : end - first])
        if places:
            self._compute_rows(top_k, hidden_states, places, positions, targets)
        return {}

    def _compute_rows(
        self,
        top_k: int,
        hidden_states: torch.Tensor,
        places: list[tuple[int, int, int]],
        positions: list[int],
        targets: list[int],
    ) -> None:
        runner = self.model_runner
        hidden = hidden_states[torch.tensor(positions, device=hidden_states.device)]
        wanted = torch.tensor(targets, device=hidden_states.device)
        vocab_size = runner.model_config.get_vocab_size()
        rows = rows_in_blocks(runner.model.compute_logits, hidden, wanted, top_k, vocab_size)
        done = 0
        for key, start, count in places:
            self._rows[key].put(start, rows, done, done + count)
            done += count


ENGINES: dict[str, type[TransformersEngine] | type[VllmEngine]] = {
    "vllm": VllmEngine,
    "transformers": TransformersEngine,
}
