"""How good is a model on held-out documents: bits per byte, agreement with the teacher, sample completions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdm.batches import AlignedData, Row, collate, micro_batches, token_bytes
from cdm.corpus import read_documents
from cdm.head import Sums
from cdm.images import exact_map
from cdm.models import load_model
from cdm.pieces import Piece
from cdm.records import AlignedBatch, Document, EvalReport
from cdm.rows import StudentRows, token_logp
from cdm.step import StudentModel, to_device
from cdm.tokenizers import Tokenizer, load_tokenizer

LN2 = math.log(2)
DOCUMENT_SUMS = ("nats", "bytes", "agreed", "shared")  # what a document adds to bits per byte and agreement


def held_out(aligned: str, shards: Sequence[str], documents: int) -> list[Row]:
    """The first documents of the test split that every side has whole: the same bytes for every model.

    Raises ValueError where there is none.
    """
    data = AlignedData.open(aligned, shards, "test")
    whole = (row for row in map(data.row, range(len(data))) if _whole(row))
    rows = list(islice(whole, documents))
    if not any(len(row.ids_s) > 1 for row in rows):
        raise ValueError(f"{aligned}: no test document is whole on both sides; raise max_length or corpus.test_share")
    return rows


def _whole(row: Row) -> bool:
    """Neither cut nor in quarantine: the first teacher's groups cover all tokens of both sides."""
    scores, groups = row.scores[0], row.alignments[0]
    if scores is None or scores.truncated:
        return False
    return int(groups.bounds_s[-1]) == len(row.ids_s) and int(groups.bounds_t[-1]) == len(scores.ids_t)


@torch.no_grad()
def evaluate_student(
    name: str,
    folder: str,
    rows: Sequence[Row],
    *,
    revision: str | None,
    tokenizer_t: Tokenizer,
    micro_batch_tokens: int,
    precision: str = "float32",
    prompts: Sequence[Document] = (),
    sample_tokens: int = 64,
) -> EvalReport:
    """A student's folder on held-out rows.

    bits_per_byte: nats of the response's tokens over its bytes; end of turn has no bytes and is not counted.
    agreement: of the groups' first bytes at which the first teacher's most probable token exists in the student's
    vocabulary, the share where it is the student's most probable token too; None where there is no such byte.
    """
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer_s = load_tokenizer(folder, revision=revision)
    images = torch.from_numpy(_images(tokenizer_s, tokenizer_t)).to(device)
    inner = load_model(folder, revision=revision, dtype=precision).to(device).eval()
    model = StudentModel(inner)
    lengths = np.array([len(row.prompt_s) + len(row.ids_s) for row in rows])
    sums = {name: np.zeros(len(rows)) for name in DOCUMENT_SUMS}
    for chunk in micro_batches(np.arange(len(rows)), lengths, world=1, micro_batch_tokens=micro_batch_tokens):
        documents = [rows[number] for number in chunk]
        if not documents:
            continue
        batch = collate(documents, top_k=1)
        sizes = torch.from_numpy(token_bytes(documents)).to(device)
        of_piece = partial(document_sums, sizes=sizes, images=images, documents=len(documents))
        for key, values in read_sums(model, to_device(batch, device), of_piece).items():
            sums[key][chunk] = values.cpu().numpy()
        sums["bytes"][chunk] = [int(row.ends_s[-1]) if len(row.ends_s) else 0 for row in documents]
    samples = _completed(inner, tokenizer_s, prompts, sample_tokens)
    return _report(name, rows, sums, time.perf_counter() - began, samples)


def _report(
    name: str,
    rows: Sequence[Row],
    sums: dict[str, np.ndarray],
    seconds: float,
    samples: tuple[dict[str, str], ...] = (),
) -> EvalReport:
    total = {key: float(values.sum()) for key, values in sums.items()}
    return EvalReport(
        name=name,
        bits_per_byte=total["nats"] / total["bytes"] / LN2,
        agreement=total["agreed"] / total["shared"] if total["shared"] else None,
        documents=len(rows),
        response_bytes=int(total["bytes"]),
        shared_boundaries=int(total["shared"]),
        seconds=seconds,
        samples=samples,
        ids=tuple(row.id for row in rows),
        sums={key: tuple(values.tolist()) for key, values in sums.items()},
    )


def _images(tokenizer_s: Tokenizer, tokenizer_t: Tokenizer) -> np.ndarray:
    """The student's id of each teacher id, -1 where there is none; the same id in the same tokenizer. int64 [V_t]."""
    if tokenizer_s.vocabulary == tokenizer_t.vocabulary:
        return np.arange(tokenizer_t.vocab_size)
    return exact_map(tokenizer_s, tokenizer_t, "emitted").astype(np.int64)


def read_sums(model: StudentModel, batch: AlignedBatch, sums_of: Callable[[StudentRows, Piece], Sums]) -> Sums:
    """The sums over the pieces of a batch, on the model's device; none where the batch has no response rows."""

    def read(rows: StudentRows, piece: Piece) -> tuple[Tensor, Sums]:
        return rows.logits.new_zeros(()), sums_of(rows, piece)

    return model.read(batch, read)[1]


