"""Corpora, shards and aligned folders as text: manifests, documents, ranked tokens, alignments (layer 2).

Tokens are shown by the bytes that they add to the text, so no tokenizer is needed, except to spell the ids that a
teacher ranked. What a folder was made from is found by fingerprint, beside it in the same storage folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from cdm import parts, shards
from cdm.corpus import documents_of, read_documents
from cdm.progress import console
from cdm.records import Alignment, Document, ScoredDocument
from cdm.text_view import (
    bytes_text,
    draw_alignment,
    draw_tokens,
    pieces,
    print_facts,
    print_heading,
    short_text,
    visible,
)

if TYPE_CHECKING:
    from cdm.tokenizers import Tokenizer

COLUMNS = {"corpus": "response", "shards": "topk_ids_t", "aligned": "ids_s"}  # a column that no other kind has
TOKENS_SHOWN = 20  # of a document of a shard folder, a line each, and the last
BEST_SHOWN = 5


@dataclass(frozen=True)
class _Opened:
    """A folder of parts: the manifest where there is one, and the parts to look at."""

    folder: str
    kind: str
    manifest: parts.Manifest | None
    names: list[str]


def show_parts(folder: str, name: str | None, rows: int) -> None:
    """Print a folder of parts, or one of them, with `rows` documents of the part (of the first one).

    Raises ValueError where its columns are none that a stage writes.
    """
    names = None if name is None else [name]
    manifest = parts.read_manifest(folder) if parts.is_finished(folder) else None
    chosen = names or (manifest.names if manifest else [n for n in parts.list_parts(folder) if n != shards.QUARANTINE])
    opened = _Opened(folder, _kind_of_part(folder, chosen[0]), manifest, chosen)
    title = f"{opened.kind}: {folder}" if names is None else f"a part of {opened.kind}: {folder}/{names[0]}"
    _show_manifest(title, opened, whole=names is None)
    SHOW[opened.kind](opened, rows)


def _kind_of_part(folder: str, name: str) -> str:
    with parts.open_part(folder, name) as file:
        columns = file.schema_arrow.names
    for kind, column in COLUMNS.items():
        if column in columns:
            return kind
    raise ValueError(
        f"{folder}/{name}: expected a part of a corpus, shards or aligned folder; this one has the columns "
        f"{', '.join(columns)}"
    )


def _show_manifest(title: str, opened: _Opened, *, whole: bool) -> None:
    facts: dict[str, Any] = {}
    if opened.manifest is None:
        facts["state"] = f"unfinished: no {parts.MANIFEST}; the same command goes on from here"
    if opened.manifest is not None and whole:
        facts |= {
            "parts": f"{len(opened.manifest.parts)} ({_by_split(opened.manifest)})",
            "documents": f"{opened.manifest.rows:,}",
            "size": bytes_text(opened.manifest.bytes),
            "fingerprint": opened.manifest.fingerprint,
            **opened.manifest.meta,
        }
    if not whole and opened.manifest is not None:
        part = opened.manifest.part(opened.names[0])
        facts |= {"documents": f"{part.rows:,}", "size": bytes_text(part.bytes), "sha256": part.sha256}
    print_facts(title, facts)


def _by_split(manifest: parts.Manifest) -> str:
    rows: dict[str, int] = {}
    for part in manifest.parts:
        split = part.name.rpartition("-")[0]
        rows[split] = rows.get(split, 0) + part.rows
    return ", ".join(f"{split} {count:,}" for split, count in rows.items())


def _show_corpus(opened: _Opened, rows: int) -> None:
    for document in documents_of(_first_rows(opened.folder, opened.names[0], rows)):
        print_heading(f"document {document.id}", json.dumps(document.metadata, ensure_ascii=False))
        for message in document.prompt:
            console.print(Text(f"{message.role}: ", "bold").append(short_text(message.content), "not bold"))
        console.print(Text("response: ", "bold green").append(short_text(document.response), "not bold default"))


def _first_rows(folder: str, name: str, rows: int) -> pa.Table:
    """The first rows of a part; no more row groups are read than hold them."""
    with parts.open_part(folder, name) as file:
        groups, seen = 0, 0
        while groups < file.num_row_groups and seen < rows:
            seen += file.metadata.row_group(groups).num_rows
            groups += 1
        return file.read_row_groups(list(range(groups))).slice(0, rows)


# --- shards ------------------------------------------------------------------------------------------------------


def _show_shards(opened: _Opened, rows: int) -> None:
    name = opened.names[0]
    footer = shards.read_footer(opened.folder, name)
    documents = shards.read_scores(opened.folder, name)
    if footer.tokens:
        _show_bytes(opened.folder, name, footer.tokens)
    if documents:
        _show_mass(name, documents)
    for document_id, reason in footer.quarantined[:rows]:
        console.print(Text(f"in quarantine: {document_id}: {reason}", "red"))
    tokenizer = _teacher_tokenizer(opened.folder, footer.identity)
    texts = _responses(opened.folder, footer.identity.get("corpus"), name)
    for document in documents[:rows]:
        _show_scores(document, tokenizer, texts.get(document.id))


def _show_bytes(folder: str, name: str, tokens: int) -> None:
    """Where the bytes of a part are."""
    columns = {column: size / tokens for column, size in shards.column_bytes(folder, name).items()}
    ids, logp = (columns[f"{kind}_t"] + columns[f"{kind}_more_t"] for kind in ("topk_ids", "topk_logp"))
    rest = sum(columns.values()) - ids - logp
    console.print(
        f"bytes a token: {ids + logp + rest:,.1f} (top-k ids {ids:.1f}, log-probabilities {logp:.1f}, rest {rest:.1f})"
    )


def _show_mass(name: str, documents: list[ScoredDocument]) -> None:
    """Where the teacher's probability is, over the rows of one part."""
    tail = np.concatenate([d.tail_t for d in documents])
    entropy = np.concatenate([d.entropy_t for d in documents])
    best = np.exp(np.concatenate([d.topk_logp_t[:, 0] for d in documents]).astype(np.float32))
    own = np.concatenate([(d.topk_ids_t == d.ids_t[:, None]).any(1) for d in documents])
    first = np.concatenate([d.topk_ids_t[:, 0] == d.ids_t for d in documents])
    table = Table(title=f"{name}: {len(tail):,} rows, top {documents[0].topk_ids_t.shape[1]}", title_justify="left")
    for column in ("", "mean", "median", "90 %", "99 %"):
        table.add_column(column, justify="right" if column else "left")
    for label, values in (("mass outside the top k", tail), ("entropy (nats)", entropy), ("best probability", best)):
        cells = [values.mean(), *np.percentile(values, (50, 90, 99))]
        table.add_row(label, *(f"{cell:.4f}" for cell in cells))
    console.print(table)
    kept = np.concatenate([(d.topk_ids_t >= 0).sum(1) for d in documents])
    console.print(f"ids kept a row: {kept.mean():.1f} in the mean, {kept.min()} to {kept.max()}")
    console.print(f"the text's token is the best in {first.mean():.1%} of the rows, in the top k in {own.mean():.1%}")


