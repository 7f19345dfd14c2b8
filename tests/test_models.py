"""Tokenizers and models made here, loading, identity, and what is refused before anything starts."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer

from cdm import corpus, models
from cdm.config_corpus import PythonPackages
from cdm.config_models import Optimisation, Pretrain, TokenizerRecipe
from cdm.records import Message
from cdm.tokenizers import Tokenizer, check_lossless, load_tokenizer

KINDS = ("byte_level_bpe", "sentencepiece_bpe")
CODE = 'def f(self, x):\n    if x > 12:\n        return self.naïve("日本")\n\n\traise ValueError(f"{x}\\n")  # 🙂\r\n'
CHAT = [Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "And?")]
CONFIGS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("corpus"))
    corpus.write_corpus(PythonPackages(type="python_packages", packages=["argparse", "email", "json"]), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers(corpus_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        kind: models.build_tokenizer(
            TokenizerRecipe(type=kind, vocab_size=1000),
            models.training_texts(corpus_folder),
            tmp_path_factory.mktemp(kind),
        )
        for kind in KINDS
    }


def _section(architecture: str = "qwen2", kind: str = "byte_level_bpe") -> Pretrain:
    return Pretrain(
        type="pretrain", name="tiny", architecture=architecture, tokenizer=TokenizerRecipe(type=kind, vocab_size=700),
        hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, context=128,
        training=Optimisation(steps=0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def qwen(corpus_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen"
    models.build_model(_section(), corpus_folder, str(folder), seed=0)
    return folder


# --- tokenizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_files(corpus_folder: str, tmp_path: Path, kind: str) -> None:
    for place in ("a", "b"):
        texts = models.training_texts(corpus_folder)
        built = models.build_tokenizer(TokenizerRecipe(type=kind, vocab_size=600), texts, tmp_path / place)
        assert built.vocab_size == 600
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60))
def test_token_bytes_spell_any_text(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    tokenizer = tokenizers[kind]
    ids, ends = tokenizer.encode_with_ends(text)
    pieces = b"".join(tokenizer.token_bytes(int(i)) or b"" for i in ids)
    assert pieces.decode().removeprefix(" " if kind == "sentencepiece_bpe" else "") == text
    assert not len(ids) or ends[-1] == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_code_is_cut_into_words_and_indents_and_comes_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    check_lossless(tokenizer)
    ids, _ = tokenizer.encode_with_ends(CODE)
    assert tokenizer.hf.decode(ids) == CODE
    texts = tokenizer.texts(ids)
    assert any(text.startswith("    ") for text in texts) or "   " in texts
    assert len(ids) < 0.7 * len(CODE.encode())
    assert len(tokenizer.encode_with_ends("<|end|><|im_end|></s>")[0]) > 3  # markup inside a text is text


def test_without_a_pre_tokenizer_texts_are_cut_as_in_training(tokenizers: dict[str, Tokenizer]) -> None:
    spelled = {piece.decode("utf-8", "ignore") for piece in tokenizers["sentencepiece_bpe"].all_token_bytes() if piece}

    def kinds(text: str) -> set[str]:
        """L a letter, O anything else; a number is a kind of its own, since numbers are cut into single digits."""
        categories = [(place, character, unicodedata.category(character)[0]) for place, character in enumerate(text)]
        return {
            f"N{place}" if c == "N" else "\n" if x == "\n" else "L" if c == "L" else "O" for place, x, c in categories
        }

    assert [text for text in spelled if len(kinds(text.lstrip(" "))) > 1] == []
    assert {"\n", "    ", " return"} <= spelled


def test_every_byte_has_a_piece_and_characters_come_before_them(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece_bpe"]
    vocab = tokenizer.hf.get_vocab()
    assert {tokenizer.token_bytes(vocab[f"<0x{byte:02X}>"]) for byte in range(256)} == {bytes([b]) for b in range(256)}
    assert vocab["e"] < vocab["<0x65>"] and vocab["\n"] < vocab["<0x0A>"]
    spec = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    assert spec["pre_tokenizer"] is None and spec["model"]["byte_fallback"]


@pytest.mark.parametrize(
    ("kind", "rendered", "end"),
    [
        (
            "byte_level_bpe",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>",
        ),
        (
            "sentencepiece_bpe",
            "<s><|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi.<|end|>\n"
            "<|user|>\nAnd?<|end|>\n<|assistant|>\n",
            "<|end|>",
        ),
    ],
)
def test_chat_templates(tokenizers: dict[str, Tokenizer], kind: str, rendered: str, end: str) -> None:
    tokenizer = tokenizers[kind]
    chat = [{"role": message.role, "content": message.content} for message in CHAT]
    assert tokenizer.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == rendered
    ids = tokenizer.encode_prompt(CHAT)
    assert tokenizer.hf.convert_ids_to_tokens(ids).count(end) == 4
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.end_of_turn_id) == end
    assert tokenizer.special_roles.keys() >= {"eos", "pad", "end_of_turn"}


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text to train it on"):
        models.build_tokenizer(TokenizerRecipe(type="byte_level_bpe", vocab_size=300), ["", " \n"], tmp_path)


# --- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "kind"), [("qwen2", KINDS[0]), ("llama", KINDS[1]), ("llama", KINDS[0])])
def test_a_model_is_an_ordinary_folder(corpus_folder: str, tmp_path: Path, architecture: str, kind: str) -> None:
    folder = str(tmp_path / "model")
    models.build_model(_section(architecture, kind), corpus_folder, folder, seed=3)
    model, tokenizer = models.load_model(folder, dtype="bfloat16"), load_tokenizer(folder)
    assert model.config.model_type == architecture and model.dtype == torch.bfloat16
    assert (tokenizer.vocab_size, model.config.vocab_size) == (700, 704)
    assert model.config.eos_token_id == tokenizer.end_of_turn_id
    assert tokenizer.end_of_turn_id in model.generation_config.eos_token_id
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    logits = model(torch.tensor([tokenizer.encode_prompt(CHAT)])).logits
    assert logits.shape[-1] == 704 and bool(torch.isfinite(logits).all())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # What vLLM and others see: the class that AutoTokenizer picks reads the same ids, and saves the same tokenizer.
    auto = AutoTokenizer.from_pretrained(folder)
    assert auto(CODE).input_ids == tokenizer.hf(CODE).input_ids
    auto.save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).fingerprint == tokenizer.fingerprint


def test_the_seed_decides_the_weights_alone(corpus_folder: str, qwen: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    for place, seed in [("same", 0), ("other", 1)]:
        models.build_model(_section(), corpus_folder, str(tmp_path / place), seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    identities = [models.model_identity(str(folder)) for folder in (qwen, tmp_path / "same", tmp_path / "other")]
    assert identities[0] == identities[1] != identities[2]
    for name in CONFIGS:
        assert (tmp_path / "other" / name).read_bytes() == (qwen / name).read_bytes()


def test_a_whole_folder_is_left_alone_and_a_broken_run_starts_again(
    corpus_folder: str, qwen: Path, tmp_path: Path
) -> None:
    times = {path: path.stat().st_mtime_ns for path in qwen.iterdir()}
    models.build_model(_section(), corpus_folder, str(qwen), seed=0)
    assert {path: path.stat().st_mtime_ns for path in qwen.iterdir()} == times
    shutil.copytree(qwen, tmp_path / "new.unfinished")
    (tmp_path / "new.unfinished" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "new.tokenizer").mkdir()
    models.build_model(_section(), corpus_folder, str(tmp_path / "new"), seed=0)
    assert models.model_identity(str(tmp_path / "new")) == models.model_identity(str(qwen))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert json.loads((tmp_path / "new" / models.ABOUT).read_text())["seed"] == 0


def test_identity_is_the_content(qwen: Path, tmp_path: Path) -> None:
    assert models.model_identity("some/model", "v1") == "some/model@v1"
    assert models.model_identity("some/model") == "some/model@main"
    copy = tmp_path / "copy"
    shutil.copytree(qwen, copy)
    (copy / "README.md").write_text("no part of the model")
    assert models.model_identity(str(copy)) == models.model_identity(str(qwen))
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert models.model_identity(str(copy)) != models.model_identity(str(qwen))


def test_weights_are_safetensors_or_refused(qwen: Path, tmp_path: Path) -> None:
    with safe_open(qwen / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in list(weights.keys())
    shutil.copytree(qwen, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model with safetensors weights could be read at '.*pickled'"):
        models.load_model(str(tmp_path / "pickled"))


def test_a_qwen2_folder_has_qwen2s_kind_of_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"needs tokenizer\.type byte_level_bpe; llama takes either"):
        _section("qwen2", KINDS[1])


def test_a_url_is_no_place_for_a_model(qwen: Path) -> None:
    with pytest.raises(ValueError, match="set `storage` to a path"):
        models.init_model(_section(), qwen, "s3://bucket/model", seed=0)


# --- pairs -------------------------------------------------------------------------------------------------------


def test_a_good_pair_has_no_problems(qwen: Path, tmp_path: Path) -> None:
    assert models.check_pair((str(qwen), None), (str(qwen), None)) == []
    assert models.check_pair(None, (str(qwen), None)) == models.check_pair(None, None) == []


def test_every_problem_of_a_pair_is_named(qwen: Path, tmp_path: Path) -> None:
    for place in ("small", "bare", "endless"):
        shutil.copytree(qwen, tmp_path / place)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 640}))
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "bare" / name).unlink()
    (tmp_path / "endless" / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "endless" / "tokenizer_config.json").read_text())
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))

    def check(teacher: str, student: str) -> list[str]:
        return models.check_pair((str(tmp_path / teacher), None), (str(tmp_path / student), None))

    small, bare = check("small", "bare")
    assert small == f"teacher {tmp_path}/small: 640 embedding rows are fewer than the tokenizer's 700 ids"
    assert bare == f"student {tmp_path}/bare: the folder lacks tokenizer.json, *.safetensors"
    (endless,) = models.check_pair(None, (str(tmp_path / "endless"), None))
    assert "no chat template and no eos_token" in endless


def test_a_lossy_tokenizer_is_named(real_data: Path, qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "bert")
    shutil.copytree(real_data / "tokenizers" / "bert-base-cased", tmp_path / "bert", dirs_exist_ok=True)
    problems = models.check_pair((str(tmp_path / "bert"), None), (str(qwen), None))
    assert any("loses text by design" in problem for problem in problems)
    assert any("embedding rows are fewer" in problem for problem in problems)
