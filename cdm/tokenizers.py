"""Any Hugging Face tokenizer as token bytes and byte ends: the only file that knows what "Ġ", "▁" or a BOS is.

Legend: N tokens of one text, V ids of one vocabulary. The rules are those of docs/method.md, section 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import transformers  # its Auto classes cost seconds to import: they are named where they are used
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from cdm.records import Message

SPACE_MARK = "▁"
SENTINEL = "sentinel"
# What `encode_prompt` does where a tokenizer has no chat template, after the BOS, as a template: contents joined by a
# blank line, a newline before the response, eos after it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% set answer = loop.last and message['role'] == 'assistant' and not add_generation_prompt %}"
    "{% if not loop.first %}{{ '\n' if answer else '\n\n' }}{% endif %}{{ message['content'] }}"
    "{% if answer %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)


class TokenizationError(ValueError):
    """The token bytes of a text do not spell the text; the message says where."""


class Tokenizer:
    """One vocabulary as bytes. Holds the Hugging Face tokenizer in `.hf`; everything else is derived from it."""

    def __init__(self, hf: PreTrainedTokenizerFast, name: str) -> None:
        self.hf = hf
        self.name = name
        self._spec: dict[str, Any] = json.loads(hf.backend_tokenizer.to_str())
        self._backend = _plain_backend(hf.backend_tokenizer)
        self._bytes = _all_token_bytes(self._spec, self._backend)
        self.vocab_size = len(self._bytes)
        self._has_dummy_space = self._spell(self._ids("a")) == b" a"

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {self.vocab_size} ids)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.hf, self.name)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that `token_id` adds to the text; None for special and unused ids and for padded embedding rows."""
        if token_id < 0:
            raise ValueError(f"{self.name}: token id {token_id} is negative; unmapped ids (-1) have no bytes")
        return self._bytes[token_id] if token_id < self.vocab_size else None

    def all_token_bytes(self) -> list[bytes | None]:
        """`token_bytes` of every id, in order. Length `vocab_size`."""
        return list(self._bytes)

    @cached_property
    def byte_pieces(self) -> frozenset[int]:
        """The ids of byte fallback, <0x00> to <0xFF>: emitted only for what no other token spells."""
        if not _has_byte_fallback(self._spec):
            return frozenset()
        return frozenset(i for token, i in self._backend.get_vocab().items() if _is_byte_token(token))

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The tokens as strings (UTF-8 with `surrogateescape`); special tokens are empty."""
        pieces = map(self.token_bytes, np.asarray(ids, dtype=np.int64).tolist())
        return ["" if piece is None else piece.decode("utf-8", "surrogateescape") for piece in pieces]

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and byte ends of `text`, without special tokens. Two int32 arrays of shape [N].

        A dummy space that the tokenizer puts before the text is no part of it: all ends move back by one.
        Markup of special tokens inside the text ("</s>") is text, not a special token.

        Raises TokenizationError with the reason where the token bytes do not spell the text.
        """
        try:
            expected = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizationError(f"{self.name}: the text is no valid Unicode: {error}") from None
        ids = self._ids(text)
        pieces = [self._bytes[i] for i in ids]
        spelled = b"".join(piece or b"" for piece in pieces)
        shift = 0
        if spelled != expected or None in pieces:
            shift = 1
            if not self._has_dummy_space or None in pieces or spelled != b" " + expected:
                raise TokenizationError(f"{self.name}: {self._reason(ids, pieces, spelled, expected)}")
        ends = np.cumsum([len(piece or b"") for piece in pieces], dtype=np.int32) - np.int32(shift)
        return np.asarray(ids, dtype=np.int32), ends.astype(np.int32)

    def spell_response(self, ids: Sequence[int]) -> bytes:
        """The bytes that tokens add to a text of their own, without the dummy space where the tokenizer puts one.

        Raises TokenizationError where one of them spells nothing: special tokens, unused ids.
        """
        pieces = [self.token_bytes(i) for i in ids]
        if None in pieces:
            first = pieces.index(None)
            raise TokenizationError(f"{self.name}: token {first} of the response, id {ids[first]}, spells nothing")
        spelled = b"".join(piece or b"" for piece in pieces)
        return spelled.removeprefix(b" ") if self._has_dummy_space else spelled

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt in the model's own chat template, up to where the response begins.

        Without a template: BOS if the tokenizer adds one, the contents joined by a blank line, a newline.

        Raises ValueError when the template refuses the messages.
        """
        if not messages:
            raise ValueError(f"{self.name}: a prompt needs at least one message")
        if self.hf.chat_template is None:
            text = "\n\n".join(message.content for message in messages) + "\n"
            return ([self.special_roles["bos"]] if self.adds_bos else []) + self._ids(text)
        text = self._render([(message.role, message.content) for message in messages], generation=True)
        return list(self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def special_roles(self) -> dict[str, int]:
        """Ids by role: `bos`, `eos`, `pad`, `end_of_turn`; a role that the tokenizer lacks is absent."""
        ids = {"bos": self.hf.bos_token_id, "eos": self.hf.eos_token_id, "pad": self.hf.pad_token_id}
        roles = {role: int(token_id) for role, token_id in ids.items() if token_id is not None}
        end = self._template_end_of_turn()
        if end is not None:
            roles["end_of_turn"] = end
        elif "eos" in roles:
            roles["end_of_turn"] = roles["eos"]
        return roles

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends a response: the first special token after an answer in the own template, else eos."""
        if "end_of_turn" not in self.special_roles:
            raise ValueError(f"{self.name}: no chat template and no eos_token; set eos_token in tokenizer_config.json")
        return self.special_roles["end_of_turn"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides ids, bytes and roles: tokenizer.json, the chat template, the special tokens."""
        content = {"tokenizer": self.vocabulary, "template": self.hf.chat_template, "roles": self.special_roles}
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    @cached_property
    def vocabulary(self) -> str:
        """SHA-256 (hex) of what decides ids and bytes alone: equal where two models tokenise every text alike."""
        spec = {key: value for key, value in self._spec.items() if key not in ("truncation", "padding")}
        return hashlib.sha256(json.dumps(spec, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _spell(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes[i] or b"" for i in ids)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS before a text."""
        ids = self.hf.backend_tokenizer.encode("a", add_special_tokens=True).ids
        return self.hf.bos_token_id is not None and bool(ids) and ids[0] == self.hf.bos_token_id

    def _render(self, turns: Sequence[tuple[str, str]], *, generation: bool) -> str:
        chat = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(self.hf.apply_chat_template(chat, add_generation_prompt=generation, tokenize=False))
        except TemplateError as error:
            roles = [role for role, _ in turns]
            raise ValueError(f"{self.name}: the chat template refuses a prompt with roles {roles}: {error}") from error

    def _template_end_of_turn(self) -> int | None:
        if self.hf.chat_template is None:
            return None
        text = self._render([("user", "a"), ("assistant", SENTINEL)], generation=False)
        if SENTINEL not in text:
            raise ValueError(f"{self.name}: the chat template drops the assistant's content")
        tail = text[text.rindex(SENTINEL) + len(SENTINEL) :]
        special = {token["id"] for token in self._spec["added_tokens"] if token["special"]}
        ids = self.hf.backend_tokenizer.encode(tail, add_special_tokens=False).ids
        return next((i for i in ids if i in special), None)

    def _reason(self, ids: list[int], pieces: list[bytes | None], spelled: bytes, expected: bytes) -> str:
        if None in pieces:
            first = pieces.index(None)
            at = sum(len(piece or b"") for piece in pieces[:first])
            return f"token {first} near byte {at} is {self._backend.id_to_token(ids[first])!r}, which spells nothing"
        if self._has_dummy_space:
            spelled = spelled.removeprefix(b" ")
        pairs = zip(spelled, expected, strict=False)
        at = next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(spelled), len(expected)))
        near, got = expected[max(at - 8, 0) : at + 8], spelled[max(at - 8, 0) : at + 8]
        return f"the tokens do not spell the text at byte {at}: text {near!r}, tokens {got!r}"


