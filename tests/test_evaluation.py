"""Held-out figures against their slow twins: one document, one token at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cdm import parts, shards
from cdm.batches import align_part
from cdm.corpus import table_of
from cdm.evaluation import _images, completions, evaluate_student, evaluate_teacher, held_out, sample_prompts
from cdm.grouping import Grouping
from cdm.mappings import BEFORE, PLACE, mappings_that_fired
from cdm.records import Alignment, Document
from cdm.teacher import TeacherScorer
from cdm.tokenizers import Tokenizer, load_tokenizer
from cdm.vocab_map import VocabMap, build_vocab_map
from tests import tiny

ENGINE = {"type": "transformers", "dtype": "float32", "batch_tokens": 512}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Twelve documents scored by a tiny teacher, aligned for a tiny student and for the teacher itself."""
    root = tmp_path_factory.mktemp("evaluation")
    teacher, student = tiny.tiny_teacher(root / "teacher"), tiny.tiny_student(root / "student")
    documents, name = tiny.documents(12), "test-00000.parquet"
    found = {"root": root, "teacher": teacher, "student": student, "documents": documents}
    corpus, scored = str(root / "corpus"), str(root / "shards")
    parts.write_part(corpus, name, table_of(documents))
    rows, quarantined = TeacherScorer(teacher, engine=ENGINE, top_k=8, max_length=256).score(documents)
    assert not quarantined
    shards.write_scores(scored, name, rows, quarantined=[], identity={})
    for side in ("teacher", "student"):
        aligned = str(root / f"aligned-{side}")
        table, _ = align_part(corpus, [scored], name, Grouping("exact", load_tokenizer(found[side])), max_length=256)
        parts.write_part(aligned, name, table, row_group_size=16)
        parts.finish(aligned, {}, kind="aligned")
        found[f"rows-{side}"] = held_out(aligned, [scored], 12)
    return found | {"corpus": corpus}


@torch.no_grad()
def slow_bits_per_byte(folder: str, documents: list[Document]) -> float:
    """One document at a time, the whole logits, special tokens left out."""
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats = size = 0.0
    for document in documents:
        prompt = tokenizer.encode_prompt(document.prompt)
        ids, ends = tokenizer.encode_with_ends(document.response)
        logp = model(torch.tensor([[*prompt, *ids.tolist()]])).logits[0].log_softmax(-1)
        for n, token in enumerate(ids.tolist()):
            if ends[n] > (ends[n - 1] if n else 0):
                nats -= logp[len(prompt) + n - 1, token].item()
        size += len(document.response.encode())
    return nats / size / math.log(2)


def evaluate(world: dict, side: str, **options: object) -> object:
    return evaluate_student(
        side, world[side], world[f"rows-{side}"], revision=None, tokenizer_t=load_tokenizer(world["teacher"]),
        micro_batch_tokens=600, **options,
    )  # fmt: skip


def test_the_students_bits_per_byte_are_the_slow_twins(world: dict) -> None:
    report = evaluate(world, "student")
    assert report.bits_per_byte == pytest.approx(slow_bits_per_byte(world["student"], world["documents"]), rel=1e-4)
    assert report.documents == 12 and report.name == "student"
    assert report.response_bytes == sum(len(document.response.encode()) for document in world["documents"])


@torch.no_grad()
def test_each_document_adds_what_it_adds_alone(world: dict) -> None:
    """And the agreement is that of a loop over groups."""
    report = evaluate(world, "student")
    tokenizer_s, tokenizer_t = load_tokenizer(world["student"]), load_tokenizer(world["teacher"])
    images = _images(tokenizer_s, tokenizer_t)
    model = AutoModelForCausalLM.from_pretrained(world["student"], dtype=torch.float32)
    assert report.ids == tuple(document.id for document in world["documents"])
    for place, (row, document) in enumerate(zip(world["rows-student"], world["documents"], strict=True)):
        added = {name: values[place] for name, values in report.sums.items()}
        assert added["bytes"] == len(document.response.encode())
        if added["bytes"]:
            bits = added["nats"] / added["bytes"] / math.log(2)
            assert bits == pytest.approx(slow_bits_per_byte(world["student"], [document]), rel=1e-4)
        logits = model(torch.tensor([[*row.prompt_s.tolist(), *row.ids_s.tolist()]])).logits[0]
        agreed = shared = 0
        for s, t in zip(row.alignments[0].bounds_s[:-1], row.alignments[0].bounds_t[:-1], strict=True):
            best = int(row.scores[0].topk_ids_t[t, 0])
            image = int(images[best]) if best < len(images) else -1  # beyond: padded rows
            shared += image >= 0
            agreed += image == int(logits[len(row.prompt_s) + s - 1].argmax())
        assert (added["agreed"], added["shared"]) == (agreed, shared)


def test_the_teachers_come_from_its_scores(world: dict) -> None:
    report = evaluate_teacher("teacher", world["rows-student"])
    assert report.bits_per_byte == pytest.approx(slow_bits_per_byte(world["teacher"], world["documents"]), rel=1e-3)


