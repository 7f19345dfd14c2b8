"""Whether a response is acceptable for its prompt's task: what generated responses must pass (layer 2).

A check is a function of (prompt, response, metadata); it may raise DroppedError with another reason than check_failed.
Code that a model wrote is never run here: a check that does would be one more entry of CHECKS, around `cdm.sandbox`.
"""

from __future__ import annotations

import hashlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from cdm.documents import DroppedError
from cdm.records import Message

Check = Callable[[Sequence[Message], str, Mapping[str, str]], bool]

# A minus is a sign where nothing that could be subtracted from stands before it.
_NUMBER = re.compile(r"(?:(?<![\w).])-)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_MARK = "####"  # what follows it is the answer, in GSM8K and its kind


def make_check(section: Mapping[str, Any] | None) -> Check:
    """The check that a config's section asks for; without one everything passes.

    Raises ValueError naming a function that cannot be imported.
    """
    if section is None:
        return lambda prompt, response, metadata: True
    options = dict(section)
    return CHECKS[options.pop("type")](**options)


def check_identity(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The section, and of a user's function the source file's hex sha256: an edited check is another check."""
    if section is None or section["type"] != "function":
        return None if section is None else dict(section)
    _load(section["name"])
    file = sys.modules[section["name"].partition(":")[0]].__file__
    source = Path(file).read_bytes() if file else b""
    return {**section, "sha256": hashlib.sha256(source).hexdigest()}


def check_problems(section: Mapping[str, Any]) -> list[str]:
    """Why a check cannot be loaded here; empty where it can."""
    try:
        make_check(section)
    except ValueError as error:
        return [str(error)]
    return []


def final_number(text: str) -> Decimal | None:
    """The first number after the last "####", where there is such a mark, else the last number; None without one.

    Thousands may be separated by commas.
    """
    _, mark, answer = text.rpartition(_MARK)
    found = _NUMBER.findall(answer)
    if not found:
        return None
    return Decimal((found[0] if mark else found[-1]).replace(",", ""))


def _final_number_check(reference: str) -> Check:
    def check(prompt: Sequence[Message], response: str, metadata: Mapping[str, str]) -> bool:
        wanted = final_number(metadata[reference])
        if wanted is None:
            raise DroppedError("no_reference")
        return final_number(response) == wanted

    return check


def _function_check(name: str) -> Check:
    function = _load(name)

    def check(prompt: Sequence[Message], response: str, metadata: Mapping[str, str]) -> bool:
        passed = function(prompt, response, metadata)
        if not isinstance(passed, bool):
            raise ValueError(f"generation.check: {name} returned {passed!r}, expected true or false")
        return passed

    return check


def _load(name: str) -> Callable[..., Any]:
    """A function by `module:function`, looked for in the working directory too."""
    module, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = pkgutil.resolve_name(name)
    except ImportError as error:
        raise ValueError(f"generation.check: cannot import {module}: {error}; is it on PYTHONPATH?") from error
    except AttributeError as error:
        raise ValueError(f"generation.check: {module} has no function {function_name!r}") from error
    if not callable(function):
        raise ValueError(f"generation.check: {name} is no function")
    return function


CHECKS: dict[str, Callable[..., Check]] = {"final_number": _final_number_check, "function": _function_check}
