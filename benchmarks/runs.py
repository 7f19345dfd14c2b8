"""Tiny training runs on real text: a student with GPT-2's tokenizer, and scores of a teacher with Qwen2.5's."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.table import real_data
from cdm import parts, shards
from cdm.batches import align_part
from cdm.config_methods import Cdm
from cdm.config_models import Optimisation
from cdm.corpus import table_of
from cdm.grouping import Grouping
from cdm.records import Document, Message
from cdm.student import TrainingJob
from cdm.teacher import TeacherScorer
from cdm.tokenizers import load_tokenizer
from cdm.vocab_map import build_vocab_map

ROWS_S = 50_257
ROWS_T = 151_936  # rows of Qwen2.5's embedding; its tokenizer has fewer ids
ENGINE = {"type": "transformers", "dtype": "float32", "batch_tokens": 2048}
TOP_K = 64
PARTS = ("train-00000.parquet", "validation-00000.parquet")
VALIDATION = 4  # documents


def dolly() -> list[tuple[str, str]]:
    """500 pairs of a prompt and a response."""
    with gzip.open(real_data() / "instructions" / "dolly_valid500.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [(row["prompt"].strip(), row["response"].strip()) for row in map(json.loads, lines)]


def documents(pairs: Sequence[tuple[str, str]]) -> list[Document]:
    return [Document(f"{i:05}", (Message("user", prompt),), response) for i, (prompt, response) in enumerate(pairs)]


def model(folder: Path, tokenizer: str, rows: int, hidden: int, seed: int) -> str:
    """Two layers with random weights and a real tokenizer."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=rows, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    hf = load_tokenizer(str(real_data() / "tokenizers" / tokenizer)).hf
    hf.chat_template, hf.pad_token = None, hf.eos_token
    hf.save_pretrained(folder)
    return str(folder)


def models(root: Path, hidden: int) -> tuple[str, str]:
    """(student, teacher)"""
    student = model(
        root / "student", "gpt2", load_tokenizer(str(real_data() / "tokenizers" / "gpt2")).vocab_size, hidden, 0
    )
    return student, model(root / "teacher", "qwen2.5", ROWS_T, 64, 1)


def training_job(
    root: Path, student: str, teacher: str, texts: list[Document], optimisation: Optimisation
) -> TrainingJob:
    """The documents scored and aligned, the last of them for validation; the work that training does not repeat."""
    scorer = TeacherScorer(teacher, engine=ENGINE, top_k=TOP_K, max_length=optimisation.max_length)
    tokenizer = load_tokenizer(student)
    corpus, scored, aligned = (str(root / name) for name in ("corpus", "shards", "aligned"))
    for name, part in zip(PARTS, (texts[:-VALIDATION], texts[-VALIDATION:]), strict=True):
        parts.write_part(corpus, name, table_of(part))
        rows, quarantined = scorer.score(part)
        shards.write_scores(scored, name, rows, quarantined=quarantined, identity={})
        table, _ = align_part(corpus, [scored], name, Grouping("exact", tokenizer), max_length=optimisation.max_length)
        parts.write_part(aligned, name, table, row_group_size=shards.ROW_GROUP_DOCUMENTS)
    shards.finish_shards(scored, list(PARTS), {})
    parts.finish(aligned, {}, kind="aligned")
    build_vocab_map(tokenizer, scorer.tokenizer).save(root / "map.npz")
    return TrainingJob(
        model=student, revision=None, tokenizer=student, optimisation=optimisation,
        method=Cdm(type="cdm", top_k=TOP_K), aligned=aligned, shards=(scored,), maps=(str(root / "map.npz"),),
        weights=(1.0,), seed=0, export=str(root / "export"),
    )  # fmt: skip


def group_of_one() -> None:
    """One thread, and a process group of this process alone."""
    torch.set_num_threads(1)
    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
