"""Models: made here from a corpus (tokenizer trained, weights initialised) or loaded, identified and checked (layer 2).

Everything written is an ordinary Hugging Face folder (tokenizer.json, config.json, safetensors) that transformers and
vLLM open; everything loaded is safetensors, and no code from a hub is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
import transformers  # models and their configs cost seconds to import: they are named where they are used
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from cdm import parts
from cdm.config import digest
from cdm.config_models import Pretrain, TokenizerRecipe
from cdm.corpus import read_documents, split_parts
from cdm.tokenizers import Tokenizer, check_lossless, load_tokenizer

transformers_logging.disable_progress_bar()  # the stages have their own

ABOUT = "cdm.json"
TRAINING_TEXT = 64 << 20  # bytes of text that a tokenizer is trained on; a corpus is in random order, so a sample
VOCAB_MULTIPLE = 64  # embedding rows are padded to it, as in published models
TIED_UP_TO = 2048  # hidden size up to which input and output embeddings are shared, as in the Qwen2.5 family
_MAX_ALPHABET = 1000
_MAX_PIECE = 16  # characters, SentencePiece's default

# Qwen2's: contractions, words with one leading mark, single digits, punctuation, line ends, spaces.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The pieces that SentencePiece-type merges are learned in. A piece is spaces and then one kind of character, so no
# merge spans two pieces, and a tokenizer without a pre-tokenizer (as Llama 2's) cuts a text exactly as it was trained.
PIECE_PATTERN = r"\n+|▁*\p{L}+|▁*\p{N}|▁*[^\n▁\p{L}\p{N}]+|▁+"

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCEPIECE_TOKENS = ("<unk>", "<s>", "</s>")
TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


# --- made here ---------------------------------------------------------------------------------------------------


def build_model(section: Pretrain, corpus_folder: str, folder: str, *, seed: int) -> None:
    """Train a tokenizer on the training split of a corpus, initialise weights, write both as one folder.

    A folder that is there is whole and is left as it is; otherwise it appears at once, with `cdm.json` as the mark.
    """
    if Path(folder).exists():
        return
    tokenizer_folder = Path(f"{folder}.tokenizer")
    shutil.rmtree(tokenizer_folder, ignore_errors=True)
    build_tokenizer(section.tokenizer, training_texts(corpus_folder), tokenizer_folder)
    init_model(section, tokenizer_folder, folder, seed=seed)
    shutil.rmtree(tokenizer_folder)


def training_texts(corpus_folder: str, limit: int = TRAINING_TEXT) -> Iterator[str]:
    """Prompts and responses of a corpus's first training documents, up to `limit` bytes."""
    manifest = parts.read_manifest(corpus_folder, {"kind": "corpus"})
    left = limit
    for name in split_parts(manifest, "train"):
        for document in read_documents(corpus_folder, name):
            for text in [*(message.content for message in document.prompt), document.response]:
                left -= len(text.encode())
                if left < 0:
                    return
                yield text


def build_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str], folder: str | Path) -> Tokenizer:
    """Train a tokenizer with at most `vocab_size` ids, special tokens included, and write its folder.

    The same texts give the same files. `byte_level_bpe` is Qwen2's kind with ChatML turns, `sentencepiece_bpe` is
    Llama 2's (a dummy space, byte fallback, BOS) with Phi-3's turns. Raises ValueError where there is no text.
    """
    build = {"byte_level_bpe": _byte_level_bpe, "sentencepiece_bpe": _sentencepiece_bpe}[recipe.type]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("tokenizer: there is no text to train it on")
    build(texts, recipe.vocab_size).save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    check_lossless(tokenizer)
    return tokenizer


