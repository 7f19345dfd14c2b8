"""A row of a source -> a Document, or the reason why it is none (layer 2)."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Any, Literal

from cdm import sources
from cdm.config_corpus import Corpus, Fields
from cdm.records import Document, Message

ID_LENGTH = 32  # hex digits: 128 bits
# Names of the turns' fields and roles in the two chat formats in use: {role, content} and ShareGPT's {from, value}.
_TURN_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}

Replace = Literal["missing", "all"]  # which responses a later stage generates


class DroppedError(Exception):
    """A row that is no document; the argument is the reason that is counted."""


def document_id(prompt: tuple[Message, ...], response: str) -> str:
    """Hash of the canonical JSON of prompt and response. Raises UnicodeEncodeError where a text is no Unicode text."""
    content = [[[message.role, message.content] for message in prompt], response]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def document_of(config: Corpus, replace: Replace | None, where: str, row: sources.Row) -> Document:
    """A row as a document. Raises DroppedError with the reason, ValueError where a column holds no text."""
    prompt, response = _prompt_and_response(config, replace, where, row)
    if isinstance(config, Fields) and config.system and all(message.role != "system" for message in prompt):
        prompt = (Message("system", unicodedata.normalize("NFC", config.system)), *prompt)
    if not any(message.content.strip() for message in prompt if message.role != "system"):
        raise DroppedError("empty_prompt")
    try:
        missing = replace is not None and not response.strip()
        problem = None if missing else size_problem(response, config.min_response_bytes, config.max_response_bytes)
        if missing or (problem and replace == "all"):
            response, problem = "", None
        document = Document(document_id(prompt, response), prompt, response, _metadata(config, row))
    except UnicodeEncodeError as error:
        raise DroppedError("not_unicode") from error  # a lone surrogate, which JSON can spell
    if problem is not None:
        raise DroppedError(problem)
    return document


def size_problem(response: str, min_bytes: int, max_bytes: int) -> str | None:
    """`too_short` or `too_long` for a response out of these bounds."""
    size = len(response.encode())
    if size < min_bytes:
        return "too_short"
    return "too_long" if size > max_bytes else None


def _prompt_and_response(
    config: Corpus, replace: Replace | None, where: str, row: sources.Row
) -> tuple[tuple[Message, ...], str]:
    if isinstance(config, Fields) and config.messages:
        return _split_turns(row[config.messages], where, config.messages, replace)
    names = (config.prompt, config.response) if isinstance(config, Fields) else ("prompt", "response")
    asked, response = ("" if name is None else _text(row[name], where, name) for name in names)
    return (Message("user", asked),), response


def _metadata(config: Corpus, row: sources.Row) -> dict[str, str]:
    """Columns as text: what is no text is JSON."""
    if not isinstance(config, Fields):
        return row["metadata"]
    values = {name: row[name] for name in config.metadata}
    texts = {name: v if isinstance(v, str) else json.dumps(v, default=str) for name, v in values.items()}
    "".join(texts.values()).encode()  # raises where one is no Unicode
    return texts


def _text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {type(value).__name__}, expected text")
    return unicodedata.normalize("NFC", value)


def _split_turns(turns: Any, where: str, column: str, replace: Replace | None) -> tuple[tuple[Message, ...], str]:
    """Chat turns -> what precedes the last assistant turn, and that turn.

    Where responses are generated, turns that do not end with the assistant's are a prompt that lacks one.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: column {column!r} holds {type(turns).__name__}, expected a list of chat turns")
    messages = [_message(turn, where, column) for turn in turns]
    if replace is not None and messages and messages[-1].role != "assistant":
        return tuple(messages), ""
    last = max((place for place, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        raise DroppedError("no_assistant_turn")
    return tuple(messages[:last]), messages[last].content


def _message(turn: dict[str, Any], where: str, column: str) -> Message:
    for role_key, content_key in _TURN_KEYS:
        if role_key in turn and content_key in turn:
            role = _ROLES.get(turn[role_key])
            if role is None:
                raise DroppedError("unknown_role")
            return Message(role, _text(turn[content_key], where, f"{column}.{content_key}"))
    raise ValueError(f"{where}: a turn in {column!r} has keys {sorted(turn)}, expected role and content")
