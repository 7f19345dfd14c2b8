"""Two vocabularies -> the exact map and the graph of near spellings; the dynamic map as a join of that graph.

Legend: V ids of one vocabulary, G groups, K top-k, E edges; sides `_s` student and `_t` teacher; -1 is unmapped.
A map is a value: built once, never changed. The rules: docs/method.md, section 3.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import torch
from numba import njit

from cdm.spelling import near_texts

FORMAT_VERSION = 1


class Vocabulary(Protocol):
    """What a map reads of a `cdm.tokenizers.Tokenizer`, which lies a layer above."""

    name: str
    vocab_size: int

    @property
    def fingerprint(self) -> str: ...
    @property
    def special_roles(self) -> dict[str, int]: ...
    def all_token_bytes(self) -> list[bytes | None]: ...


ROLES = ("end_of_turn", "eos", "bos", "pad")
PAIRS_PER_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class NeighbourGraph:
    """Near spellings in compressed rows, ids rising. starts int64 [V+1], ids int32 [E], distances float32 [E]."""

    starts: np.ndarray
    ids: np.ndarray
    distances: np.ndarray

    def transposed(self, size: int) -> NeighbourGraph:
        """The same edges by column; `size` is the number of columns."""
        rows = np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), np.diff(self.starts))
        return _graph(self.ids, rows, self.distances, size)


@dataclass(frozen=True, eq=False)
class VocabMap:
    """Teacher ids to student ids. `.exact` [V_t] int32 and its `inverse` [V_s]; `graph` V_t -> V_s, `back` V_s -> V_t.

    `live_only`: an exact image counts only where it is among the ids given (the student -> teacher direction).
    """

    exact: np.ndarray
    inverse: np.ndarray
    graph: NeighbourGraph
    back: NeighbourGraph
    name_s: str
    name_t: str
    fingerprint_s: str
    fingerprint_t: str
    threshold: float
    protect: bool
    live_only: bool = False

    @cached_property
    def reverse(self) -> VocabMap:
        """The other direction: `.reverse.dynamic(top_s, top_t)` gives live teacher ids, else -1."""
        return replace(
            self,
            exact=self.inverse,
            inverse=self.exact,
            graph=self.back,
            back=self.graph,
            name_s=self.name_t,
            name_t=self.name_s,
            fingerprint_s=self.fingerprint_t,
            fingerprint_t=self.fingerprint_s,
            live_only=not self.live_only,
        )

    def images(self, ids_t: torch.Tensor) -> torch.Tensor:
        """The exact image of each teacher id, -1 where there is none or the id is beyond the vocabulary. Any shape."""
        size = len(self.exact)
        image = _on_device(self, ids_t.device)[0][ids_t.clamp(0, size - 1)]
        return torch.where((ids_t >= 0) & (ids_t < size), image, -1)

    @overload
    def dynamic(self, top_t: np.ndarray, top_s: np.ndarray) -> np.ndarray: ...
    @overload
    def dynamic(self, top_t: torch.Tensor, top_s: torch.Tensor) -> torch.Tensor: ...
    def dynamic(self, top_t, top_s):  # type: ignore[no-untyped-def]
        """The student id of each of the teacher's top ids, -1 where there is none. [G, K], [G, K'] -> [G, K].

        Both are best first. The exact image, else the live student id without an exact twin that is spelled nearest,
        below the threshold; the better-ranked one on ties. Ids beyond a vocabulary (padded embedding rows) and
        negative ids are unmapped. int64, of the inputs' kind and device; an accelerator is never waited for.
        """
        if top_t.ndim != 2 or top_s.ndim != 2 or len(top_t) != len(top_s):
            raise ValueError(f"top ids must be [G, K] and [G, K'], got {tuple(top_t.shape)} and {tuple(top_s.shape)}")
        if isinstance(top_t, np.ndarray):
            return self._join(top_t, top_s)
        if top_t.device.type == "cpu":
            return torch.from_numpy(self._join(top_t.numpy(), top_s.numpy()))
        return dynamic_on_device(self, top_t, top_s)

    def save(self, path: str | Path) -> None:
        """Write one `.npz` (no pickle) under a temporary name, fsync, rename. The same map gives the same bytes."""
        meta = {"version": FORMAT_VERSION, "names": [self.name_s, self.name_t], "threshold": self.threshold}
        meta |= {"fingerprints": [self.fingerprint_s, self.fingerprint_t], "protect": self.protect}
        meta |= {"live_only": self.live_only}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            meta=np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8),
            exact=self.exact,
            inverse=self.inverse,
            starts=self.graph.starts,
            ids=self.graph.ids,
            distances=self.graph.distances,
        )
        _write_atomically(Path(path), buffer.getvalue())

    @staticmethod
    def load(path: str | Path) -> VocabMap:
        """Read what `save` wrote. Raises ValueError naming the file when it is damaged or of another version."""
        try:
            with np.load(path, allow_pickle=False) as data:
                meta = json.loads(data["meta"].tobytes())
                if meta["version"] != FORMAT_VERSION:
                    raise ValueError(f"{path}: map version {meta['version']}, not {FORMAT_VERSION}: delete the file")
                exact, inverse = data["exact"], data["inverse"]
                graph = NeighbourGraph(data["starts"], data["ids"], data["distances"])
        except (zipfile.BadZipFile, KeyError, EOFError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a readable vocabulary map ({error}); delete it to build it again") from error
        return VocabMap(
            exact,
            inverse,
            graph,
            graph.transposed(len(inverse)),
            meta["names"][0],
            meta["names"][1],
            meta["fingerprints"][0],
            meta["fingerprints"][1],
            meta["threshold"],
            meta["protect"],
            meta["live_only"],
        )

    def _join(self, top_t: np.ndarray, top_s: np.ndarray) -> np.ndarray:
        top_t, top_s = np.ascontiguousarray(top_t, dtype=np.int64), np.ascontiguousarray(top_s, dtype=np.int64)
        graph = self.graph
        return _dynamic(
            top_t, top_s, self.exact, self.inverse, graph.starts, graph.ids, graph.distances, self.live_only
        )


def build_vocab_map(
    tokenizer_s: Vocabulary, tokenizer_t: Vocabulary, threshold: float = 0.3, protect: bool = True
) -> VocabMap:
    """The exact map and the graph of all pairs without an exact twin whose spelling distance is below `threshold`.

    distance = Levenshtein / (sum of lengths) over the token texts without spaces; with `protect`, only between texts
    that have a letter and the same digits in the same order. Source: CDM, arXiv 2502.11104, plus `protect`.

    Raises ValueError where `threshold` is not in [0, 1].
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"mapping threshold {threshold} must be in [0, 1]")
    exact = exact_map(tokenizer_s, tokenizer_t)
    inverse = exact_map(tokenizer_t, tokenizer_s)
    free_t = _free_texts(tokenizer_t, inverse, protect)
    free_s = _free_texts(tokenizer_s, exact, protect)
    rows, columns, distances = _near_pairs(free_t, free_s, threshold, protect)
    graph = _graph(rows, columns, distances, tokenizer_t.vocab_size)
    back = graph.transposed(tokenizer_s.vocab_size)
    return VocabMap(
        exact,
        inverse,
        graph,
        back,
        tokenizer_s.name,
        tokenizer_t.name,
        tokenizer_s.fingerprint,
        tokenizer_t.fingerprint,
        float(threshold),
        protect,
    )