def load_tokenizer(path_or_name: str, *, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer from a folder or the Hub: its `tokenizer.json`, or what Transformers converts to one.

    Code from the Hub is never run. Raises ValueError when there is no fast tokenizer to read at `path_or_name`.
    """
    name = str(path_or_name)
    try:
        if cached_file(name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False):
            hf = PreTrainedTokenizerFast.from_pretrained(name, revision=revision)
        else:  # older repositories hold vocab.json and merges.txt, or a SentencePiece model
            hf = transformers.AutoTokenizer.from_pretrained(
                name, revision=revision, use_fast=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be read at {name!r}: {error}") from error
    if not isinstance(hf, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer at {name!r} has no fast version ({type(hf).__name__}); convert it first")
    return Tokenizer(hf, str(path_or_name))


def check_lossless(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that loses text by design: WordPiece, word-level, lower-casing or NMT-normalising ones.

    Raises ValueError that names the tokenizer and the reason.
    """
    reason = _lossy_reason(tokenizer._spec)
    if reason is not None:
        raise ValueError(f"tokenizer {tokenizer.name!r} loses text by design ({reason}): choose a byte-exact one")


def _lossy_reason(spec: dict[str, Any]) -> str | None:
    if spec["model"]["type"] in ("WordPiece", "WordLevel"):
        return f"{spec['model']['type']} drops white space and unknown words"
    lossy = {"Precompiled", "Nmt", "BertNormalizer", "Lowercase", "StripAccents", "Strip", "NFKC", "NFKD", "NFD"}
    found = sorted(lossy & {part["type"] for part in _parts(spec["normalizer"])})
    if found:
        return f"its normalizer has {', '.join(found)}"
    splits = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer", "CharDelimiterSplit"}
    found = sorted(splits & {part["type"] for part in _parts(spec["pre_tokenizer"])})
    return f"its pre-tokenizer has {', '.join(found)}, which drops white space" if found else None


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a flat list of its parts."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    children = next(value for key, value in node.items() if key != "type")
    return [part for child in children for part in _parts(child)]


def _plain_backend(backend: Backend) -> Backend:
    """A private copy without truncation and padding that reads special tokens in a text as text."""
    copy = Backend.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}


