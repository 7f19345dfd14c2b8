"""Generated responses: sampling against an obvious twin, every filter, splits, seeds, parts made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm import corpus, parts
from cdm.config import parse_config
from cdm.config_corpus import Jsonl
from cdm.corpus import read_documents, split_of, write_corpus
from cdm.documents import DroppedError, document_id
from cdm.generation import (
    SAMPLE,
    ResponseGenerator,
    finish_generated,
    read_generated,
    response_text,
    sample_seed,
    stop_ids,
    write_generated,
)
from cdm.generators import Request, Sampling, TransformersGenerator, nucleus
from cdm.models import load_model
from cdm.records import Document, Message
from cdm.tokenizers import Tokenizer, load_tokenizer
from tests import tiny

ENGINE = {"type": "transformers", "dtype": "float32", "batch_tokens": 400}
OPTIONS: dict[str, Any] = {
    "temperature": 1.0, "top_p": 0.9, "max_tokens": 16, "stop": ["e"], "samples": 4, "replace": "missing",
    "min_bytes": 1, "max_bytes": 1000, "check": None, "seed": 0, "engine": ENGINE, "max_length": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.tiny_teacher(tmp_path_factory.mktemp("teacher"), scale=0.05)


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Tokenizer:
    return load_tokenizer(model)


def ask(n: int, response: str = "") -> Document:
    prompt = (Message("user", f"Write line {n}."),)
    return Document(document_id(prompt, response), prompt, response, {"answer": str(n)})


# --- sampling ----------------------------------------------------------------------------------------------------


def sampled_slowly(model: str, request: Request, sampling: Sampling) -> list[int]:
    """One request, one whole forward pass a token, one draw a token."""
    network, ids = load_model(model).eval(), list(request.prompt_ids)
    generator = torch.Generator().manual_seed(request.seed)
    while len(ids) - len(request.prompt_ids) < sampling.max_tokens:
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0, -1]
        probabilities = torch.softmax(logits / (sampling.temperature or 1), -1)
        kept, mass = torch.zeros_like(probabilities), 0.0
        for best in probabilities.argsort(descending=True).tolist():
            if mass < sampling.top_p:
                kept[best] = probabilities[best]
                mass += float(probabilities[best])
        if sampling.temperature:
            kept /= torch.empty_like(kept).exponential_(generator=generator)
        ids.append(int(kept.argmax()))
        if ids[-1] in sampling.stop_ids:
            break
    return ids[len(request.prompt_ids) :]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_batches_sample_what_single_requests_would(
    model: str, tokenizer: Tokenizer, temperature: float, top_p: float
) -> None:
    ends = (*stop_ids(tokenizer), *range(40))  # frequent, so that rows end at different lengths
    sampling = Sampling(temperature, top_p, 12, (), ends)
    requests = [Request(tokenizer.encode_prompt(ask(10**n).prompt), 7 * n) for n in range(6)]
    engine = TransformersGenerator(
        model, revision=None, tokenizer=tokenizer, max_length=96, dtype="float32", batch_tokens=150
    )
    found = engine.generate(requests, sampling)
    assert found == [sampled_slowly(model, request, sampling) for request in requests]
    assert engine.generate(requests[::-1], sampling) == found[::-1]
    if temperature:
        assert len({len(ids) for ids in found}) > 1 and any(len(ids) == 12 for ids in found)


def test_a_text_ends_a_row_and_what_pads_it_is_no_part_of_it(model: str, tokenizer: Tokenizer) -> None:
    base = {"revision": None, "tokenizer": tokenizer, "max_length": 96, "dtype": "float32", "batch_tokens": 10_000}
    requests = [Request(tokenizer.encode_prompt(ask(n).prompt), n) for n in range(8)]
    free = Sampling(1.0, 1.0, 24, (), stop_ids(tokenizer))
    stopped = Sampling(1.0, 1.0, 24, ("in", "é", "r"), stop_ids(tokenizer))
    engine = TransformersGenerator(model, **base)
    whole = engine.generate(requests, free)
    cut = engine.generate(requests, stopped)
    for long, short in zip(whole, cut, strict=True):
        texts = [b"".join(tokenizer.token_bytes(i) or b"" for i in long[:n]) for n in range(len(long) + 1)]
        ends = [n for n, text in enumerate(texts) if any(stop.encode() in text for stop in stopped.stop)]
        assert short == long[: ends[0] if ends else None]
    assert cut != whole


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_nucleus_is_the_smallest_set_that_reaches_the_mass(logits: list[float], top_p: float) -> None:
    logp = torch.log_softmax(torch.tensor([logits], dtype=torch.float64), -1)
    kept = nucleus(logp, top_p)[0]
    inside = logp[0][kept.isfinite()].exp().tolist()
    assert inside and min(inside) >= max(logp[0][kept.isinf()].exp().tolist(), default=0) - 1e-12
    assert sum(inside) >= top_p - 1e-9 and sum(inside) - min(inside) < top_p + 1e-9
    assert torch.equal(kept[kept.isfinite()], logp[0][kept.isfinite()])


# --- from tokens to text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("a word", "<|im_end|>", "a word"),
        ("a word", "<|endoftext|>", None),  # no end of this model's turns: a special token within
        ("a word", "", None),
        ("a wordSTOP and more", "", "a word"),
        ("a word\nHuman: STOP", "<|im_end|>", "a word"),
        ("cafe\u0301", "<|im_end|>", "caf\u00e9"),
        ("", "<|im_end|>", ""),
    ],
)
def test_what_tokens_spell(tokenizer: Tokenizer, text: str, end: str, expected: str | None) -> None:
    ids = [*tokenizer.encode_with_ends(text)[0].tolist(), *([tokenizer.hf.convert_tokens_to_ids(end)] if end else [])]
    sampling = Sampling(1.0, 1.0, 99, ("STOP", "\nHuman:"), stop_ids(tokenizer))
    if expected is not None:
        assert response_text(tokenizer, ids, sampling) == expected
    else:
        with pytest.raises(DroppedError, match="special_token" if end else "unfinished"):
            response_text(tokenizer, ids, sampling)


def test_half_a_character_and_a_dummy_space(tokenizer: Tokenizer, tmp_path: Path) -> None:
    end = tokenizer.end_of_turn_id
    sampling = Sampling(1.0, 1.0, 99, (), (end,))
    half = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == "é".encode()[:1]]
    with pytest.raises(DroppedError, match="not_unicode"):
        response_text(tokenizer, [half[0], end], sampling)
    with pytest.raises(DroppedError, match="unfinished"):
        response_text(tokenizer, [half[0]], sampling)
    llama = load_tokenizer(tiny.tiny_student(tmp_path))
    ids = llama.encode_with_ends(" two  spaces")[0].tolist()
    ends = Sampling(1.0, 1.0, 99, (), stop_ids(llama))
    assert response_text(llama, [*ids, llama.end_of_turn_id], ends) == " two  spaces"
    assert llama.hf.convert_ids_to_tokens(ids[0]).startswith("▁")


# --- documents ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(model: str) -> tuple[list[Document], list[Document], Counter[str]]:
    """Twelve prompts and a given response; what became of them."""
    asked = [*(ask(n) for n in range(12)), ask(99, "Given.")]
    return asked, *ResponseGenerator(model, **OPTIONS)(asked, "train")


def test_given_responses_stay_and_samples_are_documents_of_their_prompt(
    generated: tuple[list[Document], list[Document], Counter[str]],
) -> None:
    asked, found, counts = generated
    sources = {document.id: document for document in asked}
    assert asked[-1] in found and [d.id for d in found] == sorted({d.id for d in found})
    for document in found:
        assert document.id == document_id(document.prompt, document.response) and document.response
        if document.response != "Given.":
            source, _, sample = document.metadata[SAMPLE].partition("/")
            assert document.prompt == sources[source].prompt and int(sample) in range(4)
            assert document.metadata["answer"] == sources[source].metadata["answer"]
            assert split_of(document.prompt, 0.3, 0.3) == split_of(sources[source].prompt, 0.3, 0.3)
            assert "e" not in document.response and "<|" not in document.response
    assert len({d.prompt for d in found}) < len(found) - 2, "several samples of one prompt"
    reasons = ("special_token", "unfinished", "not_unicode", "too_short", "duplicates")
    assert counts["given"] == 1 and counts["prompts"] == 12 and counts["samples"] == 48
    assert counts["generated"] == len(found) - 1
    assert counts["generated"] + sum(counts[reason] for reason in reasons) == 48


def test_a_document_depends_on_its_seed_alone(
    model: str, generated: tuple[list[Document], list[Document], Counter[str]]
) -> None:
    asked, found, _ = generated
    for one in asked[:4]:
        alone = ResponseGenerator(model, **OPTIONS)([one], "train")[0]
        assert alone == [d for d in found if d.metadata.get(SAMPLE, "").startswith(one.id)]
    again = ResponseGenerator(model, **OPTIONS)(asked[::-1], "train")[0]
    assert again == found
    other = ResponseGenerator(model, **OPTIONS | {"seed": 1})(asked, "train")[0]
    assert {d.id for d in other} != {d.id for d in found}


@given(st.integers(), st.text("0123456789abcdef", min_size=1), st.integers(0, 99))
def test_seeds_fit_and_differ(seed: int, identity: str, sample: int) -> None:
    assert 0 <= sample_seed(seed, identity, sample) < 2**63
    others = [(seed + 1, identity, sample), (seed, identity + "0", sample), (seed, identity, sample + 1)]
    assert sample_seed(seed, identity, sample) not in {sample_seed(*other) for other in others}


def test_held_out_prompts_get_one_response_and_keep_given_ones(model: str) -> None:
    asked = [*(ask(n) for n in range(6)), ask(98, "Reference."), ask(99, "Another one.")]
    generator = ResponseGenerator(model, **OPTIONS | {"replace": "all"})
    found, counts = generator(asked, "test")
    assert counts["given"] == 2 and counts["samples"] == 6 and all(d in found for d in asked[6:])
    found, counts = generator(asked, "train")
    assert counts["given"] == 0 and counts["samples"] == 32
    assert not any(d.response in ("Reference.", "Another one.") for d in found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_bytes": 999}, "too_short"),
        ({"max_bytes": 1, "min_bytes": 0}, "too_long"),
        ({"stop": [], "max_tokens": 2}, "unfinished"),
        ({"check": {"type": "final_number", "reference": "answer"}}, "check_failed"),
        ({"max_length": 30}, "prompt_too_long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_reason_is_counted(model: str, options: dict[str, Any], reason: str) -> None:
    asked = [ask(n) for n in range(100, 104)]
    found, counts = ResponseGenerator(model, **OPTIONS | options)(asked, "train")
    assert counts[reason] > 0
    totals = ("given", "prompts", "samples", "tokens", "generated")
    dropped = sum(count for name, count in counts.items() if name not in totals)
    assert len(found) == counts["generated"]
    assert counts["generated"] + dropped == (counts["samples"] or counts["prompts"])


class _Parrot:
    """Says the same to everyone, but for one seed."""

    def __init__(self, said: list[int], other: list[int]) -> None:
        self.said, self.other = said, other

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        return [self.other if i == 1 else self.said for i in range(len(requests))]


def test_of_equal_samples_of_a_prompt_one_stays(model: str) -> None:
    generator = ResponseGenerator(model, **OPTIONS)
    end = generator.tokenizer.end_of_turn_id
    said, other = ([*generator.tokenizer.encode_with_ends(text)[0].tolist(), end] for text in ("Si.", "No."))
    generator.engine = _Parrot(said, other)
    found, counts = generator([ask(1), ask(2)], "train")
    assert Counter((d.prompt[0].content, d.response) for d in found) == {
        ("Write line 1.", "Si."): 1, ("Write line 1.", "No."): 1, ("Write line 2.", "Si."): 1,
    }  # fmt: skip
    assert counts["samples"] == 8 and counts["generated"] == 3 and counts["duplicates"] == 5
    assert {d.metadata[SAMPLE][-2:] for d in found} == {"/0", "/1"}


def test_what_does_not_come_back_from_the_tokenizer_is_left_out(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ResponseGenerator(model, **OPTIONS)
    refused = Document("x" * 32, (), "")
    found, counts = generator([refused], "train")
    assert found == [] and counts == Counter(prompts=1, prompt_refused=1)
    backend = generator.tokenizer._backend
    monkeypatch.setattr(generator.tokenizer, "_backend", None)
    monkeypatch.setattr(type(generator.tokenizer), "_ids", lambda self, text: backend.encode(text + "!").ids)
    found, counts = generator([ask(n) for n in range(4)], "train")
    assert found == [] and counts["not_spelled"] > 0


# --- parts -------------------------------------------------------------------------------------------------------

IDENTITY = {"model": "tiny", "samples": 4}


def test_a_part_made_again_is_the_same_bytes(model: str, tmp_path: Path) -> None:
    asked = [ask(n) for n in range(8)]
    for folder in ("a", "b"):  # each with an engine of its own, the second one with a past
        generator = ResponseGenerator(model, **OPTIONS)
        if folder == "b":
            generator(asked[2:5], "train")
        write_generated(str(tmp_path / folder), "train-00000.parquet", *generator(asked, "train"), IDENTITY)
    written = [(tmp_path / folder / "train-00000.parquet").read_bytes() for folder in ("a", "b")]
    assert written[0] == written[1]
    footer = read_generated(str(tmp_path / "a"), "train-00000.parquet", IDENTITY)
    assert footer.documents == footer.counts["generated"] > 0 and footer.counts["samples"] == 32


def test_a_finished_folder_is_a_corpus_without_its_empty_parts(tmp_path: Path) -> None:
    folder = str(tmp_path)
    documents = {"train": [ask(1, "One."), ask(2, "Größe.")], "validation": [], "test": [ask(3, "Three.")]}
    for split, some in documents.items():
        counts = Counter({"samples": 2, "generated": len(some), "check_failed": 2 - len(some)})
        write_generated(folder, f"{split}-00000.parquet", some, counts, IDENTITY)
    manifest = finish_generated(folder, [f"{split}-00000.parquet" for split in documents], IDENTITY)
    assert manifest.kind == "corpus" and manifest.names == ["train-00000.parquet", "test-00000.parquet"]
    assert manifest.meta["splits"] == {"train": 2, "validation": 0, "test": 1}
    assert manifest.meta["counts"] == {"samples": 6, "generated": 3, "check_failed": 3}
    assert manifest.meta["response_bytes"] == len("One.Größe.Three.".encode())
    assert read_documents(folder, "train-00000.parquet") == documents["train"]
    assert corpus.split_parts(manifest, "test") == ["test-00000.parquet"]


def test_parts_of_another_request_and_folders_without_training_documents_are_refused(tmp_path: Path) -> None:
    folder, name = str(tmp_path), "train-00000.parquet"
    write_generated(folder, name, [], Counter(samples=3, check_failed=3), IDENTITY)
    with pytest.raises(ValueError, match=r"samples is 4, expected 5; delete the folder"):
        finish_generated(folder, [name], IDENTITY | {"samples": 5})
    with pytest.raises(ValueError, match=r"no training document is left .*'check_failed': 3"):
        finish_generated(folder, [name], IDENTITY)
    parts.write_part(folder, name, pa.table({"x": [1]}))
    with pytest.raises(ValueError, match="but no generated documents"):
        read_generated(folder, name, IDENTITY)


def test_what_was_asked_for_identifies_a_folder(model: str, tmp_path: Path) -> None:
    from ray_jobs.generate import generation_identity

    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Why?", "answer": 3}\n')
    base: dict[str, Any] = {
        "name": "small",
        "corpus": {"type": "jsonl", "path": str(source), "response": None, "metadata": ["answer"]},
        "teachers": [{"model": model, "engine": ENGINE, "max_length": 96}],
        "student": {"model": model, "steps": 1},
        "method": {"type": "sft"},
    }
    options = {"max_tokens": 16, "check": {"type": "final_number", "reference": "answer"}}

    def identity(**changes: Any) -> dict[str, Any]:
        return generation_identity(parse_config(base | {"generation": options} | changes), model, "weights", "corpus")

    first = identity()
    assert identity(storage="elsewhere", resources={"teacher": {"actors": 3}}, name="other") == first
    others = [
        identity(seed=1),
        identity(generation=options | {"temperature": 0.5}),
        identity(generation=options | {"engine": {"type": "vllm"}}),
        identity(generation=options | {"check": None}),
        identity(corpus=base["corpus"] | {"max_response_bytes": 99}),
    ]
    assert all(other != first for other in others)
    section = parse_config(base | {"generation": options}).corpus
    assert isinstance(section, Jsonl)
    manifest = write_corpus(section, str(tmp_path / "corpus"), replace="missing")
    assert manifest.meta["counts"]["to_generate"] == 1
