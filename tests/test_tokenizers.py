from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm.records import Message
from cdm.tokenizers import TokenizationError, Tokenizer, load_tokenizer
from tests import tiny
from tests.slow_twins import real_tokenizer

HARD = [
    "", "a", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n",
    " a", "a ", "  a  ", "\na", "\n a", " \n ", "a\n\n\nb", "a  b",
    "The quick brown fox.", "don't can't it's", "HTTPServer2XMLParser",
    "snake_case_name", "    return x\n", "\tif x:\n\t\tpass",
    "3.14159", "1234567890", "1,000,000", "48/2=<<48/2=24>>24",
    "x² + y₁ ≤ ∞", "½ ⅓ Ⅷ", "!!!???", "......", "--- === ###",
    "naïve café", "Größe Straße", "Ελληνικά", "Привет, мир",
    "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "知识蒸馏",
    "日本語テキスト", "한국어 문장", "🙂", "👩‍👩‍👧", "🇩🇪🇯🇵", "a🙂b", "\u200b",
    "\u00a0", "a\u00a0b", "\u3000", "e\u0301", "\ufeffx", "\x00", "\x7f",
    "\ue000", "\U0010ffff", "▁", "a▁b", "Ġ", "Ċ", "<0x0A>",
    "</s>", "<|endoftext|>", "<s>[INST]", "a" * 300, "ab " * 100,
]  # fmt: skip
LOSSY = {"bert-base-cased", "t5"}
NAMES = [
    "bert-base-cased",
    "cl100k",
    "deepseek-coder",
    "deepseek-v3",
    "falcon",
    "gemma",
    "gpt-neox",
    "gpt2",
    "llama2",
    "llama3",
    "mistral-nemo",
    "mistral-v1",
    "mistral-v3",
    "mistral-v3-hf",
    "o200k",
    "opt",
    "phi-3",
    "qwen2.5",
    "starcoder",
    "stories260k",
    "t5",
    "tiny-2k",
]


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    hf = tiny.byte_level_tokenizer() if request.param == "byte_level" else tiny.sentencepiece_tokenizer()
    hf.save_pretrained(folder)
    return load_tokenizer(str(folder))


def spelled(tokenizer: Tokenizer, text: str) -> bytes:
    """The text read back from ids and ends; the dummy space, which ends at byte 0 or less, is cut."""
    ids, ends = tokenizer.encode_with_ends(text)
    pieces = [tokenizer.token_bytes(int(i)) for i in ids]
    assert None not in pieces
    out = b""
    for piece, end in zip(pieces, ends.tolist(), strict=True):
        out = (out + piece)[-end:] if end else b""
        assert len(out) == end
    return out


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_ends_spell_any_text_or_say_why(tokenizer: Tokenizer, text: str) -> None:
    try:
        assert spelled(tokenizer, text) == text.encode()
    except TokenizationError as error:
        assert tokenizer.name in str(error)
        assert "▁" in text or tokenizer.hf.backend_tokenizer.normalizer is None  # only the space mark itself is lost


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_on_trained_tokenizers(tokenizer: Tokenizer, text: str) -> None:
    if "▁" in text and tokenizer.hf.backend_tokenizer.normalizer is not None:
        with pytest.raises(TokenizationError, match="do not spell the text at byte"):
            tokenizer.encode_with_ends(text)
    else:
        assert spelled(tokenizer, text) == text.encode()


def test_special_markup_in_a_response_is_text(tokenizer: Tokenizer) -> None:
    mark = tokenizer.hf.eos_token
    assert tokenizer.hf.eos_token_id not in tokenizer.encode_with_ends(mark)[0]
    assert spelled(tokenizer, mark) == mark.encode()


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizationError, match="valid Unicode"):
        tokenizer.encode_with_ends("a\ud800")


def test_bytes_of_ids(tokenizer: Tokenizer) -> None:
    every = tokenizer.all_token_bytes()
    assert len(every) == tokenizer.vocab_size == max(tokenizer.hf.get_vocab().values()) + 1
    assert {bytes([b]) for b in range(256)} <= set(every)
    assert tokenizer.token_bytes(tokenizer.hf.eos_token_id) is None
    assert tokenizer.token_bytes(tokenizer.vocab_size) is None and tokenizer.token_bytes(10**6) is None
    with pytest.raises(ValueError, match="negative"):
        tokenizer.token_bytes(-1)


def test_roles_and_prompts_with_a_template(tmp_path: Path) -> None:
    tiny.byte_level_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.hf.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert tokenizer.end_of_turn_id == tokenizer.special_roles["end_of_turn"] == ids[1]
    prompt = tokenizer.encode_prompt([Message("system", "s"), Message("user", "Grüße")])
    want = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nGrüße<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.hf.decode(prompt) == want
    assert prompt.count(ids[0]) == 3
    with pytest.raises(ValueError, match="at least one message"):
        tokenizer.encode_prompt([])


def test_roles_and_prompts_without_a_template(tmp_path: Path) -> None:
    tiny.sentencepiece_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.special_roles["end_of_turn"] == tokenizer.special_roles["eos"] == tokenizer.hf.eos_token_id
    prompt = tokenizer.encode_prompt([Message("system", "s"), Message("user", "u")])
    assert prompt[0] == tokenizer.hf.bos_token_id
    assert b"".join(tokenizer.token_bytes(i) for i in prompt[1:]) == b" s\n\nu\n"


def test_the_end_of_turn_may_differ_from_eos(tmp_path: Path) -> None:
    hf = tiny.byte_level_tokenizer()
    hf.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    hf.chat_template = "{% for m in messages %}{{ m['content'] }}\n<|end|>{{ eos_token }}{% endfor %}"
    hf.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.end_of_turn_id == tokenizer.hf.convert_tokens_to_ids("<|end|>") != tokenizer.special_roles["eos"]


def test_templates_that_refuse_or_drop(tmp_path: Path) -> None:
    hf = tiny.byte_level_tokenizer()
    hf.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}x"
    hf.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="no system role"):
        tokenizer.encode_prompt([Message("system", "s")])
    with pytest.raises(ValueError, match="drops the assistant"):
        _ = tokenizer.end_of_turn_id


def test_no_way_to_end_a_turn(tmp_path: Path) -> None:
    hf = tiny.sentencepiece_tokenizer()
    hf.eos_token = None
    hf.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token"):
        _ = load_tokenizer(str(tmp_path)).end_of_turn_id


def test_fingerprint_is_of_the_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.hf.save_pretrained(tmp_path / "copy")
    again = load_tokenizer(str(tmp_path / "copy"))
    assert again.fingerprint == tokenizer.fingerprint and len(again.fingerprint) == 64
    again.hf.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    again.hf.save_pretrained(tmp_path / "other")
    assert load_tokenizer(str(tmp_path / "other")).fingerprint != tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer(\.json)? could be read"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "llama2", "opt", "phi-3", "mistral-v3-hf", "starcoder"])
def test_ids_are_those_of_other_implementations(real_data: Path, name: str) -> None:
    tokenizer = real_tokenizer(real_data / "tokenizers" / name)
    checked = 0
    with gzip.open(real_data / "vectors" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if any(mark in row["text"] for mark in ("▁", "<s>", "<|endoftext|>")):
                continue  # lost by design, or a question of whether special tokens in text are parsed
            assert tokenizer.encode_with_ends(row["text"])[0].tolist() == row["ids"]
            checked += 1
    assert checked > 40
