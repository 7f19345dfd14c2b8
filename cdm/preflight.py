"""What can be known before a teacher or a student runs: how much of the responses both see, and memory (layer 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers  # models cost seconds to import: they are named where they are used

from cdm.adapters import adapt
from cdm.batches import AlignedData
from cdm.config_models import Student
from cdm.grouping import Grouping
from cdm.head import PIECE_CELLS
from cdm.progress import console
from cdm.records import Document, ScoredDocument
from cdm.teacher import Rendered, render
from cdm.tokenizers import Tokenizer
from cdm.vocab_map import VocabMap

SAMPLE = 128  # documents
GIB = 1 << 30


# --- coverage ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """Of a sample of responses: the share of their bytes that are in groups of both sides, and of the student's tokens
    there those that are groups of one token on each side.
    """

    documents: int
    bytes: float
    one_to_one: float

    def __str__(self) -> str:
        return f"{self.bytes:.1%} of the bytes, {self.one_to_one:.1%} of the tokens 1:1 ({self.documents} documents)"


def coverage(
    documents: Sequence[Document],
    tokenizer_s: Tokenizer,
    tokenizer_t: Tokenizer,
    *,
    max_length_s: int,
    max_length_t: int,
) -> Coverage:
    """What both sides see of the responses within their lengths; exact groups, no model is run.

    Nothing of a response counts that one side cannot read at all: its tokens do not spell it, its template refuses the
    prompt, or the prompt alone is too long.
    """
    grouping = Grouping("exact", tokenizer_s)
    total = seen = tokens = alone = 0
    for document in documents:
        total += len(document.response.encode())
        try:
            prompt = tokenizer_s.encode_prompt(document.prompt)
            ids, ends = tokenizer_s.encode_with_ends(document.response)
            scored = _unscored(render(tokenizer_t, document, max_length_t))
        except ValueError:
            continue
        if not 0 < len(prompt) < max_length_s:
            continue
        ids = np.append(ids, tokenizer_s.end_of_turn_id)
        ends = np.append(ends, ends[-1] if len(ends) else 0)
        groups = grouping.groups(0, scored, ids, ends, max_length_s - len(prompt))
        kept = int(groups.bounds_s[-1])
        seen += int(ends[kept - 1]) if kept else 0
        tokens += kept
        alone += int(((np.diff(groups.bounds_s) == 1) & (np.diff(groups.bounds_t) == 1)).sum())
    return Coverage(len(documents), seen / total if total else 1.0, alone / tokens if tokens else 0.0)


def _unscored(rendered: Rendered) -> ScoredDocument:
    none = np.zeros(0, np.float32)
    return ScoredDocument(rendered.id, rendered.truncated, rendered.ids, rendered.ends, none, none, none, none, none)


def check_coverage(found: Coverage, floor: float, teacher: str) -> None:
    """Says what was found. Raises ValueError with both values where too little would be learnt from."""
    console.print(f"     {teacher}, coverage: {found}", soft_wrap=True)
    if found.bytes < floor:
        raise ValueError(
            f"student and teacher {teacher} see {found.bytes:.1%} of the bytes of {found.documents} sampled responses "
            f"together, student.min_coverage is {floor:.1%}: raise max_length of the student or the teacher, take "
            "shorter documents, or lower the floor"
        )


@dataclass(frozen=True)
class Mass:
    """The teacher's probability at the groups' first tokens: with an exact image in the student's vocabulary, with some
    near spelling or prefix there, and the rest.
    """

    exact: float
    near: float
    unmapped: float

    def __str__(self) -> str:
        return f"mass {self.exact:.1%} exact, {self.near:.1%} mapped by spelling, {self.unmapped:.1%} unmapped"


def teacher_mass(aligned: str, shards: Sequence[str], k: int, vocab_map: VocabMap | None) -> Mass:
    """Of teacher k's stored scores of the first training documents. None: the tokenizer is the student's own."""
    data = AlignedData.open(aligned, shards, "train")
    exact = near = groups = 0.0
    for row in map(data.row, range(min(SAMPLE, len(data)))):
        scores = row.scores[k]
        if scores is None:
            continue
        starts = row.alignments[k].bounds_t[:-1]
        ids, mass = scores.topk_ids_t[starts], np.exp(scores.topk_logp_t[starts].astype(np.float64))
        groups += len(starts)
        known = ids >= 0
        if vocab_map is not None:
            known &= ids < len(vocab_map.exact)
            inside = np.where(known, ids, 0)
            has_near = (np.diff(vocab_map.graph.starts)[inside] > 0) | (vocab_map.static[inside] >= 0)
            image = vocab_map.exact[inside] >= 0
            near += float(mass[known & ~image & has_near].sum())
            known &= image
        exact += float(mass[known].sum())
    count = max(groups, 1.0)
    return Mass(exact / count, near / count, 1 - (exact + near) / count)


def say_mass(aligned: str, shards: Sequence[str], maps: Sequence[str | None], names: Sequence[str]) -> None:
    """A line a teacher, whose map is in a file or, None, needs none."""
    for k, (path, name) in enumerate(zip(maps, names, strict=True)):
        found = teacher_mass(aligned, shards, k, None if path is None else VocabMap.load(path))
        console.print(f"     {name}, {found}", soft_wrap=True)


# --- memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker needs while it trains. activations: about."""

    state: int
    gathered: int
    logits: int
    activations: int

    @property
    def least(self) -> int:
        return self.state + self.gathered + self.logits


