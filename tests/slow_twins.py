"""The obvious, slow version of everything clever in the core: loops over Python lists, one rule a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from cdm.tokenizers import Tokenizer, load_tokenizer

Group = tuple[tuple[int, int], tuple[int, int]]


@cache
def real_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer of the real data, loaded once for all tests."""
    return load_tokenizer(str(folder))


def levenshtein(x: Sequence, y: Sequence) -> int:
    row = list(range(len(y) + 1))
    for i, a in enumerate(x, 1):
        new = [i]
        for j, b in enumerate(y, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (a != b)))
        row = new
    return row[-1]


def align_exact(ends_s: Sequence[int], ends_t: Sequence[int]) -> list[Group]:
    """Groups read off the sets of ends: a boundary wherever both sides have one."""
    if not ends_s:
        return []
    last = ends_s[-1]
    n_s = ends_s.index(last) + 1 if last else 0  # tokens of the text
    n_t = ends_t.index(last) + 1 if last else 0
    cuts_s, cuts_t = [0], [0]
    if last:
        for end in sorted(set(ends_s[: n_s - 1]) & set(ends_t[: n_t - 1]) - {last}):
            cuts_s.append(max(i for i, e in enumerate(ends_s) if e == end) + 1)
            cuts_t.append(max(i for i, e in enumerate(ends_t) if e == end) + 1)
        cuts_s.append(n_s)
        cuts_t.append(n_t)
    if n_s < len(ends_s) and n_t < len(ends_t):
        cuts_s.append(len(ends_s))
        cuts_t.append(len(ends_t))
    cuts_s[-1], cuts_t[-1] = len(ends_s), len(ends_t)
    return [((cuts_s[g], cuts_s[g + 1]), (cuts_t[g], cuts_t[g + 1])) for g in range(len(cuts_s) - 1)]


def align_dtw(
    texts_s: Sequence[str], texts_t: Sequence[str], weights_s: Sequence[float], weights_t: Sequence[float]
) -> list[Group]:
    """The whole table, then the walk back; ties: diagonal, teacher, student."""
    inf = math.inf
    best = [[inf] * (len(texts_s) + 1) for _ in range(len(texts_t) + 1)]
    best[0][0] = 0.0
    for i, t in enumerate(texts_t, 1):
        for j, s in enumerate(texts_s, 1):
            edits = levenshtein(t.replace(" ", ""), s.replace(" ", ""))
            cost = edits * weights_t[i - 1] * weights_s[j - 1]
            best[i][j] = cost + min(best[i - 1][j - 1], best[i - 1][j], best[i][j - 1])
    i, j = len(texts_t), len(texts_s)
    groups, end = [], (j, i)
    while (i, j) != (1, 1):
        diagonal, teacher, student = best[i - 1][j - 1], best[i - 1][j], best[i][j - 1]
        if diagonal <= teacher and diagonal <= student:
            i, j = i - 1, j - 1
            groups.append(((j, end[0]), (i, end[1])))
            end = (j, i)
        elif teacher <= student:
            i -= 1
        else:
            j -= 1
    return [*reversed([*groups, ((0, end[0]), (0, end[1]))])]


def exact_map(bytes_s: Sequence[bytes | None], bytes_t: Sequence[bytes | None]) -> list[int]:
    """By bytes alone, without roles."""
    return [-1 if t is None or t not in bytes_s else bytes_s.index(t) for t in bytes_t]


def distance(x: bytes | None, y: bytes | None, protect: bool) -> float:
    """Infinite where it is not defined."""
    if x is None or y is None:
        return math.inf
    a, b = (z.decode("utf-8", "surrogateescape").replace(" ", "") for z in (x, y))
    if not a or not b:
        return math.inf
    if protect and not (any(c.isalpha() for c in a) and any(c.isalpha() for c in b)):
        return math.inf
    if protect and [c for c in a if c.isdigit()] != [c for c in b if c.isdigit()]:
        return math.inf
    return levenshtein(a, b) / (len(a) + len(b))


def dynamic(
    top_from: Sequence[int],
    top_to: Sequence[int],
    exact: Sequence[int],
    bytes_from: Sequence[bytes | None],
    bytes_to: Sequence[bytes | None],
    threshold: float,
    protect: bool,
    live_only: bool,
) -> list[int]:
    """One group of the dynamic map, straight from the words of the method."""
    images = {image for image in exact if image >= 0}
    out = []
    for a in top_from:
        if not 0 <= a < len(exact):
            out.append(-1)
        elif exact[a] >= 0:
            out.append(exact[a] if not live_only or exact[a] in top_to else -1)
        else:
            free = [b for b in top_to if 0 <= b < len(bytes_to) and b not in images]
            near = [(distance(bytes_from[a], bytes_to[b], protect), rank, b) for rank, b in enumerate(free)]
            out.append(min((x for x in near if x[0] < threshold), default=(0, 0, -1))[2])
    return out


def softmax(z: Sequence[float]) -> list[float]:
    top = max(z)
    e = [math.exp(x - top) for x in z]
    return [x / sum(e) for x in e]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def normalised(values: Sequence[float]) -> list[float]:
    return [x / sum(values) for x in values]


def cdm_divergence(
    logits_s: Sequence[float],
    logp_t: dict[int, float],
    map_t_to_s: dict[int, int],
    map_s_to_t: dict[int, int],
    temperature: float,
    tail: str,
    dual: bool = True,
) -> float:
    """One group, by dictionaries of probabilities."""
    q = softmax(logits_s)
    p = {a: math.exp(x) for a, x in logp_t.items()}
    directions = []
    landed = [a for a in map_t_to_s if map_t_to_s[a] >= 0]
    if landed:
        ids = sorted({map_t_to_s[a] for a in landed})
        teacher = [sum(p[a] ** (1 / temperature) for a in landed if map_t_to_s[a] == b) for b in ids]
        student = [q[b] ** (1 / temperature) for b in ids]
        rests = 1 - sum(p[a] for a in landed), 1 - sum(q[b] for b in ids)
        directions.append((teacher, student, rests))
    landed = [b for b in map_s_to_t if map_s_to_t[b] in p]
    if landed and dual:
        ids = sorted({map_s_to_t[b] for b in landed})
        teacher = [p[a] ** (1 / temperature) for a in ids]
        student = [sum(q[b] ** (1 / temperature) for b in landed if map_s_to_t[b] == a) for a in ids]
        rests = 1 - sum(p[a] for a in ids), 1 - sum(q[b] for b in landed)
        directions.append((teacher, student, rests))
    values = []
    for teacher, student, (rest_t, rest_s) in directions:
        if tail == "residual":
            teacher = [*teacher, max(rest_t, 1e-6) ** (1 / temperature)]
            student = [*student, max(rest_s, 1e-6) ** (1 / temperature)]
        values.append(kl(normalised(teacher), normalised(student)))
    return temperature**2 * sum(values) / len(values) if values else 0.0
