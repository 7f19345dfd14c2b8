"""All pairs of real tokenizers on hard texts: exactly covered on both sides, or refused as it is written here."""

from __future__ import annotations

import gzip
import json
import unicodedata
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from cdm.alignment import exact_bounds
from cdm.tokenizers import TokenizationError, check_lossless
from tests.slow_twins import real_tokenizer
from tests.test_tokenizers import LOSSY, NAMES, spelled

# What the collection of round-trip strings lacks: bidirectional marks, words beyond any vocabulary, mixed line ends.
MORE = [
    "\u202eabc\u202c abc \u2066שלום\u2069 123",
    "قَالَ ٱلْمُعَلِّمُ: ١٢٣ + 456",
    "עברית ו-English ביחד, 50% (כן)",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "x" * 1000,
    "知" * 300,
    "https://example.com/" + "a1b2/" * 60 + "?q=%E2%9C%93",
    "👩\u200d❤\ufe0f\u200d👩" * 20,
    "one\rtwo\r\nthree\n\rfour",
    "\x00\x01\x1f\x7f mixed \x00 text",
    "1" * 257,
    "def f(λ: Δx) -> 'naïve':\n\t    return λ  # 🙂\n",
]


SPACE_MARKS = ["a▁b", "▁", "▁▁x"]  # a space in these vocabularies, so the tokens spell another text
CONTROLS = ["\x01\x02\x03", "\x0b\x0c", "\x1c\x1d\x1e\x1f"]  # bytes that this vocabulary has no token for
SENTENCEPIECE = ["gemma", "llama2", "mistral-v1", "mistral-v3", "mistral-v3-hf", "phi-3", "stories260k"]
REFUSED = dict.fromkeys(SENTENCEPIECE, SPACE_MARKS) | {"falcon": CONTROLS}
TINY_REFUSES = 116  # 2,003 ids without byte fallback: most of what is not plain English


def hard_texts(real_data: Path) -> list[str]:
    """NFC, as documents are when they enter."""
    with gzip.open(real_data / "vectors" / "roundtrip_strings.json.gz", "rt", encoding="utf-8") as file:
        texts = [row["text"] for row in json.load(file)] + MORE
    return sorted({unicodedata.normalize("NFC", text) for text in texts})


@pytest.fixture(scope="module")
def encoded(real_data: Path) -> dict[str, dict[str, np.ndarray]]:
    """By tokenizer, the ends of every text that it does not refuse; what is not refused spells the text."""
    out: dict[str, dict[str, np.ndarray]] = {}
    for name in NAMES:
        tokenizer = real_tokenizer(real_data / "tokenizers" / name)
        if name in LOSSY:
            with pytest.raises(ValueError, match=f"{name}.*loses text by design"):
                check_lossless(tokenizer)
            continue
        check_lossless(tokenizer)
        out[name] = {}
        for text in hard_texts(real_data):
            try:
                assert spelled(tokenizer, text) == text.encode()
                out[name][text] = tokenizer.encode_with_ends(text)[1]
            except TokenizationError as error:
                assert name in str(error)
    return out


def test_what_each_tokenizer_refuses(encoded: dict[str, dict[str, np.ndarray]], real_data: Path) -> None:
    texts = hard_texts(real_data)
    assert len(texts) > 200
    refused = {name: [text for text in texts if text not in ends] for name, ends in encoded.items()}
    assert len(refused.pop("tiny-2k")) == TINY_REFUSES
    assert {name: found for name, found in refused.items() if found} == REFUSED


def test_groups_of_all_pairs_end_on_the_same_bytes(encoded: dict[str, dict[str, np.ndarray]]) -> None:
    """Tokens spell the text up to their ends, so groups that end together spell the same bytes on both sides."""
    pairs = 0
    for student, teacher in permutations(encoded, 2):
        for text in encoded[student].keys() & encoded[teacher].keys():
            ends_s, ends_t = encoded[student][text], encoded[teacher][text]
            groups = exact_bounds(ends_s, ends_t)
            for bounds, ends in ((groups.bounds_s, ends_s), (groups.bounds_t, ends_t)):
                assert bounds[0] == 0 and bounds[-1] == len(ends) and (np.diff(bounds) > 0).all()
            if text:
                assert (ends_s[groups.bounds_s[1:] - 1] == ends_t[groups.bounds_t[1:] - 1]).all()
            pairs += 1
    assert pairs > 70_000