def training_memory(config: transformers.PretrainedConfig, section: Student, workers: int) -> Memory:
    """Of a model with this configuration, trained as the section says; no weights are read.

    state: weights, gradients and AdamW's two moments, float32, sharded over the workers. gathered: what FSDP has whole
    at once (embeddings and head, and two blocks), and the head's gradient in float32. logits: those of one piece, and
    their softmax. activations: what the blocks keep of a micro-batch for the backward pass.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        adapt(model, section.lora, section.freeze_embeddings, seed=0)
    size = {"float32": 4, "bfloat16": 2}[section.precision]
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = set(model._no_split_modules)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    block = max(sum(p.numel() for p in one.parameters()) for one in blocks)
    root = weights - sum(p.numel() for one in blocks for p in one.parameters())
    head = model.get_output_embeddings().weight
    text = config.get_text_config()
    a_token = size * (12 * text.hidden_size + 4 * text.intermediate_size)  # what a block keeps
    kept = len(blocks) if not section.activation_checkpointing else 1
    inputs = (len(blocks) + 2) * text.hidden_size * size if section.activation_checkpointing else 0
    return Memory(
        state=(4 * weights + 12 * trained) // workers,
        gathered=size * (root + 2 * block) + (4 * head.numel() if head.requires_grad else 0),
        logits=min(PIECE_CELLS, section.micro_batch_tokens * head.shape[0]) * (size + 4),
        activations=section.micro_batch_tokens * (kept * a_token + inputs),
    )


def memory_problems(name: str, revision: str | None, section: Student, workers: int, device: int | None) -> list[str]:
    """A line where a worker cannot fit into a device of so many bytes; None: there is no device to ask."""
    if device is None:
        return []
    config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    need = training_memory(config, section, workers)
    if need.least <= device:
        return []
    parts = (need.state, need.gathered, need.logits, need.activations)
    state, gathered, logits, activations = (f"{part / GIB:,.1f}" for part in parts)
    return [
        f"student {name}: a worker needs at least {need.least / GIB:,.1f} GiB ({state} weights, gradients, optimiser, "
        f"{gathered} gathered layers, {logits} logits) besides about {activations} of activations, the device has "
        f"{device / GIB:,.1f}: raise resources.student.workers (now {workers}), or set student.lora"
    ]


def device_bytes() -> int | None:
    """The memory of the first GPU that this process sees."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
