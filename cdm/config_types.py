"""What the sections of a config are made of: a strict base and the types of values (layer 0)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Split = Annotated[float, Field(gt=0, lt=1)]
Mass = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """A section of the config: unknown keys are errors, values never change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _existing(path: str) -> str:
    if "://" not in path and not Path(path).expanduser().exists():
        raise ValueError(f"no such file or folder: {path}")
    return path


def _folder(path: str) -> str:
    if "://" in path:
        raise ValueError("must be a folder that every node mounts, not a URL")
    return path


def _hub_or_folder(name: str) -> str:
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return os.path.expanduser(_existing(name)) if looks_local else name


def dotted_function(name: str) -> str:
    module, colon, function = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), function]):
        raise ValueError(f"expected module:function, got {name!r}")
    return name


Folder = Annotated[str, AfterValidator(_folder)]
ExistingPath = Annotated[str, AfterValidator(_existing)]
HubOrFolder = Annotated[str, AfterValidator(_hub_or_folder)]
