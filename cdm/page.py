"""What a page is made of that stands alone, light and dark (layer 2).

No script, no font and no picture from elsewhere: text, tables and SVG in one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from cdm.alignment import entropy_weights
from cdm.batches import Row
from cdm.records import Alignment
from cdm.text_view import pieces

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1d2227; --dim: #66707a; --line: #dfe3e7; --soft: #f5f7f9;
  --tint: 59, 130, 196; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --ink: #e4e8ec; --dim: #98a2ac; --line: #333a41;
  --soft: #1d2126; --tint: 96, 165, 228; } }
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 64rem; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p.note { color: var(--dim); margin: .25rem 0 .75rem; max-width: 48rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 500; } td.number, th.number { text-align: right; }
svg { display: block; height: auto; max-width: 100%; }
code, pre, .groups { font-family: ui-monospace, monospace; font-size: .82rem; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 4px; margin: 0; min-width: 15rem;
  max-height: 18rem; overflow: auto; overflow-wrap: anywhere; padding: .5rem .7rem; white-space: pre-wrap; }
.groups { display: flex; flex-wrap: wrap; gap: 2px; margin: .5rem 0 1.25rem; }
.group { border: 1px solid var(--line); border-radius: 3px; line-height: 1.55; white-space: pre; }
.group.many { border-color: var(--ink); }
.group div { display: flex; min-height: 1.25rem; } .group div + div { border-top: 1px dotted var(--dim); }
.group span { padding: 0 .28rem; } .group span + span { border-left: 1px dashed var(--dim); }
.columns { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.columns h3 { color: var(--dim); font-size: .85rem; font-weight: 500; margin: 0 0 .25rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on what is seen, and HTML."""

    title: str
    note: str
    body: str


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    parts = [f"<h2>{escape(one.title)}</h2><p class=note>{escape(one.note)}</p>{one.body}" for one in sections]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1><p class=note>{escape(subtitle)}</p>{''.join(parts)}</html>\n"
    )


def table(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns of equal length by name; numbers stand right."""
    numeric = {name: all(isinstance(v, int | float | None) for v in values) for name, values in columns.items()}
    of = {name: " class=number" if numeric[name] else "" for name in columns}
    head = "".join(f"<th{of[name]}>{escape(name)}</th>" for name in columns)
    rows = [
        "".join(f"<td{of[name]}>{_cell(value)}</td>" for name, value in zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else escape(str(value))


def side_by_side(titled: Mapping[str, str]) -> str:
    """Texts beside each other."""
    blocks = (f"<div><h3>{escape(name)}</h3><pre>{escape(text) or ' '}</pre></div>" for name, text in titled.items())
    return f"<div class=columns>{''.join(blocks)}</div>"


def alignment(text: str, ends_s: np.ndarray, ends_t: np.ndarray, groups: Alignment, entropy_t: np.ndarray) -> str:
    """The groups of a response, student above teacher; the ground of a group is the entropy weight of its start.

    ends_s [N], ends_t [M] bytes, entropy_t [M] nats. A group of more than one token on a side has a strong border.
    """
    tokens_s, tokens_t = pieces(text, ends_s), pieces(text, ends_t)
    weights = np.asarray(entropy_weights(entropy_t))
    low, high = entropy_weights(np.array([0.0, 1.0]))
    blocks = []
    for g in range(len(groups.bounds_s) - 1):
        s = slice(int(groups.bounds_s[g]), int(groups.bounds_s[g + 1]))
        t = slice(int(groups.bounds_t[g]), int(groups.bounds_t[g + 1]))
        many = "" if s.stop - s.start == t.stop - t.start == 1 else " many"
        strength = 0.55 * (weights[t.start] - low) / (high - low)
        ground = f"background: rgba(var(--tint), {strength:.2f})"
        sides = "".join(_side(tokens[part]) for tokens, part in ((tokens_s, s), (tokens_t, t)))
        title = f"teacher: entropy {entropy_t[t.start]:.2f} nats, weight {weights[t.start]:.2f}"
        blocks.append(f'<div class="group{many}" style="{ground}" title="{title}">{sides}</div>')
    return f"<div class=groups>{''.join(blocks)}</div>"


def _side(tokens: Sequence[str]) -> str:
    return f"<div>{''.join(f'<span>{escape(token)}</span>' for token in tokens)}</div>"


def alignments(rows: Sequence[Row], texts: Mapping[str, str]) -> str:
    """The first teacher's alignment of each row whose text is known."""
    drawn = []
    for row in rows:
        scores = row.scores[0] if row.scores else None
        if scores is not None and row.id in texts:
            drawn.append(alignment(texts[row.id], row.ends_s, scores.ends_t, row.alignments[0], scores.entropy_t))
    return "".join(drawn)