def init_model(section: Pretrain, tokenizer_folder: str | Path, folder: str | Path, *, seed: int) -> None:
    """Write randomly initialised float32 weights of the section's shape with a tokenizer's files, whole or not at all.

    The embedding has a multiple of VOCAB_MULTIPLE rows: like most published models, more than the tokenizer has ids.
    """
    if "://" in str(folder):
        raise ValueError(f"{folder}: models are kept on a local or shared folder; set `storage` to a path, not a URL")
    tokenizer = load_tokenizer(str(tokenizer_folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(_model_config(section, tokenizer), dtype=torch.float32)
    roles = tokenizer.special_roles
    ends = sorted({tokenizer.end_of_turn_id, roles["eos"]})
    model.generation_config = GenerationConfig(
        bos_token_id=roles.get("bos"), eos_token_id=ends, pad_token_id=roles["pad"]
    )
    unfinished = Path(f"{folder}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    for file in Path(tokenizer_folder).iterdir():
        shutil.copyfile(file, unfinished / file.name)
    about = {"identity": digest(section, tokenizer.fingerprint, seed), "name": section.name, "seed": seed}
    (unfinished / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    _publish(unfinished, Path(folder))


def _publish(unfinished: Path, folder: Path) -> None:
    for file in unfinished.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    parts.fsync_folder(str(unfinished))
    os.replace(unfinished, folder)
    parts.fsync_folder(str(folder.parent))


def _model_config(section: Pretrain, tokenizer: Tokenizer) -> transformers.PretrainedConfig:
    roles = tokenizer.special_roles
    ids = {"bos": roles.get("bos"), "eos": tokenizer.end_of_turn_id, "pad": roles["pad"]}
    named = {f"{role}_token_id": number for role, number in ids.items()}
    return pretrain_config(section, tokenizer.vocab_size, **named)


def pretrain_config(section: Pretrain, vocab_size: int, **options: int | None) -> transformers.PretrainedConfig:
    """The configuration of a model of this shape whose tokenizer has so many ids."""
    kind = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[section.architecture]
    return kind(
        vocab_size=-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.kv_heads,
        max_position_embeddings=section.context,
        tie_word_embeddings=section.hidden_size <= TIED_UP_TO,
        **options,
    )


def _byte_level_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Backend(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[_special(token) for token in CHATML_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Empty affixes, as in Qwen2's own files: what AutoTokenizer saves is then this file again.
    backend.model = BPE(*_learned(backend), continuing_subword_prefix="", end_of_word_suffix="")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _sentencepiece_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    room = vocab_size - 256 - len(TURN_TOKENS)
    vocab, merges = _sentencepiece_merges(texts, room)
    # Byte pieces come last: where a character is a piece of its own too, the lowest id that spells it is in use.
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *TURN_TOKENS]:
        vocab[token] = len(vocab)
    backend = Backend(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = _dummy_space()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([_special(token) for token in (*SENTENCEPIECE_TOKENS, *TURN_TOKENS)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        chat_template=TURNS,
    )  # fmt: skip


def _sentencepiece_merges(texts: list[str], room: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges learned within PIECE_PATTERN, at most `room` ids with the three special tokens."""
    learner = Backend(BPE())
    learner.normalizer = _dummy_space()
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE_PATTERN), "isolated")
    trainer = BpeTrainer(
        vocab_size=room,
        min_frequency=2,
        special_tokens=[_special(token) for token in SENTENCEPIECE_TOKENS],
        limit_alphabet=min(_MAX_ALPHABET, (room - len(SENTENCEPIECE_TOKENS)) // 2),
        max_token_length=_MAX_PIECE,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return _learned(learner)


def _learned(backend: Backend) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _dummy_space() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


# --- loaded ------------------------------------------------------------------------------------------------------


def load_model(name: str, *, revision: str | None = None, dtype: str = "float32") -> transformers.PreTrainedModel:
    """A causal language model from a folder or the hub. `dtype` is bfloat16, float16 or float32.

    Raises ValueError where there are no safetensors weights to load.
    """
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        raise ValueError(f"no model with safetensors weights could be read at {name!r}: {error}") from error


def model_identity(name: str, revision: str | None = None) -> str:
    """What a model is: `name@revision` on the hub, for a folder the hex sha256 of its files.

    Configuration, tokenizer and weights count, nothing else.
    The checksum of a folder is kept in this process as long as its files keep size and time.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    files = sorted(file for file in folder.iterdir() if _IDENTIFYING.fullmatch(file.name))
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _checksum(stamps)


_IDENTIFYING = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja"
    r"|.*\.safetensors(\.index\.json)?"
)


@cache
def _checksum(stamps: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for path, size, _ in stamps:
        total.update(f"{Path(path).name}:{size}\n".encode())
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# --- checked -----------------------------------------------------------------------------------------------------


def check_pair(teacher: tuple[str, str | None] | None, student: tuple[str, str | None] | None) -> list[str]:
    """Why a teacher and a student, each (name, revision), cannot be used; empty where nothing is wrong.

    None is a model that is yet to be made. Reads tokenizers and configurations, no weights.
    """
    named = [("teacher", teacher), ("student", student)]
    return [
        f"{role} {model[0]}: {problem}" for role, model in named if model is not None for problem in _problems(*model)
    ]


def context_problems(name: str, revision: str | None, max_length: int) -> list[str]:
    """A line where `max_length` exceeds the context of a model that exists; reads its configuration alone."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision).get_text_config()
    except (OSError, ValueError):
        return []  # check_pair says what is wrong with it
    context = config.to_dict().get("max_position_embeddings")  # absent: recurrent models have no limit
    if context is None or max_length <= context:
        return []
    return [f"{name}: max_length {max_length} exceeds its context, {context}"]


def _problems(name: str, revision: str | None) -> list[str]:
    folder = Path(name)
    if folder.is_dir():
        missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]
        missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
        if missing:
            return [f"the folder lacks {', '.join(missing)}"]
    try:
        tokenizer = load_tokenizer(name, revision=revision)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        rows = config.get_text_config().vocab_size
    except (ValueError, OSError) as error:
        return [str(error)]
    problems = []
    for check in (check_lossless, lambda tokenizer: tokenizer.end_of_turn_id):
        try:
            check(tokenizer)
        except ValueError as error:
            problems.append(str(error))
    if rows < tokenizer.vocab_size:
        problems.append(f"{rows} embedding rows are fewer than the tokenizer's {tokenizer.vocab_size} ids")
    return problems
