"""What is wrong with a config or an override, in the words of the person who wrote it (layer 0).

pydantic says where in the models a value failed; a user wants the key as it stands in the YAML file, and what to write.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

NEAR = 0.75  # of difflib's ratio: below it a suggestion is more often wrong than right
SHOWN_CHARACTERS = 60

_EXPECTED = {
    "bool": "true or false",
    "dict": "a mapping of keys",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "a mapping of keys",
    "string": "text",
}


class ConfigError(ValueError):
    """Everything that is wrong with a config, one problem a line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def describe(problem: ErrorDetails, root: type[BaseModel]) -> str:
    """One line for one pydantic problem: the key as the user wrote it, what is wrong, what it could be."""
    path, section = _locate(problem["loc"], root)
    key = ".".join(map(str, path)) or "config"
    kind, context, given = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden" and section is not None:
        return f"{key}: unknown key{_instead(str(path[-1]), section)}"
    if kind == "missing":
        return f"{key}: missing"
    if kind.startswith("union_tag"):
        return _wrong_type_key(key, given, context)
    if kind == "value_error":
        return f"{key}: {context['error']}"
    expected = _EXPECTED.get(kind.split("_")[0]) if kind.endswith(("_type", "_parsing", "_from_float")) else None
    if expected is not None:
        return f"{key}: expected {expected}, got {_shown(given)}"
    if kind == "literal_error":
        return f"{key}: {_shown(given)} is not known; one of {_listed(context['expected'])}"
    if kind == "too_short":
        return f"{key}: expected at least {context['min_length']}, got {context['actual_length']}"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{key}: {message.replace('input should be', 'must be')}, got {_shown(given)}"


def _instead(unknown: str, section: type[BaseModel]) -> str:
    known = list(section.model_fields)
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=NEAR)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"


def _wrong_type_key(key: str, given: Any, context: Mapping[str, Any]) -> str:
    """A union's `type` that is absent or unknown, or a value that has no keys at all."""
    if not isinstance(given, Mapping):
        return f"{key}: expected a mapping of keys, got {_shown(given)}"
    if "type" not in given:
        return f"{key}.type: missing"
    known = f"; one of {_listed(context['expected_tags'])}" if "expected_tags" in context else ""
    return f"{key}.type: {_shown(given['type'])} is not known{known}"


def _listed(quoted: str) -> str:
    """pydantic's "'a', 'b' or 'c'" as a, b, c."""
    return quoted.replace(" or ", ", ").replace("'", "")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


# --- where -------------------------------------------------------------------------------------------------------


def _locate(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[int | str], type[BaseModel] | None]:
    """The user's path to a problem (pydantic adds the tags of unions to it) and the section that its last key is of."""
    path: list[int | str] = []
    annotation: Any = root
    section: type[BaseModel] | None = None
    for step in loc:
        variants = _variants(annotation)
        if len(variants) > 1 and step in variants:
            annotation = variants[step]
            continue
        path.append(step)
        section = next(iter(_models(annotation)), None)
        annotation = _below(annotation, step)
    return path, section


def _below(annotation: Any, step: int | str) -> Any:
    """The annotation of a key of a section, or of an item of a list or mapping."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel) and step in member.model_fields:
            return member.model_fields[str(step)].annotation
        if get_origin(member) in (list, dict):
            return get_args(member)[-1]
    return None


def _variants(annotation: Any) -> dict[int | str, type[BaseModel]]:
    """`type` -> section, of a union of sections."""
    sections = [section for section in _models(annotation) if "type" in section.model_fields]
    return {tag: section for section in sections for tag in get_args(section.model_fields["type"].annotation)}


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]


def _members(annotation: Any) -> list[Any]:
    """The types of a union, through Annotated; a list of itself for anything else."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


# --- overrides ---------------------------------------------------------------------------------------------------


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put `a.b=c` into plain values; c is YAML, a number is a position in a list. Raises ConfigError naming the key."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError([f"--set {override}: expected KEY=VALUE, for instance student.learning_rate=1e-4"])
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"--set {key}: not a YAML value: {text}"]) from error
    put(values, key, value, f"--set {key}")


def put(values: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Put a value at a dotted key of plain values. Raises ConfigError, which begins with `said`."""
    node: Any = values
    names = key.split(".")
    for depth, name in enumerate(names[:-1], start=1):
        node = node[_index(node, name, said)] if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise ConfigError([f"{said}: {'.'.join(names[:depth])} is a value, it has no keys below it"])
    node[_index(node, names[-1], said) if isinstance(node, list) else names[-1]] = value


def _index(node: list[Any], name: str, said: str) -> int:
    if not name.isdecimal() or int(name) >= len(node):
        positions = f"0 to {len(node) - 1}" if node else "none: the list is empty"
        raise ConfigError([f"{said}: {name} is no position of the list ({positions})"])
    return int(name)