def response_sums(rows: StudentRows, piece: Piece, *, sizes: Tensor, images: Tensor | None) -> Sums:
    """Nats of a piece's tokens that have bytes, and how often the best next token is the first teacher's.

    sizes [R]: bytes of the tokens of the whole batch. images [V_t]: the student's id of each of the first teacher's
    ids, -1 where there is none; without them no agreement.
    """
    sums = {"nats": _nats(rows, piece, sizes).sum()}
    if images is None:
        return sums
    agreed, shared = _agreement(rows, piece, images)
    return sums | {"agreed": agreed.sum(), "shared": shared.sum()}


def document_sums(rows: StudentRows, piece: Piece, *, sizes: Tensor, images: Tensor, documents: int) -> Sums:
    """`response_sums` of each document of the batch: [documents] float64."""
    agreed, shared = _agreement(rows, piece, images)
    of_groups = piece.documents_s[piece.teachers[0].groups_s[:, 0]]
    parts = {
        "nats": (piece.documents_s, _nats(rows, piece, sizes)),
        "agreed": (of_groups, agreed.double()),
        "shared": (of_groups, shared.double()),
    }
    none = torch.zeros(documents, dtype=torch.float64, device=sizes.device)
    return {name: none.index_add(0, where, values) for name, (where, values) in parts.items()}


def _nats(rows: StudentRows, piece: Piece, sizes: Tensor) -> Tensor:
    """Of each row whose token has bytes, 0 of the others: [R] float64."""
    has_bytes = sizes[piece.start : piece.end] > 0
    return torch.where(has_bytes, -token_logp(rows, piece.targets_s).double(), 0.0)


def _agreement(rows: StudentRows, piece: Piece, images: Tensor) -> tuple[Tensor, Tensor]:
    """At each group's first byte: whether both sides' best tokens are the same, and whether they can be. [G] bool."""
    teacher = piece.teachers[0]
    best_t = teacher.topk_ids_t[teacher.groups_t[:, 0], 0]
    known = (best_t >= 0) & (best_t < len(images))  # beyond: padded rows
    wanted = torch.where(known, images[best_t.clamp(0, len(images) - 1)], -1)
    best_s = rows.logits.argmax(-1)[teacher.groups_s[:, 0]]
    return best_s == wanted, wanted >= 0


def evaluate_teacher(name: str, rows: Sequence[Row]) -> EvalReport:
    """The first teacher's own bits per byte, from its stored scores: no forward pass."""
    sums = {name: np.zeros(len(rows)) for name in DOCUMENT_SUMS}
    for number, row in enumerate(rows):
        scores = row.scores[0]
        assert scores is not None  # `held_out` leaves out documents in quarantine
        sizes = np.diff(scores.ends_t, prepend=0)
        sums["nats"][number] = -scores.logp_t[sizes > 0].astype(np.float64).sum()
        sums["bytes"][number] = sizes.sum()
    return replace(_report(name, rows, sums, 0.0), agreement=1.0)


def sample_prompts(corpus: str, rows: Sequence[Row], count: int) -> list[Document]:
    """The documents behind the first rows."""
    wanted = [row.id for row in rows[:count]]
    found = {document.id: document for document in read_documents(corpus, "test-00000.parquet")}
    return [found[identity] for identity in wanted if identity in found]


@torch.no_grad()
def completions(
    folder: str, *, revision: str | None, dtype: str, prompts: Sequence[Document], tokens: int
) -> tuple[dict[str, str], ...]:
    """What a model itself makes of prompts: {prompt, reference, completion} each. On a CPU in float32: other kernels
    are compiled for each new shape there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype if device.type == "cuda" else "float32"
    model = load_model(folder, revision=revision, dtype=dtype).to(device).eval()
    return _completed(model, load_tokenizer(folder, revision=revision), prompts, tokens)


def _completed(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[Document], tokens: int
) -> tuple[dict[str, str], ...]:
    return tuple(_complete(model, tokenizer, document, tokens) for document in prompts)


def _complete(model: Any, tokenizer: Tokenizer, document: Document, tokens: int) -> dict[str, str]:
    """The most probable completion of a document's prompt, special tokens left out."""
    prompt = torch.tensor([tokenizer.encode_prompt(document.prompt)], device=model.device)
    room = model.config.max_position_embeddings - prompt.shape[1]
    if room < 1:
        return {"prompt": document.prompt[-1].content, "reference": document.response, "completion": ""}
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=min(tokens, room), do_sample=False,
        eos_token_id=tokenizer.end_of_turn_id, pad_token_id=tokenizer.end_of_turn_id,
    )  # fmt: skip
    completion = tokenizer.hf.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    return {"prompt": document.prompt[-1].content, "reference": document.response, "completion": completion}
