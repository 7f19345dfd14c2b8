"""Teacher engines: token ids -> one row of statistics per wanted token (layer 1). Chosen by name in ENGINES.

Legend: N wanted tokens of a sequence, R rows of a block, D hidden size, K top-k, V vocabulary. Row r predicts token r.
A sequence is fed without its last token: each position's logits predict the next one. Entropies are exact.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from cdm.logit_rows import RowBlocks, TokenRows, is_out_of_memory, unless_out_of_memory


class Engine(Protocol):
    """A model that gives the rows of given tokens."""

    @property
    def memory_backoffs(self) -> int:
        """How often, so far, less was done at once for want of memory."""
        ...

    def token_rows(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TokenRows | None]:
        """Rows of the tokens from `starts[i]` (at least 1) to the end of each sequence; None: it alone does not fit."""
        ...


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
        self._batch_backoffs = 0
        self.model = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True
        )
        self.model.eval().requires_grad_(False).to(self.device)
        self._row_blocks = RowBlocks(self.model.config.get_text_config().vocab_size)
        # The decoder runs by itself; the model around it is then its head with whatever scaling or soft-capping it has.
        decoder = self.model.get_decoder()
        self._decode = decoder.forward
        decoder.forward = _pass_through

    @property
    def memory_backoffs(self) -> int:
        return self._batch_backoffs + self._row_blocks.backoffs

    @torch.inference_mode()
    def token_rows(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TokenRows | None]:
        """See Engine."""
        out: dict[int, TokenRows | None] = {}
        left = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        while left:
            batch = _next_batch(left, [len(sequences[i]) for i in left], self.batch_tokens)
            rows = unless_out_of_memory(partial(self._batch_rows, batch, sequences, starts), less_is_possible=True)
            if rows is not None:
                out.update(rows)
            elif len(batch) == 1:
                out[batch[0]] = None
            else:
                self._batch_backoffs += 1
                self.batch_tokens = len(batch) // 2 * len(sequences[batch[-1]])
                continue
            left = left[len(batch) :]
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
        rows = self._row_blocks(self._head, torch.cat(kept), targets, self.top_k)
        return _split(rows, batch, [len(part) for part in kept], self.top_k)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]


def _pass_through(inputs_embeds: torch.Tensor, **_: Any) -> Any:
    """A decoder's forward that returns what it is given."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _next_batch(order: list[int], lengths: list[int], batch_tokens: int) -> list[int]:
    """The start of `order` (ascending lengths) whose padded size stays within batch_tokens; one sequence at least."""
    size = 1
    while size < len(order) and (size + 1) * lengths[size] <= batch_tokens:
        size += 1
    return order[:size]


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
        self.memory_backoffs = 0
        self._unfinished = False

    def token_rows(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TokenRows | None]:
        """See Engine.

        Raises ValueError naming the keys to lower where vLLM runs out of memory, and at every call after a failed one:
        what was scheduled then is still there.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._unfinished:
            raise ValueError("vLLM failed in an earlier call and cannot go on in this process")
        prompts = [{"prompt_token_ids": list(ids[:-1])} for ids in sequences]
        wanted = [{"key": i, "start": starts[i], "last": ids[-1]} for i, ids in enumerate(sequences)]
        options = {"max_tokens": 1, "temperature": 0, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        params = [SamplingParams(**options, extra_args=extra) for extra in wanted]
        self._unfinished = True
        try:
            self.llm.generate(prompts, params, use_tqdm=False)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            keys = "teacher.engine.max_num_batched_tokens, .gpu_memory_utilization or teacher.max_length"
            raise ValueError(f"vLLM ran out of memory; lower {keys}") from error
        rows: dict[int, TokenRows]
        rows, self.memory_backoffs = self.llm.collective_rpc("take_rows")[0]
        self._unfinished = False
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
        runner = self.model_runner
        self._row_blocks = RowBlocks(runner.model_config.get_vocab_size(), runner.parallel_config.world_size)
        runner._get_prompt_logprobs_dict = partial(self._step_rows, top_k)

    def take_rows(self) -> tuple[dict[int, TokenRows], int]:
        """The rows of all requests since the last call, by key, and how often memory ran out since the start."""
        rows, self._rows = self._rows, {}
        return rows, self._row_blocks.backoffs

    def _step_rows(
        self, top_k: int, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, None]:
        runner = self.model_runner
        places: list[tuple[int, int, int]] = []  # key, first row, rows
        positions: list[np.ndarray] = []
        targets: list[int] = []
        for request_id, scheduled in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            extra = request.sampling_params.extra_args
            if extra is None:  # vLLM's own warm-up requests
                continue
            start, tokens, computed = extra["start"], request.num_prompt_tokens, request.num_computed_tokens
            begin = max(start - 1, computed)  # the logits at start - 1 predict the first wanted token
            end = min(computed + scheduled, tokens)
            if begin >= end:
                continue
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]) - computed
            if extra["key"] not in self._rows:
                self._rows[extra["key"]] = TokenRows.empty(tokens + 1 - start, top_k)
            places.append((extra["key"], begin - start + 1, end - begin))
            positions.append(np.arange(offset + begin, offset + end))
            targets += request.prompt_token_ids[begin + 1 : end + 1]
            if end == tokens:
                targets.append(extra["last"])
        if places:
            self._compute_rows(top_k, hidden_states, places, np.concatenate(positions), targets)
        return {}

    def _compute_rows(
        self,
        top_k: int,
        hidden_states: torch.Tensor,
        places: list[tuple[int, int, int]],
        positions: np.ndarray,
        targets: list[int],
    ) -> None:
        hidden = hidden_states[torch.from_numpy(positions).to(hidden_states.device)]
        wanted = torch.tensor(targets, device=hidden_states.device)
        rows = self._row_blocks(self.model_runner.model.compute_logits, hidden, wanted, top_k)
        done = 0
        for key, start, count in places:
            self._rows[key].put(start, rows, done, done + count)
            done += count


ENGINES: dict[str, type[TransformersEngine] | type[VllmEngine]] = {
    "vllm": VllmEngine,
    "transformers": TransformersEngine,
}
