"""What is at a path: a stage's folder or one of its parts, a model, a checkpoint, a run, a storage folder (layer 2).

Nothing is run and nothing is changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
from rich.table import Table
from rich.text import Text

from cdm import parts
from cdm.inspection_parts import folders_in, show_parts
from cdm.progress import console
from cdm.text_view import bytes_text, print_facts

STAGES = ("corpus", "models", "shards", "aligned", "maps", "students", "runs", "reports")
EXPECTED = (
    "expected a corpus, shards or aligned folder or a part of one, a model folder, a checkpoint or run folder, "
    "or a storage folder"
)


def inspect_path(path: str, rows: int = 3) -> None:
    """Print what is at `path`, with `rows` documents where it holds documents.

    Raises ValueError where there is nothing, or nothing that a stage of this project writes.
    """
    path = path.rstrip("/") or "/"
    names = _names(path)
    kind = _kind(path)
    if path.endswith(".parquet"):
        folder, _, name = path.rpartition("/")
        show_parts(folder or ".", name, rows)
    elif kind == "parts":
        show_parts(path, None, rows)
    elif kind == "model":
        _show_model(_local(path))
    elif kind == "checkpoint":
        _show_checkpoint(_local(path))
    elif kind == "run":
        _show_run(_local(path))
    elif names & set(STAGES):
        _show_storage(path, [stage for stage in STAGES if stage in names])
    elif any(_kind(folder) for folder in folders_in(path)):
        _show_storage(path, [""])
    else:
        raise ValueError(f"{path}: {EXPECTED}; here are {', '.join(sorted(names)[:5]) or 'no files'}")


def _kind(path: str) -> str | None:
    """What a folder is, by the names in it."""
    names = _names(path)
    if parts.MANIFEST in names or any(name.endswith(".parquet") for name in names):
        return "parts"
    if "config.json" in names:
        return "model"
    if ".metadata" in names:
        return "checkpoint"
    return "run" if _checkpoints(path) else None


def _checkpoints(path: str) -> list[str]:
    """The names of the checkpoints in a run's folder, the oldest first."""
    folders = [folder for folder in folders_in(path) if PurePosixPath(folder).name.startswith("step_")]
    return [PurePosixPath(folder).name for folder in folders if ".metadata" in _names(folder)]


# --- models ------------------------------------------------------------------------------------------------------


def _show_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    facts = {"architecture": ", ".join(config.get("architectures") or [])}
    facts |= {key: config[key] for key in keys if key in config}
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        count, dtypes = _parameters(weights)
        facts |= {"parameters": f"{count:,} ({', '.join(sorted(dtypes))})"}
    facts["size"] = bytes_text(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    print_facts(f"model: {folder}", facts)
    if (folder / "tokenizer.json").is_file():
        print_facts("tokenizer", _about_tokenizer(folder))
    about = folder / "cdm.json"
    if about.is_file():
        print_facts("how it was made (cdm.json)", json.loads(about.read_text(encoding="utf-8")))


def _parameters(files: Iterable[Path]) -> tuple[int, set[str]]:
    """Stored numbers and their types, from the headers alone."""
    from safetensors import safe_open

    count, dtypes = 0, set()
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_slice(name)
                count += int(np.prod(tensor.get_shape(), dtype=np.int64))
                dtypes.add(tensor.get_dtype())
    return count, dtypes


def _about_tokenizer(folder: Path) -> dict[str, Any]:
    from cdm.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    decoder = spec["decoder"] or {}
    decoders = [part["type"] for part in decoder.get("decoders", [decoder]) if part]
    roles = {
        role: f"{token_id} {tokenizer.hf.convert_ids_to_tokens(token_id)}"
        for role, token_id in tokenizer.special_roles.items()
    }
    return {
        "type": f"{spec['model']['type']}, decoded by {', '.join(decoders) or 'nothing'}",
        "ids": f"{tokenizer.vocab_size:,}",
        "chat template": "yes" if tokenizer.hf.chat_template else "no",
        **roles,
        "fingerprint": tokenizer.fingerprint,
    }


# --- checkpoints and runs ----------------------------------------------------------------------------------------


def _show_checkpoint(folder: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    groups: dict[str, list[TensorStorageMetadata]] = {}
    for name, entry in tensors.items():
        groups.setdefault(".".join(name.split(".")[:2]), []).append(entry)
    files = sorted(folder.glob("*.distcp"))
    facts = {
        "step": int(folder.name.removeprefix("step_")) if folder.name.startswith("step_") else "",
        "ranks": len({file.name.split("_")[2] for file in files}),
        "files": f"{len(files)}, {bytes_text(sum(file.stat().st_size for file in files))}",
        "other values": ", ".join(sorted(set(stored) - set(tensors))),
    }
    for name, entries in groups.items():
        numbers = sum(entry.size.numel() for entry in entries)
        dtypes = sorted({str(entry.properties.dtype).removeprefix("torch.") for entry in entries})
        facts[name] = f"{len(entries)} tensors, {numbers:,} numbers ({', '.join(dtypes)})"
    print_facts(f"checkpoint: {folder}", facts)


def _show_run(folder: Path) -> None:
    names = _checkpoints(str(folder))
    print_facts(f"run: {folder}", {"checkpoints": ", ".join(names), "size": bytes_text(_tree_size(str(folder)))})
    _show_checkpoint(folder / names[-1])


# --- storage -----------------------------------------------------------------------------------------------------


def _show_storage(path: str, stages: list[str]) -> None:
    """A line for each thing in the stages' folders ("": in `path` itself)."""
    table = Table(title=Text(f"storage: {path}", "bold"), title_justify="left")
    for column in ("stage", "name", "state", "holds", "size"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for stage in stages:
        where = f"{path}/{stage}" if stage else path
        for name in sorted(name for name in _names(where) if not name.startswith(".")):
            state, holds = _state(f"{where}/{name}")
            table.add_row(*map(Text, (stage, name, state, holds, bytes_text(_tree_size(f"{where}/{name}")))))
    console.print(table)


def _state(path: str) -> tuple[str, str]:
    """(finished or not, what it holds) of one thing in a storage folder."""
    kind = _kind(path)
    if kind == "parts" and parts.is_finished(path):
        manifest = parts.read_manifest(path)
        return "finished", f"{manifest.rows:,} documents in {len(manifest.parts)} parts"
    if kind == "parts":
        return "unfinished", f"{len(parts.list_parts(path))} parts"
    if kind == "run":
        return "", f"checkpoints {', '.join(_checkpoints(path))}"
    if path.endswith(".unfinished"):
        return "unfinished", ""
    return ("finished", "a model") if kind == "model" else ("", "")


# --- files -------------------------------------------------------------------------------------------------------


def _names(path: str) -> set[str]:
    """The names in a folder; of a file none. Raises ValueError where there is neither."""
    fs, root = fsspec.core.url_to_fs(path)
    if not fs.exists(root):
        raise ValueError(f"{path}: no such file or folder")
    return {PurePosixPath(name).name for name in fs.ls(root, detail=False)} if fs.isdir(root) else set()


def _local(path: str) -> Path:
    local = parts.local_path(path)
    if local is None:
        raise ValueError(f"{path}: models and checkpoints are looked at in a local or mounted folder")
    return Path(local)


def _tree_size(path: str) -> int:
    fs, root = fsspec.core.url_to_fs(path)
    return int(fs.du(root))
