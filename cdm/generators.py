"""Engines that write: prompts as token ids -> new token ids, by sampling (layer 2). Chosen by name in GENERATORS.

Legend: B rows of a batch, N tokens of one sequence, V vocabulary. Each request has a seed of its own, so that what is
sampled for it depends neither on the other requests nor on their order, as far as the engine's arithmetic does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cdm.engines import start_vllm
from cdm.models import load_model
from cdm.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are sampled. One ends at a token of `stop_ids`, at a text of `stop`, or after max_tokens."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt's token ids and the seed of one response to it."""

    prompt_ids: list[int]
    seed: int


class Generator(Protocol):
    """A model that writes."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """The new tokens of each request, the one that ended it included."""
        ...


# --- transformers ------------------------------------------------------------------------------------------------


class TransformersGenerator:
    """Hugging Face's own `generate`: batches of like lengths, padded on the left."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        tokenizer: Tokenizer,
        max_length: int,
        dtype: str,
        batch_tokens: int,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer, self.batch_tokens = tokenizer, batch_tokens
        self.model = load_model(model, revision=revision, dtype=dtype).eval().to(self.device)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """See Generator."""
        from transformers import GenerationConfig

        self.model.generation_config = GenerationConfig(  # instead of the model's own, which may penalise or truncate
            max_new_tokens=sampling.max_tokens,
            do_sample=False,  # _Noise samples
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=sampling.stop_ids[0],
        )
        out: dict[int, list[int]] = {}
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        while order:
            longest = len(requests[order[-1]].prompt_ids) + sampling.max_tokens
            rows = max(1, self.batch_tokens // longest)
            batch, order = order[-rows:], order[:-rows]
            out.update(zip(batch, self._batch([requests[i] for i in batch], sampling), strict=True))
        return [out[i] for i in range(len(requests))]

    def _batch(self, requests: list[Request], sampling: Sampling) -> list[list[int]]:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        width = max(len(request.prompt_ids) for request in requests)
        input_ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for b, request in enumerate(requests):
            input_ids[b, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[b, width - len(request.prompt_ids) :] = 1
        stop_texts = _StopTexts(sampling.stop, self.tokenizer, width)
        tokens = self.model.generate(
            input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            logits_processor=LogitsProcessorList([_Noise(sampling, [r.seed for r in requests], self.device)]),
            stopping_criteria=StoppingCriteriaList([stop_texts]),
        )
        # rows that end before the others are padded
        return [
            _until_stop(ids[width : stop_texts.ends.get(b)], sampling.stop_ids) for b, ids in enumerate(tokens.tolist())
        ]


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids


class _Noise:
    """Makes the most probable token of each row a sample: logits / temperature plus Gumbel noise of the row's own."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._sampling.temperature == 0:
            return scores
        logp = torch.log_softmax(scores.float() / self._sampling.temperature, dim=-1)
        if self._sampling.top_p < 1:
            logp = nucleus(logp, self._sampling.top_p)
        noise = torch.empty_like(logp)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return logp - noise.log()


def nucleus(logp: torch.Tensor, top_p: float) -> torch.Tensor:
    """logp [B, V] with all but the smallest set of best ids whose mass reaches top_p at -inf."""
    ranked, ids = logp.sort(dim=-1, descending=True)
    before = ranked.exp().cumsum(-1) - ranked.exp()
    return torch.full_like(logp, -torch.inf).scatter(-1, ids, ranked.masked_fill(before >= top_p, -torch.inf))


class _StopTexts:
    """Whether each row has written one of the texts, and in `ends` the length at which it had.

    Only the last tokens are looked at; earlier ones were before.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, prompt: int) -> None:
        self._texts = [text.encode() for text in texts]
        self._tail = max((len(text) for text in self._texts), default=0)  # a token adds a byte at least
        self._tokenizer, self._prompt = tokenizer, prompt
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        length = input_ids.shape[1]
        for b, tail in enumerate(input_ids[:, max(self._prompt, length - self._tail) :].tolist()):
            spelled = b"".join(self._tokenizer.token_bytes(i) or b"" for i in tail)
            if any(text in spelled for text in self._texts):
                self.ends.setdefault(b, length)
        return torch.tensor([b in self.ends for b in range(len(input_ids))], device=input_ids.device)


# --- vLLM --------------------------------------------------------------------------------------------------------


class VllmGenerator:
    """vLLM in this very process (see cdm/engines.py)."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        tokenizer: Tokenizer,
        max_length: int,
        max_num_batched_tokens: int,
        **engine: Any,
    ) -> None:
        self.llm = start_vllm(
            model,
            revision=revision,
            max_length=max_length,
            # Prompts in one piece: after each of several vLLM would sample, and turn the seed's generator back by what
            # that took on CUDA, which a CPU's generator cannot do.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(max_num_batched_tokens, max_length),
            enable_prefix_caching=True,  # samples share their prompt, prompts their system message
            generation_config="vllm",  # none of the model's own, which may penalise or truncate
            **engine,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """See Generator."""
        if not requests:
            return []
        # What earlier calls left in the cache would change the shapes of this one's batches, and so the last bits.
        self.llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        params = [_params(sampling, request.seed) for request in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _params(sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_ids),
        seed=seed,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


GENERATORS: dict[str, type[TransformersGenerator] | type[VllmGenerator]] = {
    "vllm": VllmGenerator,
    "transformers": TransformersGenerator,
}
