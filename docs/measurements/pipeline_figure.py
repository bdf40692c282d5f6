"""Draw the front of time to the first token against gaps between tokens, from the JSON lines of nano_lanes.py.

python docs/measurements/pipeline_figure.py OUT/nano_lanes.jsonl [MORE.jsonl ...] docs/figures/h200_pipeline_front.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from serving_arms import Arm

Row = dict[str, Any]
#: what the best arm with compression was to reach: gaps and time to the first token, both p99 in ms
GOAL = (12.0, 400.0)
_GAPS, _FIRSTS = (8, 10, 12, 15, 20, 30, 40), (200, 300, 400, 600, 1000, 1500, 2000)
_KINDS = {"chunks": ("#3498db", "s"), "two streams": ("#e67e22", "^"), "parted SMs": ("#2ecc71", "o")}


def rows_of(paths: Sequence[Path]) -> list[Row]:
    """Arms with numbers; of one that was measured more than once, the last."""
    found: dict[str, Row] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "ttft_ms" in row:
                found[row["arm"]] = row
    return list(found.values())


def kind_of(arm: Arm) -> str:
    return "parted SMs" if arm.sms else "two streams" if arm.lanes == 2 else "chunks"


def point(row: Row) -> tuple[float, float]:
    return float(row["itl_ms"]["p99"]), float(row["ttft_ms"]["p99"])


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both."""
    return sorted(
        one for one in points if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)
    )


def draw(rows: Sequence[Row]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharex=True, sharey=True)
    for axis, compressed in zip(axes, (False, True), strict=True):
        own = [row for row in rows if (Arm.parse(row["arm"]).factor > 1) == compressed]
        for row in own:
            arm, (x, y) = Arm.parse(row["arm"]), point(row)
            colour, marker = _KINDS[kind_of(arm)]
            axis.plot(x, y, marker, color=colour, ms=8)
            axis.annotate(
                row["arm"].partition("/")[0], (x, y), xytext=(6, 5), textcoords="offset points", fontsize=9
            )  # fmt: skip
        others = front([point(row) for row in own if Arm.parse(row["arm"]).sms is None])
        axis.step([x for x, _ in others], [y for _, y in others], "--", where="post", color="grey", lw=1)
        axis.set_title("prompts compressed by a factor of 5" if compressed else "full caches", fontsize=10)
        axis.set_xscale("log")
        axis.set_yscale("log")
        for ticks, values in ((axis.set_xticks, _GAPS), (axis.set_yticks, _FIRSTS)):
            ticks(values, [f"{value:,}" for value in values])
            ticks([], minor=True)
        axis.margins(0.18)
        axis.set_xlabel("gap between tokens, p99 (ms)")
        axis.grid(visible=True, which="both", alpha=0.2)
    axes[0].set_ylabel("time to the first token, p99 (ms)")
    axes[1].axvline(GOAL[0], color="black", lw=0.8, ls=":")
    axes[1].axhline(GOAL[1], color="black", lw=0.8, ls=":")
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, ls="none", label=kind)
        for kind, (colour, marker) in _KINDS.items()
    ]  # fmt: skip
    handles.append(plt.Line2D([], [], color="grey", ls="--", lw=1, label="front without parted SMs"))
    handles.append(plt.Line2D([], [], color="black", ls=":", lw=0.8, label="12 ms and 400 ms"))
    axes[0].legend(handles=handles, fontsize=8)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="+", help="nano_lanes.jsonl of one session or more")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    rows = rows_of(options.lines)
    if not rows:
        parser.error(f"{options.lines[0]}: no arm with numbers")
    draw(rows).savefig(options.picture, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