def _show_scores(document: ScoredDocument, tokenizer: Tokenizer | None, text: str | None) -> None:
    state = "cut" if document.truncated else "whole"
    print_heading(f"document {document.id}", f"{len(document.ids_t)} tokens, {state}")
    table = Table(box=None, padding=(0, 1))
    for column, justify in (("token", "left"), ("id", "right"), ("p", "right"), ("entropy", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column(f"the teacher's best {BEST_SHOWN}")
    tokens = None if text is None else pieces(_until(text, document.ends_t), document.ends_t)
    last = len(document.ids_t) - 1
    for n in [*range(min(last, TOKENS_SHOWN)), last]:
        if n == last > TOKENS_SHOWN:
            table.add_row(Text(f"… {last - TOKENS_SHOWN} more", "dim"))
        token_id = int(document.ids_t[n])
        table.add_row(
            Text(tokens[n] if tokens else _spelled(tokenizer, token_id), "green"),
            str(token_id),
            f"{np.exp(document.logp_t[n]):.3f}",
            f"{document.entropy_t[n]:.2f}",
            _best(document, n, tokenizer),
        )
    console.print(table)


def _until(text: str, ends: np.ndarray) -> str:
    """The part of a response that the teacher read: all of it where it was not cut."""
    return text.encode()[: ends[-1]].decode() if len(ends) else ""


def _best(document: ScoredDocument, n: int, tokenizer: Tokenizer | None) -> Text:
    line = Text()
    kept = document.topk_ids_t[n] >= 0
    best = zip(document.topk_ids_t[n, kept], document.topk_logp_t[n, kept], strict=True)
    for token_id, logp in islice(best, BEST_SHOWN):
        style = "bold green" if token_id == document.ids_t[n] else ""
        line.append(_spelled(tokenizer, int(token_id)), style).append(f" {np.exp(np.float32(logp)):.3f}  ", "dim")
    return line


def _spelled(tokenizer: Tokenizer | None, token_id: int) -> str:
    if tokenizer is None or token_id >= tokenizer.vocab_size:  # the latter: a padded row that the teacher believes in
        return f"#{token_id}"
    spelled = tokenizer.token_bytes(token_id)
    if spelled is None:
        return str(tokenizer.hf.convert_ids_to_tokens(token_id))
    return visible(spelled.decode("utf-8", "surrogateescape"))


def _teacher_tokenizer(folder: str, identity: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that the scores were made with: of a model in the storage folder, else by the teacher's name."""
    from cdm.tokenizers import load_tokenizer  # a second or more, and most folders can be shown without

    name, wanted = identity["teacher"], identity["tokenizer_t"]
    named = identity["teacher_identity"].removeprefix(f"{name}@")
    revision = named if named != identity["teacher_identity"] else None
    reason = f"{name} has another tokenizer now"
    beside = (path for path in models_beside(folder) if PurePosixPath(path).name.startswith(PurePosixPath(name).name))
    for candidate in [*beside, name]:
        try:
            tokenizer = load_tokenizer(candidate, revision=revision if candidate == name else None)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            continue
        if tokenizer.fingerprint == wanted:
            return tokenizer
    console.print(Text(f"the teacher's tokenizer cannot be loaded, ids are shown as numbers: {reason}", "yellow"))
    return None


# --- aligned -----------------------------------------------------------------------------------------------------


def _show_aligned(opened: _Opened, rows: int) -> None:
    manifest = opened.manifest
    if manifest is None:
        console.print(
            "the alignment is drawn once the folder is finished: its manifest names the corpus and the shards"
        )
        return
    counts = manifest.meta["counts"]
    if counts["groups"]:
        share = counts["one_to_one"] / counts["groups"]
        console.print(f"{counts['groups']:,} groups, {share:.1%} of them one token each")
    name = opened.names[0]
    documents = _documents(opened.folder, manifest.meta["corpus"], name)
    teachers = [_scores(opened.folder, fingerprint, name) for fingerprint in manifest.meta["shards"]]
    for row in _first_rows(opened.folder, name, rows).to_pylist():
        _show_row(row, documents.get(row["id"]), teachers)


def _show_row(row: dict[str, Any], document: Document | None, teachers: list[list[ScoredDocument] | None]) -> None:
    print_heading(f"document {row['id']}", f"{len(row['prompt_s'])} + {len(row['ids_s'])} tokens of the student")
    if document is None:
        return
    console.print(Text(short_text(document.prompt[-1].content), "dim"))
    tokens_s = pieces(document.response, np.array(row["ends_s"], np.int64))
    if not teachers:
        for line in draw_tokens("s", tokens_s, console.width):
            console.print(line)
    for k, scores in enumerate(teachers):
        if scores is None:
            continue
        if row[f"row_t{k}"] < 0:
            console.print(f"teacher {k}: no scores of this document")
            continue
        scored = scores[row[f"row_t{k}"]]
        alignment = Alignment(np.array(row[f"bounds_s{k}"]), np.array(row[f"bounds_t{k}"]))
        _draw(k, tokens_s, pieces(document.response, scored.ends_t), alignment)


def _draw(k: int, tokens_s: list[str], tokens_t: list[str], alignment: Alignment) -> None:
    groups = len(alignment.bounds_s) - 1
    one_to_one = int(((np.diff(alignment.bounds_s) == 1) & (np.diff(alignment.bounds_t) == 1)).sum())
    console.print(f"teacher {k}: {groups} groups, {one_to_one} of them one token each", style="dim")
    for number, line in enumerate(draw_alignment(tokens_s, tokens_t, alignment, console.width)):
        if number and number % 2 == 0:
            console.print()
        console.print(line)
    left_s, left_t = len(tokens_s) - alignment.bounds_s[-1], len(tokens_t) - alignment.bounds_t[-1]
    if left_s or left_t:
        console.print(f"cut: {left_s} tokens of the student and {left_t} of the teacher are in no group", style="dim")


def _scores(folder: str, fingerprint: str, name: str) -> list[ScoredDocument] | None:
    found = folder_by_fingerprint(folder, "shards", fingerprint)
    return None if found is None else shards.read_scores(found, name)


def _documents(folder: str, fingerprint: str | None, name: str) -> dict[str, Document]:
    found = None if fingerprint is None else folder_by_fingerprint(folder, "corpus", fingerprint)
    return {} if found is None else {document.id: document for document in read_documents(found, name)}


def _responses(folder: str, fingerprint: str | None, name: str) -> dict[str, str]:
    return {name: document.response for name, document in _documents(folder, fingerprint, name).items()}


SHOW: dict[str, Callable[[_Opened, int], None]] = {
    "corpus": _show_corpus,
    "shards": _show_shards,
    "aligned": _show_aligned,
}


def folder_by_fingerprint(folder: str, stage: str, fingerprint: str) -> str | None:
    """The finished folder of another stage of the same storage folder; says so where there is none."""
    where = _beside(folder, stage)
    for candidate in folders_in(where):
        if parts.is_finished(candidate) and parts.read_manifest(candidate).fingerprint == fingerprint:
            return candidate
    console.print(
        Text(f"no {stage} folder with fingerprint {fingerprint[:12]}… in {where}: texts are left out", "yellow")
    )
    return None


def models_beside(folder: str) -> list[str]:
    """The models of the storage folder that a stage's folder is in."""
    return [path for stage in ("models", "students") for path in folders_in(_beside(folder, stage))]


def _beside(folder: str, stage: str) -> str:
    """STORAGE/<stage> of a folder STORAGE/<its stage>/<name>."""
    whole = folder if "://" in folder else str(Path(folder).expanduser().resolve())
    return f"{whole.rstrip('/').rsplit('/', 2)[0]}/{stage}"


def folders_in(path: str) -> list[str]:
    """The folders in a folder or URL, by name; none where there is no such folder."""
    fs, root = fsspec.core.url_to_fs(path)
    if not fs.isdir(root):
        return []
    found = [PurePosixPath(entry["name"]).name for entry in fs.ls(root, detail=True) if entry["type"] == "directory"]
    return [f"{path.rstrip('/')}/{name}" for name in sorted(found)]
