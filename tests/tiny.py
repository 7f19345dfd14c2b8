"""Tiny honest models for tests: random weights, real tokenizers trained on a few kilobytes of this Python's own text.

`tiny_teacher` (Qwen2, byte-level BPE, ChatML) and `tiny_student` (Llama, SentencePiece-type BPE with byte fallback)
write ordinary Hugging Face folders. The same seed gives the same files.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cdm.records import Document, Message

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 256


def texts() -> list[str]:
    """A few hundred lines of Python and some characters that take several tokens."""
    source = Path(textwrap.__file__).read_text(encoding="utf-8")
    return [*source.splitlines(keepends=True), "naïve café, Größe; 日本語 🙂 x² ≤ 10\n"]


def documents(n: int) -> list[Document]:
    """n documents whose responses are pieces of Python: an empty one, one with wide characters, one of every length."""
    lines = "".join(texts()).splitlines()
    out = [
        Document("00-empty", (Message("user", "Say nothing."),), ""),
        Document("01-wide", (Message("system", "Be brief."), Message("user", "Größe?")), "日本語 🙂 café 🙂🙂 x²\n"),
    ]
    for i in range(2, n):
        start, length = 7 * i % (len(lines) - 12), 1 + i % 9
        response = "\n".join(lines[start : start + length])
        out.append(Document(f"{i:02}-lines", (Message("user", f"Write lines {start} to {start + length}."),), response))
    return out[:n]


def byte_level_tokenizer(vocab_size: int = 480) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the ChatML template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def sentencepiece_tokenizer(vocab_size: int = 560) -> PreTrainedTokenizerFast:
    """BPE over "▁" with byte fallback, a dummy space and a BOS, as Llama 2 has; no chat template."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special + byte_tokens, show_progress=False)
    trained.train_from_iterator([line.rstrip("\n") for line in texts()[:-1]], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_teacher(folder: str | Path, seed: int = 0, scale: float = 0.3) -> str:
    """A Qwen2 folder, float32, 512 rows over 480 ids. `scale` of the weights makes its rows anything but flat."""
    tokenizer = byte_level_tokenizer()
    config = Qwen2Config(vocab_size=512, **_shape(), initializer_range=scale, tie_word_embeddings=True)
    torch.manual_seed(seed)
    return _save(Qwen2ForCausalLM(config), tokenizer, folder)


def tiny_student(folder: str | Path, seed: int = 1) -> str:
    """A Llama folder, float32, with another tokenizer than the teacher's."""
    tokenizer = sentencepiece_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), **_shape(), tie_word_embeddings=False)
    torch.manual_seed(seed)
    return _save(LlamaForCausalLM(config), tokenizer, folder)


def _shape() -> dict[str, int]:
    heads = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # vLLM on a CPU wants 32 a head
    return {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": CONTEXT, **heads}


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