def cached_vocab_map(
    tokenizer_s: Vocabulary, tokenizer_t: Vocabulary, threshold: float, protect: bool, folder: str | Path
) -> VocabMap:
    """`build_vocab_map`, kept in `folder` as the file that `vocab_map_file` names."""
    path = vocab_map_file(tokenizer_s, tokenizer_t, threshold, protect, folder)
    return replace(VocabMap.load(path), name_s=tokenizer_s.name, name_t=tokenizer_t.name)


def vocab_map_file(
    tokenizer_s: Vocabulary, tokenizer_t: Vocabulary, threshold: float, protect: bool, folder: str | Path
) -> Path:
    """The file of a map in `folder`, built if need be; named by both fingerprints, the options and the format version.

    Safe when several processes ask at once: each may build, the rename is atomic and all write the same bytes.
    """
    asked = [tokenizer_s.fingerprint, tokenizer_t.fingerprint, float(threshold), bool(protect), FORMAT_VERSION]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
    path = Path(folder) / f"vocab-map-{key}.npz"
    if not path.exists():
        build_vocab_map(tokenizer_s, tokenizer_t, threshold, protect).save(path)
    return path


def exact_map(tokenizer_s: Vocabulary, tokenizer_t: Vocabulary) -> np.ndarray:
    """The student id with the same bytes for each teacher id (the lowest of several), else -1. int32 [V_t].

    Special tokens map by role.
    """
    first: dict[bytes, int] = {}
    for token_id, piece in enumerate(tokenizer_s.all_token_bytes()):
        if piece is not None:
            first.setdefault(piece, token_id)
    pieces = tokenizer_t.all_token_bytes()
    exact = np.array([-1 if piece is None else first.get(piece, -1) for piece in pieces], dtype=np.int32)
    for role in reversed(ROLES):  # the first role of a token that has several decides
        if role in tokenizer_s.special_roles and role in tokenizer_t.special_roles:
            token_t = tokenizer_t.special_roles[role]
            if pieces[token_t] is None:
                exact[token_t] = tokenizer_s.special_roles[role]
    return exact


