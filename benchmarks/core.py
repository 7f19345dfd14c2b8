"""All figures of the core in one run: `python -m benchmarks.core`, with CDM_REAL_DATA naming the real data.

Tables on the way, one JSON object on the last line.
"""

from __future__ import annotations

import torch

from benchmarks import graph, losses, mapping, table

PARTS = (mapping.measure, graph.measure, losses.measure)  # each prints its tables and returns its figures


def main() -> None:
    torch.set_num_threads(1)
    print(f"Machine: {table.machine()}. One thread, except where a graph is built.\n")
    figures: dict[str, float] = {}
    for measure in PARTS:
        figures |= measure()
    table.show("All figures", ("figure", "value"), [(name, f"{value:,.4g}") for name, value in figures.items()])
    table.finish(figures)


if __name__ == "__main__":
    main()