def test_the_teacher_agrees_with_itself_and_with_the_scores(world: dict) -> None:
    report = evaluate(world, "teacher")
    assert report.agreement == 1.0 and report.shared_boundaries > 100
    assert report.bits_per_byte == pytest.approx(evaluate_teacher("t", world["rows-teacher"]).bits_per_byte, rel=1e-3)


def test_agreement_counts_where_the_teachers_best_token_exists(world: dict) -> None:
    report = evaluate(world, "student")
    tokenizer_s, tokenizer_t = load_tokenizer(world["student"]), load_tokenizer(world["teacher"])
    roles = {tokenizer_t.special_roles[r]: tokenizer_s.special_roles[r] for r in ("eos", "end_of_turn", "pad", "bos")
             if r in tokenizer_t.special_roles and r in tokenizer_s.special_roles}  # fmt: skip
    spelled_s = {piece for piece in tokenizer_s.all_token_bytes() if piece is not None}
    shared = 0
    for row in world["rows-student"]:
        for start in row.alignments[0].bounds_t[:-1]:
            best = int(row.scores[0].topk_ids_t[start, 0])
            piece = tokenizer_t.token_bytes(best)
            shared += best in roles if piece is None else piece in spelled_s
    assert report.shared_boundaries == shared > 0
    assert 0 <= report.agreement <= 1


def test_samples_are_completions_of_held_out_prompts(world: dict) -> None:
    prompts = sample_prompts(world["corpus"], world["rows-student"], 2)
    report = evaluate(world, "student", prompts=prompts, sample_tokens=5)
    assert [sample["reference"] for sample in report.samples] == [d.response for d in world["documents"][:2]]
    assert all(len(sample["completion"]) < 100 for sample in report.samples)


def test_a_teachers_completions_are_a_students_of_the_same_folder(world: dict) -> None:
    prompts = sample_prompts(world["corpus"], world["rows-student"], 2)
    report = evaluate(world, "student", prompts=prompts, sample_tokens=5)
    alone = completions(world["student"], revision=None, dtype="float32", prompts=prompts, tokens=5)
    assert alone == report.samples


def test_without_a_shared_byte_there_is_no_agreement(world: dict) -> None:
    none = np.zeros(1, np.int32)
    alone = [replace(row, alignments=(Alignment(none, none),)) for row in world["rows-student"]]
    report = evaluate(world | {"rows-student": alone}, "student")
    assert report.agreement is None and report.shared_boundaries == 0


@torch.no_grad()
def slow_mappings(world: dict, map_path: str, top_k: int) -> dict[tuple[int, int], list[tuple[float, str]]]:
    """One document and one group at a time: (teacher id, student id) -> (mass, text before) of every group."""
    vocab_map = VocabMap.load(map_path)
    model = AutoModelForCausalLM.from_pretrained(world["student"], dtype=torch.float32)
    found: dict[tuple[int, int], list[tuple[float, str]]] = {}
    texts = {document.id: document.response.encode() for document in world["documents"]}
    for row in world["rows-student"]:
        logits = model(torch.tensor([[*row.prompt_s.tolist(), *row.ids_s.tolist()]])).logits[0]
        scores = row.scores[0]
        for s, t in zip(row.alignments[0].bounds_s[:-1], row.alignments[0].bounds_t[:-1], strict=True):
            top_s = logits[len(row.prompt_s) + s - 1].topk(top_k).indices.numpy()
            ids_t = scores.topk_ids_t[t].astype(np.int64)
            images = vocab_map.dynamic(ids_t[None], top_s[None])[0]
            for token, image, logp in zip(ids_t, images, scores.topk_logp_t[t], strict=True):
                if image >= 0 and token >= 0 and vocab_map.exact[token] < 0:
                    before = texts[row.id][: row.ends_s[s - 1] if s else 0].decode("utf-8", "replace")
                    found.setdefault((int(token), int(image)), []).append((math.exp(logp), before))
    return found


def test_the_mappings_that_fired_are_the_slow_twins(world: dict) -> None:
    student, teacher = load_tokenizer(world["student"]), load_tokenizer(world["teacher"])
    path = str(world["root"] / "map.npz")
    build_vocab_map(student, teacher, threshold=0.7, protect=False).save(path)
    options = {"map_path": path, "tokenizer_t": teacher, "top_k": 200, "micro_batch_tokens": 600}
    found = mappings_that_fired(world["student"], world["rows-student"], **options)
    slow = slow_mappings(world, path, 200)

    def text(tokenizer: Tokenizer, token: int) -> str:
        return (tokenizer.token_bytes(token) or b"").decode("utf-8", "replace")

    expected = {(text(teacher, t), text(student, s)): value for (t, s), value in slow.items()}
    assert len(found) >= 3 and [one["mass"] for one in found] == sorted((one["mass"] for one in found), reverse=True)
    for one in found:
        groups = expected[str(one["teacher"]), str(one["student"])]
        assert one["mass"] == pytest.approx(sum(mass for mass, _ in groups), abs=1e-3) and one["groups"] == len(groups)
        most = max(mass for mass, _ in groups)
        before = str(one["example"]).partition(PLACE)[0]
        assert any(
            text.endswith(before) and len(before) == min(len(text), BEFORE) for m, text in groups if m > most - 1e-6
        )