def dynamic_on_device(vocab_map: VocabMap, top_t: torch.Tensor, top_s: torch.Tensor) -> torch.Tensor:
    """`VocabMap.dynamic` in torch operations alone: shapes depend on G and K only, so nothing waits for the device."""
    _, keys, distances = _on_device(vocab_map, top_t.device)
    size_t, size_s = len(vocab_map.exact), len(vocab_map.inverse)
    k_s = top_s.shape[1]
    image = vocab_map.images(top_t)
    if top_t.numel() == 0 or k_s == 0:
        return torch.full_like(image, -1) if vocab_map.live_only else image
    out = []
    for a, b, em in _group_chunks(top_t, top_s, image, k_s):
        if vocab_map.live_only:
            inside = (em[:, :, None] == b[:, None, :]).any(-1)
            found = torch.where(inside, em, -1)
        else:
            found = em
        known = ((a >= 0) & (a < size_t))[:, :, None] & ((b >= 0) & (b < size_s))[:, None, :]
        key = torch.where(known, a[:, :, None] * size_s + b[:, None, :], -1)
        at = torch.searchsorted(keys, key).clamp_(max=len(keys) - 1)
        distance = torch.where(keys[at] == key, distances[at], torch.inf)
        best, rank = _first_minimum(distance)
        near = torch.where(torch.isfinite(best), b.gather(1, rank), -1)
        out.append(torch.where(em >= 0, found, near))
    return torch.cat(out)


