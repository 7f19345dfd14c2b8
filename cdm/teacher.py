"""The teacher: Documents -> ScoredDocuments, one row of statistics per response token (layer 2).

Legend: N response tokens of one document, K top-k. Row r predicts token r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdm.codec import PADDING_ID, PADDING_LOGP
from cdm.engines import ENGINES, Engine
from cdm.logit_rows import TokenRows
from cdm.records import Document, ScoredDocument
from cdm.tokenizers import Tokenizer, check_lossless, load_tokenizer

LEAST_KEPT = 8  # ids of a row, whatever mass the first of them hold


class TeacherScorer:
    """A plain callable around one engine; nothing of Ray in it.

    model is a folder or a hub name; engine is {"type": "vllm" | "transformers", and that engine's options};
    max_length counts tokens of prompt, response and end of turn; with top_mass a row keeps the smallest prefix of its
    top k that holds this mass, at least LEAST_KEPT.

    Raises ValueError when the tokenizer is lossy, top_k exceeds the vocabulary or max_length the model's context.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        engine: Mapping[str, Any],
        top_k: int,
        top_mass: float | None = None,
        max_length: int,
    ) -> None:
        options = dict(engine)
        kind = options.pop("type")
        if kind not in ENGINES:
            raise ValueError(f"engine.type: {kind!r} is not known; one of {', '.join(ENGINES)}")
        self.tokenizer = load_tokenizer(model, revision=revision)
        check_lossless(self.tokenizer)
        check_limits(model, revision, top_k, max_length)
        self.max_length, self.top_mass = max_length, top_mass
        self.engine: Engine = ENGINES[kind](model, revision=revision, top_k=top_k, max_length=max_length, **options)

    def score(self, documents: Sequence[Document]) -> tuple[list[ScoredDocument], list[tuple[str, str]]]:
        """Scored documents in the order given, and (id, reason) of those that cannot be scored."""
        rendered: list[Rendered] = []
        quarantined: list[tuple[str, str]] = []
        for document in documents:
            try:
                rendered.append(render(self.tokenizer, document, self.max_length))
            except CannotScore as error:
                quarantined.append((document.id, str(error)))
        sequences = [[*r.prompt_ids, *r.ids.tolist()] for r in rendered]
        all_rows = self.engine.token_rows(sequences, [len(r.prompt_ids) for r in rendered])
        scored = []
        for one, rows in zip(rendered, all_rows, strict=True):
            if rows is None:
                tokens = len(one.prompt_ids) + len(one.ids)
                quarantined.append((one.id, f"its {tokens} tokens do not fit in memory, even alone"))
            elif np.isfinite(rows.entropy).all() and np.isfinite(rows.logp).all():
                scored.append(_scored(one, rows, self.top_mass))
            else:
                quarantined.append((one.id, "the teacher's logits are not finite"))
        return scored, quarantined

    __call__ = score


def check_limits(model: str, revision: str | None, top_k: int, max_length: int) -> None:
    """Raise ValueError when top_k exceeds the model's vocabulary or max_length its context."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
    context = config.to_dict().get("max_position_embeddings")  # absent: recurrent models have no limit
    if context is not None and max_length > context:
        raise ValueError(f"teacher.max_length: {max_length} exceeds the context of {model}, {context} tokens")
    if top_k > config.vocab_size:
        raise ValueError(f"teacher.top_k: {top_k} exceeds the vocabulary of {model}, {config.vocab_size} ids")


# --- rendering ---------------------------------------------------------------------------------------------------


class CannotScore(ValueError):
    """A document that is put into quarantine; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A document as this teacher reads it. ids, ends [N] int32, the end-of-turn token included unless truncated."""

    id: str
    prompt_ids: list[int]
    ids: np.ndarray
    ends: np.ndarray
    truncated: bool


def render(tokenizer: Tokenizer, document: Document, max_length: int) -> Rendered:
    """Prompt in the model's own template, response tokens, end of turn; the response's text is cut where it must be.

    Prompt and response are tokenised apart (docs/method.md, section 1). A response that does not fit is cut at the
    last token end that is a character boundary, tokenised again, and has no end of turn.

    Raises CannotScore with the reason.
    """
    try:
        prompt_ids = tokenizer.encode_prompt(document.prompt)
        room = max_length - len(prompt_ids)
        _check_prompt(len(prompt_ids), max_length)
        ids, ends = tokenizer.encode_with_ends(document.response)
        truncated = len(ids) >= room  # there must be room for the end of the turn
        text = document.response
        while len(ids) > room:  # the cut text may have more tokens than its part of the longer one
            text = _cut(text, ends[:room])
            ids, ends = tokenizer.encode_with_ends(text)
    except ValueError as error:  # a template that refuses the prompt, tokens that do not spell the text
        raise CannotScore(str(error)) from error
    if truncated and not len(ids):
        raise CannotScore(f"the prompt leaves room for {room} response tokens, which hold no whole character")
    if not truncated:
        ids = np.append(ids, np.int32(tokenizer.end_of_turn_id))
        ends = np.append(ends, np.int32(len(text.encode("utf-8"))))
    return Rendered(document.id, prompt_ids, ids, ends, truncated)


def _check_prompt(tokens: int, max_length: int) -> None:
    if not tokens:
        raise CannotScore("the prompt renders to no tokens, so nothing predicts the first response token")
    if tokens >= max_length:
        raise CannotScore(f"the prompt alone has {tokens} tokens, teacher.max_length is {max_length}")


def _cut(text: str, ends: np.ndarray) -> str:
    """The text up to the last end, short of the whole text, that is a UTF-8 character boundary."""
    data = text.encode("utf-8")
    for end in reversed(ends.tolist()):
        if 0 < end < len(data) and data[end] & 0xC0 != 0x80:
            return data[:end].decode("utf-8")
    return ""


def _scored(one: Rendered, rows: TokenRows, top_mass: float | None) -> ScoredDocument:
    # Rounding to float16 is monotonic: best-first order never turns into an increase.
    topk_logp = rows.topk_logp.astype(np.float16)
    topk_ids, tail = rows.topk_ids, rows.tail
    if top_mass is not None:
        topk_ids, topk_logp, tail = keep_mass(topk_ids, topk_logp, tail, top_mass)
    return ScoredDocument(one.id, one.truncated, one.ids, one.ends, rows.logp, rows.entropy, tail, topk_ids, topk_logp)


def keep_mass(
    topk_ids: np.ndarray, topk_logp: np.ndarray, tail: np.ndarray, top_mass: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's smallest prefix that holds `top_mass`, at least LEAST_KEPT ids; all K where they hold less.

    [N, K], [N, K], [N] as in ScoredDocument: what is dropped becomes padding, and its mass part of the tail.
    """
    mass = np.exp(topk_logp.astype(np.float64))
    before = np.cumsum(mass, axis=1) - mass
    gone = (before >= top_mass) & (np.arange(mass.shape[1]) >= LEAST_KEPT)
    tail = tail + np.where(gone, mass, 0.0).sum(1).astype(np.float32)
    return np.where(gone, np.int32(PADDING_ID), topk_ids), np.where(gone, PADDING_LOGP, topk_logp), tail
