"""The student as others use it: an ordinary Hugging Face folder that says where it comes from (layer 2)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cdm import parts
from cdm.adapters import merged
from cdm.config_models import Lora
from cdm.tokenizers import PLAIN_TEMPLATE, Tokenizer, load_tokenizer

ABOUT = "cdm.json"


def export_student(
    model: Any,
    tokenizer: str,
    revision: str | None,
    folder: str,
    *,
    lora: Lora | None,
    about: Mapping[str, Any],
) -> None:
    """Gathers the weights and writes them, adapters merged, with tokenizer, generation config, card and `cdm.json`.

    model: a `StudentModel`. Whole or not at all, and a folder that was there is replaced. Collective.
    """
    gathered: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        weights = merged({name.removeprefix("model."): value for name, value in gathered.items()}, lora)
        unfinished = Path(f"{folder}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        loaded = load_tokenizer(tokenizer, revision=revision)
        set_generation(model.model, loaded)
        model.model.save_pretrained(unfinished, state_dict=weights)
        save_tokenizer(loaded, unfinished)
        (unfinished / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(model_card(Path(folder).name, about), encoding="utf-8")
        for file in unfinished.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.replace(unfinished, folder)
        parts.fsync_folder(str(Path(folder).parent))
    dist.barrier()


def read_about(folder: str) -> dict[str, Any]:
    """How an exported student was made."""
    return json.loads((Path(folder) / ABOUT).read_text(encoding="utf-8"))


def keep_about(folder: str) -> None:
    """Leaves nothing of an exported student but how it was made."""
    for file in Path(folder).iterdir():
        if file.name != ABOUT:
            file.unlink()


def set_generation(model: Any, tokenizer: Tokenizer) -> None:
    """A response ends where the student was taught to end it, besides where the model's own settings say."""
    settings, roles = model.generation_config, tokenizer.special_roles
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    known = {token for token in (*ends, roles.get("eos"), tokenizer.end_of_turn_id) if token is not None}
    settings.eos_token_id = sorted(known)
    if settings.pad_token_id is None:
        settings.pad_token_id = roles.get("pad", tokenizer.end_of_turn_id)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """With the chat template that prompts were rendered in; one that says so where the model had none."""
    tokenizer.hf.save_pretrained(folder)
    if tokenizer.hf.chat_template is None:
        bos = "{{ bos_token }}" if tokenizer.adds_bos else ""
        (folder / "chat_template.jinja").write_text(bos + PLAIN_TEMPLATE, encoding="utf-8")


# --- lineage -----------------------------------------------------------------------------------------------------


def lineage(aligned: str, shards: Sequence[str]) -> dict[str, Any]:
    """What a student was made from: fingerprints of corpus and alignment, and what every teacher was asked."""
    manifest = parts.read_manifest(aligned)
    kept = ("teacher", "teacher_identity", "engine", "dtype", "k", "top_mass", "max_length")
    metas = [parts.read_manifest(folder).meta for folder in shards]
    return {
        "corpus": manifest.meta.get("corpus"),
        "aligned": manifest.fingerprint,
        "teachers": [{name: meta[name] for name in kept if name in meta} for meta in metas],
    }


def model_card(name: str, about: Mapping[str, Any]) -> str:
    """The README.md of a student's folder."""
    origin = about["lineage"]
    head = {"library_name": "transformers", "tags": ["cdm", "distillation"], "base_model": about["from"]}
    front = [f"{key}: {json.dumps(value)}" for key, value in head.items() if not os.path.isabs(str(value))]
    facts = {
        "student before": about["from"],
        "teachers": ", ".join(teacher["teacher"] for teacher in origin["teachers"] if "teacher" in teacher) or "none",
        "method": ", ".join(f"{key} {value}" for key, value in about["method"].items()),
        "steps": f"{about['steps']:,}" + (f", exported: {about['step']:,}" if about["step"] != about["steps"] else ""),
        "training seconds": f"{about['seconds']:,.1f}",
        "corpus": origin["corpus"],
        "alignment": origin["aligned"],
        **{key.replace("_", " "): f"{value:.4f}" for key, value in about["figures"].items()},
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    text = [
        "---",
        *front,
        "---",
        "",
        f"# {name}",
        "",
        "A student distilled by `cdm`. The same, for machines: `cdm.json`.",
    ]
    return "\n".join([*text, "", "| | |", "|---|---|", *rows, ""])