def _first_minimum(distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest value of the last axis and its first place; `argmin` alone promises no order on ties."""
    best = distance.amin(-1)
    ranks = torch.arange(distance.shape[-1], device=distance.device)
    first = torch.where(distance == best[..., None], ranks, distance.shape[-1]).amin(-1)
    return best, first


def _group_chunks(
    top_t: torch.Tensor, top_s: torch.Tensor, image: torch.Tensor, k_s: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    groups = max(1, PAIRS_PER_CHUNK // (top_t.shape[1] * k_s))
    return zip(top_t.split(groups), top_s.split(groups), image.split(groups), strict=True)


@lru_cache(maxsize=16)
def _on_device(vocab_map: VocabMap, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The map as tensors: exact [V_t], sorted edge keys a * V_s + b [E], distances [E]. Never empty."""
    graph = vocab_map.graph
    rows = np.repeat(np.arange(len(graph.starts) - 1, dtype=np.int64), np.diff(graph.starts))
    keys = rows * len(vocab_map.inverse) + graph.ids
    distances = graph.distances
    if len(keys) == 0:
        keys, distances = np.array([np.iinfo(np.int64).max]), np.array([np.inf], dtype=np.float32)
    return (
        torch.from_numpy(vocab_map.exact.astype(np.int64)).to(device),
        torch.from_numpy(keys).to(device),
        torch.from_numpy(distances).to(device),
    )


@njit(cache=True)
def _dynamic(
    top_t: np.ndarray,
    top_s: np.ndarray,
    exact: np.ndarray,
    inverse: np.ndarray,
    starts: np.ndarray,
    ids: np.ndarray,
    distances: np.ndarray,
    live_only: bool,
) -> np.ndarray:
    size_t, size_s = len(exact), len(inverse)
    out = np.full(top_t.shape, -1, np.int64)
    rank = np.zeros(size_s, np.int32)  # 1 + the place of an id among the live ones, 0 where it is not live
    for g in range(len(top_t)):
        for k in range(top_s.shape[1] - 1, -1, -1):
            if 0 <= top_s[g, k] < size_s:
                rank[top_s[g, k]] = k + 1
        for k in range(top_t.shape[1]):
            a = top_t[g, k]
            if a < 0 or a >= size_t:
                continue
            if exact[a] >= 0:
                if not live_only or rank[exact[a]] > 0:
                    out[g, k] = exact[a]
                continue
            best, best_rank = np.float32(np.inf), 0
            for e in range(starts[a], starts[a + 1]):
                r = rank[ids[e]]
                if r > 0 and (distances[e] < best or (distances[e] == best and r < best_rank)):
                    best, best_rank = distances[e], r
            if best_rank > 0:
                out[g, k] = top_s[g, best_rank - 1]
        for k in range(top_s.shape[1]):
            if 0 <= top_s[g, k] < size_s:
                rank[top_s[g, k]] = 0
    return out


def _free_texts(tokenizer: Vocabulary, images: np.ndarray, protect: bool) -> dict[str, list[int]]:
    """Texts without spaces -> the ids spelled so, of the tokens that are no exact image of the other side's tokens."""
    taken = set(images.tolist())
    texts: dict[str, list[int]] = {}
    for token_id, piece in enumerate(tokenizer.all_token_bytes()):
        if piece is None or token_id in taken:
            continue
        text = piece.decode("utf-8", "surrogateescape").replace(" ", "")
        if text and (not protect or any(c.isalpha() for c in text)):
            texts.setdefault(text, []).append(token_id)
    return texts


def _near_pairs(
    free_t: dict[str, list[int]], free_s: dict[str, list[int]], threshold: float, protect: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All (teacher id, student id, distance) with distance < threshold."""
    buckets_t, buckets_s = _buckets(free_t, protect), _buckets(free_s, protect)
    rows, columns, distances = [], [], []
    for key in sorted(buckets_t.keys() & buckets_s.keys()):
        texts_t, texts_s = buckets_t[key], buckets_s[key]
        i, j, distance = near_texts(texts_t, texts_s, threshold)
        row, column, pair = _expand([free_t[text] for text in texts_t], [free_s[text] for text in texts_s], i, j)
        rows.append(row)
        columns.append(column)
        distances.append(distance[pair])
    if not rows:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(distances)


def _buckets(texts: dict[str, list[int]], protect: bool) -> dict[str, list[str]]:
    """Texts by the digits that they hold: only texts of one bucket are ever compared."""
    out: dict[str, list[str]] = {}
    for text in texts:
        digits = "".join(c for c in text if c.isdigit()) if protect else ""
        out.setdefault(digits, []).append(text)
    return out


def _expand(
    ids_t: Sequence[Sequence[int]], ids_s: Sequence[Sequence[int]], i: np.ndarray, j: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of texts -> all pairs of their ids, and which pair of texts each came from."""
    flat_t, starts_t = _ragged(ids_t)
    flat_s, starts_s = _ragged(ids_s)
    n_t, n_s = np.diff(starts_t)[i], np.diff(starts_s)[j]
    pair = np.repeat(np.arange(len(i)), n_t * n_s)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(n_t * n_s) - n_t * n_s, n_t * n_s)
    rows = flat_t[starts_t[i][pair] + within // n_s[pair]]
    return rows, flat_s[starts_s[j][pair] + within % n_s[pair]], pair


def _ragged(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *(len(ids) for ids in lists)])
    return np.array([i for ids in lists for i in ids], dtype=np.int32), starts


def _graph(rows: np.ndarray, columns: np.ndarray, distances: np.ndarray, size: int) -> NeighbourGraph:
    order = np.lexsort((columns, rows))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=size))])
    return NeighbourGraph(starts, columns[order].astype(np.int32), distances[order].astype(np.float32))


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
