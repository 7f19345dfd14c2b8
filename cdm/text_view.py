"""Text for the terminal: tokens made visible, an alignment drawn, facts and sizes (layer 2).

An alignment is drawn with each group's student tokens above its teacher tokens:

    s │def│␣get╎_default│(path│):⏎│⟨end⟩
    t │def│␣get_default │(path│):⏎│⟨end⟩

│ stands between groups, ╎ between the tokens of one group. Groups that are not one token each are bold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from cdm.progress import console
from cdm.records import Alignment

BETWEEN_GROUPS, BETWEEN_TOKENS = "│", "╎"
COLOURS = ("cyan", "yellow")
TEXT_SHOWN = 600  # characters of a document's text
END, NO_WIDTH = "⟨end⟩", "∅"
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "→", "\r": "␍"}


def visible(text: str) -> str:
    """A token's text with its white space, control characters and broken UTF-8 made visible."""
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else _escaped(c)) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a character that is cut between tokens (surrogateescape)
        return f"⟨{code - 0xDC00:02x}⟩"
    return f"⟨{code:02x}⟩" if code < 0x100 else f"⟨U+{code:04X}⟩"


def pieces(text: str, ends: np.ndarray) -> list[str]:
    """The tokens of a text from their byte ends [N], made visible. Without width after the last byte: end of turn."""
    data = text.encode()
    starts = [0, *ends[:-1].tolist()] if len(ends) else []
    found = []
    for start, end in zip(starts, ends.tolist(), strict=True):
        if end > start:
            found.append(visible(data[start:end].decode("utf-8", "surrogateescape")))
        else:
            found.append(END if end == len(data) else NO_WIDTH)
    return found


def draw_alignment(
    pieces_s: Sequence[str], pieces_t: Sequence[str], alignment: Alignment, width: int
) -> Iterator[Text]:
    """Pairs of lines, s above t, at most `width` cells wide where no single group is wider."""
    groups_s, groups_t = _groups(pieces_s, alignment.bounds_s), _groups(pieces_t, alignment.bounds_t)
    widths = [max(cell_len(s), cell_len(t)) for s, t in zip(_joined(groups_s), _joined(groups_t), strict=True)]
    for first, last in _lines(widths, width - len("s ")):
        for label, groups in (("s", groups_s), ("t", groups_t)):
            line = Text(f"{label} ", no_wrap=True, overflow="ignore", end="\n")
            for number in range(first, last):
                single = len(groups_s[number]) == len(groups_t[number]) == 1
                cell = BETWEEN_TOKENS.join(groups[number])
                style = COLOURS[number % 2] if single else f"bold {COLOURS[number % 2]}"
                line.append(BETWEEN_GROUPS, "dim")
                line.append(cell + " " * (widths[number] - cell_len(cell)), style)
            line.rstrip()
            yield line


def draw_tokens(label: str, tokens: Sequence[str], width: int) -> Iterator[Text]:
    """The tokens of one side that has nothing to be aligned with."""
    for first, last in _lines([cell_len(token) for token in tokens], width - len("s ")):
        line = Text(f"{label} ", no_wrap=True, overflow="ignore")
        for number in range(first, last):
            line.append(BETWEEN_GROUPS, "dim").append(tokens[number], COLOURS[number % 2])
        yield line


def _groups(tokens: Sequence[str], bounds: np.ndarray) -> list[Sequence[str]]:
    return [tokens[start:end] for start, end in pairwise(bounds)]


def _joined(groups: Sequence[Sequence[str]]) -> list[str]:
    return [BETWEEN_TOKENS.join(group) for group in groups]


def _lines(widths: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """Runs of cells that fit a line, each cell with a separator before it; a cell that is too wide has its own line."""
    first = used = 0
    for number, width in enumerate(widths):
        if number > first and used + 1 + width > room:
            yield first, number
            first, used = number, 0
        used += 1 + width
    if widths:
        yield first, len(widths)


# --- printing ----------------------------------------------------------------------------------------------------


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """A title and a line for each fact."""
    console.print(Text(title, "bold"))
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(Text(f"  {key}"), Text(_plain(value)))
    console.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_heading(title: str, note: str) -> None:
    console.print()
    console.print(Text(title, "bold").append(f"  {note}", "not bold dim"))


def short_text(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]} … ({len(text) - TEXT_SHOWN:,} characters more)"


def bytes_text(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
