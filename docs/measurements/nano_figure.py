"""Draw decode tokens a second against batch and context beside the floor, from the JSON lines of nano_serving.py.

python docs/measurements/nano_figure.py OUT/nano_serving.jsonl docs/figures/h200_nano_decode.png
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    """The figure's rows; of a point that was measured more than once, the last."""
    found: dict[tuple[int, int], Row] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["part"] == "figure":
            found[row["batch"], row["context"]] = row
    return [found[key] for key in sorted(found)]


def draw(rows: list[Row]) -> Any:
    """Left: against batch, a line a context. Right: against context, a line a batch. Dashed: the floor."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    for axis, (x, line) in zip(axes, (("batch", "context"), ("context", "batch")), strict=True):
        lines: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            lines[row[line]].append(row)
        colours = plt.get_cmap("viridis")
        for number, (value, own) in enumerate(sorted(lines.items())):
            colour = colours(number / max(1, len(lines)))
            places = [row[x] for row in own]
            axis.plot(places, [row["tok_s"] for row in own], "o-", ms=3.5, lw=1.4, color=colour, label=f"{value:,}")
            axis.plot(places, [1e3 * row["batch"] / row["floor_ms"] for row in own], "--", lw=0.8, color=colour)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("sequences" if x == "batch" else "tokens in the cache of each")
        axis.set_xticks(sorted({row[x] for row in rows}), [f"{value:,}" for value in sorted({row[x] for row in rows})])
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.25)
        axis.legend(title=line, fontsize=7, title_fontsize=8, ncols=2)
    axes[0].set_ylabel("decoded tokens per second")
    first = rows[0]
    model = str(first["model"]).removeprefix("dummy:")
    axes[0].set_title(
        f"{model} on {first['device']}, bfloat16; dashed: weights and cache read at {first['copy_tb_s']:.2f} TB/s",
        loc="left",
        fontsize=9,
    )
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="nano_serving.jsonl")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    rows = rows_of(options.lines)
    if not rows:
        parser.error(f"{options.lines}: no rows of the part `figure`; run nano_serving.py figure --out first")
    draw(rows).savefig(options.picture, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