def _all_token_bytes(spec: dict[str, Any], backend: Backend) -> list[bytes | None]:
    vocab = backend.get_vocab(with_added_tokens=True)
    added = {token["id"]: token for token in spec["added_tokens"]}
    byte_level = any(part["type"] == "ByteLevel" for key in ("decoder", "pre_tokenizer") for part in _parts(spec[key]))
    fallback = _has_byte_fallback(spec)
    unknown = _unknown_id(spec, vocab)
    alphabet = _byte_alphabet()
    out: list[bytes | None] = [None] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        if token_id in added:
            out[token_id] = None if added[token_id]["special"] else _literal(token, not byte_level)
        elif token_id == unknown:
            continue
        elif byte_level:
            out[token_id] = bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else None
        elif fallback and _is_byte_token(token):
            out[token_id] = bytes([int(token[3:5], 16)])
        else:
            out[token_id] = _literal(token, True)
    return out


def _unknown_id(spec: dict[str, Any], vocab: dict[str, int]) -> int | None:
    model = spec["model"]
    return model.get("unk_id") if model["type"] == "Unigram" else vocab.get(model.get("unk_token") or "")


def _literal(token: str, space_mark: bool) -> bytes:
    return (token.replace(SPACE_MARK, " ") if space_mark else token).encode("utf-8")


def _has_byte_fallback(spec: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteFallback" for part in _parts(spec["decoder"]))


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
