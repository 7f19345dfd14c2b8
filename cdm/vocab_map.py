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
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from numba import njit

from cdm.images import Twins, Vocabulary, exact_map, prefix_map
from cdm.neighbours import NeighbourGraph, near_graph

FORMAT_VERSION = 2
IMAGES = ("exact", "inverse", "static", "static_back")


Unmatched = Literal["spelling", "prefix"]
PAIRS_PER_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class VocabMap:
    """Teacher ids to student ids. `.exact` [V_t] int32 and its `inverse` [V_s]; `graph` V_t -> V_s, `back` V_s -> V_t.

    `live_only`: an exact image counts only where it is among the ids given (the student -> teacher direction).
    `static` [V_t], `static_back` [V_s] int32: where an id goes whatever is live, else -1. That is its exact image; with
    `unmatched="prefix"`, where the graph is empty, else the token that it begins with.
    """

    exact: np.ndarray
    inverse: np.ndarray
    static: np.ndarray
    static_back: np.ndarray
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
        twin = replace(
            self,
            exact=self.inverse,
            inverse=self.exact,
            static=self.static_back,
            static_back=self.static,
            graph=self.back,
            back=self.graph,
            name_s=self.name_t,
            name_t=self.name_s,
            fingerprint_s=self.fingerprint_t,
            fingerprint_t=self.fingerprint_s,
            live_only=not self.live_only,
        )
        twin.__dict__["reverse"] = self  # what is cached of either side, on a device above all, serves both
        return twin

    def images(self, ids_t: torch.Tensor) -> torch.Tensor:
        """The exact image of each teacher id, -1 where there is none or the id is beyond the vocabulary. Any shape."""
        forward = self.reverse if self.live_only else self
        return _images(_on_device(forward, ids_t.device)[int(self.live_only)], ids_t)

    @overload
    def dynamic(self, top_t: np.ndarray, top_s: np.ndarray) -> np.ndarray: ...
    @overload
    def dynamic(self, top_t: torch.Tensor, top_s: torch.Tensor) -> torch.Tensor: ...
    def dynamic(self, top_t, top_s):  # type: ignore[no-untyped-def]
        """The student id of each of the teacher's top ids, -1 where there is none. [G, K], [G, K'] -> [G, K].

        Both are best first. The static image, else the live student id without an exact twin that is spelled nearest,
        below the threshold; the better-ranked one on ties. Ids beyond a vocabulary (padded embedding rows) and
        negative ids are unmapped. int64, of the inputs' kind and device; an accelerator is never waited for.
        """
        return self.both(top_t, top_s)[0]

    @overload
    def both(self, top_t: np.ndarray, top_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    @overload
    def both(self, top_t: torch.Tensor, top_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def both(self, top_t, top_s):  # type: ignore[no-untyped-def]
        """`self.dynamic(top_t, top_s)` and `self.reverse.dynamic(top_s, top_t)`, from one join."""
        if top_t.ndim != 2 or top_s.ndim != 2 or len(top_t) != len(top_s):
            raise ValueError(f"top ids must be [G, K] and [G, K'], got {tuple(top_t.shape)} and {tuple(top_s.shape)}")
        if self.live_only:
            return self.reverse.both(top_s, top_t)[::-1]
        if isinstance(top_t, np.ndarray):
            return self._joined(top_t, top_s)
        if top_t.device.type == "cpu":
            t_to_s, s_to_t = self._joined(top_t.numpy(), top_s.numpy())
            return torch.from_numpy(t_to_s), torch.from_numpy(s_to_t)
        return both_on_device(self, top_t, top_s)

    def save(self, path: str | Path) -> None:
        """Write one `.npz` (no pickle) under a temporary name, fsync, rename. The same map gives the same bytes."""
        meta = {"version": FORMAT_VERSION, "names": [self.name_s, self.name_t], "threshold": self.threshold}
        meta |= {"fingerprints": [self.fingerprint_s, self.fingerprint_t], "protect": self.protect}
        meta |= {"live_only": self.live_only}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            meta=np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8),
            **{name: getattr(self, name) for name in IMAGES},
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
                exact, inverse, static, static_back = (data[name] for name in IMAGES)
                graph = NeighbourGraph(data["starts"], data["ids"], data["distances"])
        except (zipfile.BadZipFile, KeyError, EOFError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a readable vocabulary map ({error}); delete it to build it again") from error
        return VocabMap(
            exact,
            inverse,
            static,
            static_back,
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

    def _joined(self, top_t: np.ndarray, top_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        top_t, top_s = np.ascontiguousarray(top_t, dtype=np.int64), np.ascontiguousarray(top_s, dtype=np.int64)
        images = self.static, self.static_back
        return _join(top_t, top_s, *images, self.graph.starts, self.graph.ids, self.graph.distances)


def build_vocab_map(
    tokenizer_s: Vocabulary,
    tokenizer_t: Vocabulary,
    threshold: float = 0.3,
    protect: bool = True,
    *,
    twins: Twins = "lowest",
    unmatched: Unmatched = "spelling",
) -> VocabMap:
    """The exact map and the graph of all pairs without an exact twin whose spelling distance is below `threshold`.

    distance = Levenshtein / (sum of lengths) over the token texts without spaces; with `protect`, only between texts
    that have a letter and the same digits in the same order. Source: CDM, arXiv 2502.11104, plus `protect`.
    twins: see `exact_map`. unmatched: "prefix" maps an id without an exact twin to the longest token that its bytes
    begin with, in place of near spellings; `threshold` and `protect` then play no part.

    Raises ValueError where `threshold` is not in [0, 1].
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"mapping threshold {threshold} must be in [0, 1]")
    exact = exact_map(tokenizer_s, tokenizer_t, twins)
    inverse = exact_map(tokenizer_t, tokenizer_s, twins)
    static, static_back = exact, inverse
    if unmatched == "prefix":
        threshold = 0.0  # no spelling is nearer than that
        static = np.where(exact >= 0, exact, prefix_map(tokenizer_s, tokenizer_t, twins))
        static_back = np.where(inverse >= 0, inverse, prefix_map(tokenizer_t, tokenizer_s, twins))
    pieces_t, pieces_s = tokenizer_t.all_token_bytes(), tokenizer_s.all_token_bytes()
    graph = near_graph(pieces_t, pieces_s, exact, inverse, threshold, protect)
    back = graph.transposed(tokenizer_s.vocab_size)
    return VocabMap(
        exact,
        inverse,
        static,
        static_back,
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
    tokenizer_s: Vocabulary,
    tokenizer_t: Vocabulary,
    threshold: float,
    protect: bool,
    folder: str | Path,
    unmatched: Unmatched = "spelling",
) -> VocabMap:
    """`build_vocab_map`, kept in `folder` as the file that `vocab_map_file` names."""
    path = vocab_map_file(tokenizer_s, tokenizer_t, threshold, protect, folder, unmatched)
    return replace(VocabMap.load(path), name_s=tokenizer_s.name, name_t=tokenizer_t.name)


def vocab_map_file(
    tokenizer_s: Vocabulary,
    tokenizer_t: Vocabulary,
    threshold: float,
    protect: bool,
    folder: str | Path,
    unmatched: Unmatched = "spelling",
) -> Path:
    """The file of a map in `folder`, built if need be; named by both fingerprints, the options and the format version.

    Its twins are those that the tokenizers emit.

    Safe when several processes ask at once: each may build, the rename is atomic and all write the same bytes.
    """
    options = [float(threshold), bool(protect), unmatched]
    asked = [tokenizer_s.fingerprint, tokenizer_t.fingerprint, *options, FORMAT_VERSION]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
    path = Path(folder) / f"vocab-map-{key}.npz"
    if not path.exists():
        build_vocab_map(tokenizer_s, tokenizer_t, threshold, protect, twins="emitted", unmatched=unmatched).save(path)
    return path


def dynamic_on_device(vocab_map: VocabMap, top_t: torch.Tensor, top_s: torch.Tensor) -> torch.Tensor:
    """`VocabMap.dynamic` in torch operations alone: shapes depend on G and K only, so nothing waits for the device."""
    return both_on_device(vocab_map, top_t, top_s)[0]


def both_on_device(vocab_map: VocabMap, top_t: torch.Tensor, top_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`VocabMap.both` in torch operations alone."""
    if vocab_map.live_only:
        t_to_s, s_to_t = both_on_device(vocab_map.reverse, top_s, top_t)
        return s_to_t, t_to_s
    _, _, static, static_back, keys, distances = _on_device(vocab_map, top_t.device)
    size_t, size_s = len(static), len(static_back)
    image_t, image_s = _images(static, top_t), _images(static_back, top_s)
    if top_t.numel() == 0 or top_s.numel() == 0:
        return image_t, torch.full_like(image_s, -1)
    out_t, out_s = [], []
    groups = max(1, PAIRS_PER_CHUNK // (top_t.shape[1] * top_s.shape[1]))
    chunks = (x.split(groups) for x in (top_t, top_s, image_t, image_s))
    for a, b, image_a, image_b in zip(*chunks, strict=True):
        known = ((a >= 0) & (a < size_t))[:, :, None] & ((b >= 0) & (b < size_s))[:, None, :]
        key = torch.where(known, a[:, :, None] * size_s + b[:, None, :], -1)
        at = torch.searchsorted(keys, key).clamp_(max=len(keys) - 1)
        distance = torch.where(keys[at] == key, distances[at], torch.inf)
        live = (image_b[:, :, None] == a[:, None, :]).any(-1)
        out_t.append(torch.where(image_a >= 0, image_a, _nearest(distance, b)))
        out_s.append(torch.where(image_b >= 0, image_b.masked_fill(~live, -1), _nearest(distance.mT, a)))
    return torch.cat(out_t), torch.cat(out_s)


def _nearest(distance: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The first of `ids` [G, K'] at the smallest of distances [G, K, K'], -1 where all are infinite: [G, K]."""
    best = distance.amin(-1)
    ranks = torch.arange(distance.shape[-1], device=distance.device)
    # `argmin` alone promises no order on ties
    first = torch.where(distance == best[..., None], ranks, distance.shape[-1]).amin(-1)
    return torch.where(torch.isfinite(best), ids.gather(1, first), -1)


def _images(images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.where((ids >= 0) & (ids < len(images)), images[ids.clamp(0, len(images) - 1)], -1)


@lru_cache(maxsize=16)
def _on_device(vocab_map: VocabMap, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The map as tensors: exact [V_t], inverse [V_s], static [V_t] and of the reverse [V_s]; sorted edge keys
    a * V_s + b [E] and distances [E], never empty.
    """
    graph = vocab_map.graph
    rows = np.repeat(np.arange(len(graph.starts) - 1, dtype=np.int64), np.diff(graph.starts))
    keys = rows * len(vocab_map.inverse) + graph.ids
    distances = graph.distances
    if len(keys) == 0:
        keys, distances = np.array([np.iinfo(np.int64).max]), np.array([np.inf], dtype=np.float32)
    images = (vocab_map.exact, vocab_map.inverse, vocab_map.static, vocab_map.static_back)
    arrays = (*(image.astype(np.int64) for image in images), keys, distances)
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


@njit(cache=True)
def _join(
    top_t: np.ndarray,
    top_s: np.ndarray,
    images_t: np.ndarray,
    images_s: np.ndarray,
    starts: np.ndarray,
    ids: np.ndarray,
    distances: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Both directions: each edge between live ids is met once, and is a candidate at either end."""
    t_to_s, s_to_t = np.full(top_t.shape, -1, np.int64), np.full(top_s.shape, -1, np.int64)
    rank_t, rank_s = np.zeros(len(images_t), np.int32), np.zeros(len(images_s), np.int32)
    nearest_s = np.empty(top_s.shape[1], np.float32)
    for g in range(len(top_t)):
        _rank(top_t[g], rank_t)
        _rank(top_s[g], rank_s)
        nearest_s[:] = np.inf
        for k in range(top_t.shape[1]):
            a = top_t[g, k]
            if a < 0 or a >= len(images_t):
                continue
            nearest, first = np.float32(np.inf), 0
            for e in range(starts[a], starts[a + 1]):
                rank = rank_s[ids[e]]
                if rank == 0:
                    continue
                if distances[e] < nearest or (distances[e] == nearest and rank < first):
                    nearest, first = distances[e], rank
                if distances[e] < nearest_s[rank - 1]:  # on ties the earlier k, which ranks better
                    nearest_s[rank - 1], s_to_t[g, rank - 1] = distances[e], a
            if images_t[a] >= 0:
                t_to_s[g, k] = images_t[a]
            elif first > 0:
                t_to_s[g, k] = top_s[g, first - 1]
        for k in range(top_s.shape[1]):
            b = top_s[g, k]
            if b < 0 or b >= len(images_s):
                continue
            if images_s[b] >= 0:
                s_to_t[g, k] = images_s[b] if rank_t[images_s[b]] > 0 else -1
            else:  # an id that is named twice goes by its first place
                s_to_t[g, k] = s_to_t[g, rank_s[b] - 1]
        _unrank(top_t[g], rank_t)
        _unrank(top_s[g], rank_s)
    return t_to_s, s_to_t


@njit(cache=True)
def _rank(top: np.ndarray, rank: np.ndarray) -> None:
    """1 + the first place of each live id; `rank` is 0 everywhere else."""
    for k in range(len(top) - 1, -1, -1):
        if 0 <= top[k] < len(rank):
            rank[top[k]] = k + 1


@njit(cache=True)
def _unrank(top: np.ndarray, rank: np.ndarray) -> None:
    for token_id in top:
        if 0 <= token_id < len(rank):
            rank[token_id] = 0


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
