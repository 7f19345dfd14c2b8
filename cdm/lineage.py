"""What an artefact was made from and what was made from it, read off the storage folder: no server is asked (layer 2).

Every manifest and every `cdm.json` names what went into it, by fingerprint, by identity or by path; the runs' logs say
which run did it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from cdm import parts
from cdm.journal import RunFacts, run_facts, run_folders

STAGES = ("corpus", "models", "shards", "aligned", "students")
MADE_TAGS = ("cdm.corpus", "cdm.shards", "cdm.export")  # of a run: the folder that it made


@dataclass(frozen=True)
class Artefact:
    """A finished folder of a stage, or a model from elsewhere (without a folder). `name` is <stage>/<folder>."""

    name: str
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)


class Lineage:
    """All artefacts of a storage folder and who was made from whom."""

    def __init__(self, storage: str) -> None:
        self.storage = Path(storage).expanduser().resolve()
        self.artefacts = {one.name: one for one in self._found()}

    def _found(self) -> Iterator[Artefact]:
        for stage in STAGES:
            for folder in sorted((self.storage / stage).glob("*")):
                if parts.is_finished(str(folder)):
                    manifest = parts.read_manifest(str(folder))
                    yield Artefact(f"{stage}/{folder.name}", manifest.meta | {"fingerprint": manifest.fingerprint})
                elif (folder / "config.json").exists() and not folder.name.endswith(".unfinished"):
                    yield Artefact(f"{stage}/{folder.name}", _how_it_was_made(folder))

    @cached_property
    def made_from(self) -> dict[str, list[str]]:
        """The names of what went into each artefact."""
        by_fingerprint = {one.about["fingerprint"]: name for name, one in self.artefacts.items() if _is_parts(one)}
        found = {}
        for name, artefact in self.artefacts.items():
            texts = list(_texts({key: value for key, value in artefact.about.items() if key != "fingerprint"}))
            sources = [by_fingerprint.get(text) or self._by_path(text) for text in texts]
            sources.append(self._model(artefact.about))
            found[name] = [source for source in dict.fromkeys(sources) if source and source != name]
        return found

    @cached_property
    def made_into(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, sources in self.made_from.items():
            for source in sources:
                found.setdefault(source, []).append(name)
        return found

    def _by_path(self, text: str) -> str | None:
        """An artefact by a path that was absolute where it was made: the storage folder may have moved since."""
        name = "/".join(text.rsplit("/", 2)[-2:])
        return name if text.startswith("/") and name in self.artefacts else None

    def _model(self, about: Mapping[str, Any]) -> str | None:
        """The model that scored or generated: a folder of this storage, else its name elsewhere."""
        given = about.get("generation", about)
        identity, model = (given.get(key) for key in _identity_keys(given))
        if identity is None or model is None:
            return None
        from cdm.models import model_identity  # loads transformers

        for name in self.artefacts:
            stage, folder = name.split("/", 1)
            local = stage in ("models", "students") and folder.startswith(Path(str(model)).name)
            if local and model_identity(str(self.storage / name)) == identity:
                return name
        return str(identity if "@" in str(identity) else model)

    # --- what a person names

    def resolve(self, what: str) -> str:
        """The artefact of a path, or the one that a run made: by its name, its log's folder or its id in MLflow.

        Raises ValueError where there is none.
        """
        path = Path(what).expanduser().resolve()
        inside = path.relative_to(self.storage).parts if path.is_relative_to(self.storage) else ()
        if "/".join(inside[:2]) in self.artefacts:
            return "/".join(inside[:2])
        for facts in self.runs:
            if what in (facts.run.get("name"), Path(facts.folder).name, *_server_ids(facts.folder)):
                made = [self._by_path(facts.tags[tag]) for tag in MADE_TAGS if tag in facts.tags]
                if made and made[0]:
                    return made[0]
        raise ValueError(f"{what}: neither a finished folder of {self.storage} nor a run that made one")

    @cached_property
    def runs(self) -> list[RunFacts]:
        return [run_facts(folder) for folder in run_folders(str(self.storage))]

    def made_by(self, name: str) -> RunFacts | None:
        paths = (facts for facts in self.runs if any(self._by_path(facts.tags.get(t, "")) == name for t in MADE_TAGS))
        return next(paths, None)


def _how_it_was_made(model: Path) -> dict[str, Any]:
    file = model / "cdm.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _identity_keys(about: Mapping[str, Any]) -> tuple[str, str]:
    return ("teacher_identity", "teacher") if "teacher_identity" in about else ("model_identity", "model")


def _is_parts(artefact: Artefact) -> bool:
    return "fingerprint" in artefact.about


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain nested values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _server_ids(folder: str) -> list[str]:
    return [json.loads(file.read_text(encoding="utf-8"))["run_id"] for file in Path(folder).glob("sent-*.json")]


def storage_of(path: str) -> str | None:
    """The storage folder that a path lies in: the one above the innermost stage's folder."""
    whole = Path(path).expanduser().resolve()
    return next((str(above.parent) for above in (whole, *whole.parents) if above.name in STAGES), None)


# --- printing ----------------------------------------------------------------------------------------------------


def print_lineage(lineage: Lineage, name: str, console: Console) -> None:
    """Two trees: what it was made from, down to the first sources, and all that was made from it."""
    for title, below in (("made from", lineage.made_from), ("made into", lineage.made_into)):
        tree = Tree(Text(title, "dim"))
        _grow(tree.add(_line(lineage, name)), lineage, name, below.get)
        console.print(tree)


def _grow(tree: Tree, lineage: Lineage, name: str, below: Callable[[str], list[str] | None]) -> None:
    for other in below(name) or []:
        _grow(tree.add(_line(lineage, other)), lineage, other, below)


def _line(lineage: Lineage, name: str) -> Text:
    line = Text(name, "bold" if name in lineage.artefacts else "")
    if name not in lineage.artefacts:
        return line.append("  a model from elsewhere", "dim")
    about, run = lineage.artefacts[name].about, lineage.made_by(name)
    method = about.get("method")
    facts = [method["type"] if isinstance(method, Mapping) else None]
    facts += [f"{about['steps']} steps" if "steps" in about else None]
    facts += [f"run {run.run['name']}, {run.status}" if run else None]
    if run and "cdm.commit" in run.tags:
        facts.append(
            f"commit {run.tags['cdm.commit'][:10]}{' with changes' if run.tags['cdm.dirty'] == 'true' else ''}"
        )
    said = ", ".join(fact for fact in facts if fact)
    return line.append(f"  {said}", "dim") if said else line
