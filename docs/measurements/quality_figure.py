"""Draw the README's first figure: quality against the bytes of the cache and against the time of a token, of a run's records.

    pytest benchmarks -k compression --kv-rounds=3 --kv-num-warmup=1
    python docs/measurements/quality_figure.py reports/RUN docs/figures/quality_cost.png

Quality is the paired perplexity ratio to the full cache on the same tokens, with two standard errors; time per output token has
half the 95 % interval of its mean. Grey: the full cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kvsuite.reporting.aggregate import Row, ci_half_width, in_space_order, suite_rows, value
from kvsuite.reporting.figure_style import figure_bytes, house_style
from kvsuite.store.records_file import read_records
from kvsuite.suites.compression.figure import colour

KINDS = {"baseline": "full cache", "streaming_": "4 sinks and recent tokens", "recent_only_": "recent tokens alone"}


def number(row: Row, metric: str) -> float:
    found = value(row, metric)
    assert found is not None, (row["id"], metric)
    return found


def draw(axes: Axes, rows: Sequence[Row], x: Sequence[float], spread: Sequence[float] | None) -> None:
    names = [str(row["case"]["name"]) for row in rows]
    ratios = [number(row, "ppl_ratio") for row in rows]
    errors = [2 * number(row, "ppl_ratio_se") for row in rows]
    for index, name in enumerate(names):
        axes.errorbar(
            x[index], ratios[index], yerr=errors[index], xerr=None if spread is None else spread[index], fmt="o", markersize=9,
            color=colour(rows[index]), ecolor=colour(rows[index]), markeredgecolor="black", capsize=4,
        )  # fmt: skip
        # the full cache lies on the line, beside those that lose nothing: its name stands below
        place = (8, -16) if name == "baseline" else (8, 8)
        axes.annotate(
            name.replace("_", " "), (x[index], ratios[index]), xytext=place, textcoords="offset points", fontsize=10
        )
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_yticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
    axes.minorticks_off()
    axes.set_ylabel("perplexity / that of the full cache (log)")
    axes.set_xlim(0 if spread is None else None, 1.25 * max(x) if spread is None else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    run, found, _ = read_records(options.run)
    rows = [row for row in suite_rows(in_space_order(found), "compression") if row["status"] == "ok"]
    first: dict[str, Any] = rows[0]
    times = [1e3 * number(row, "tpot_s") for row in rows]
    spreads = [1e3 * (ci_half_width(row, "tpot_s") or 0.0) for row in rows]
    with house_style():
        figure = Figure(figsize=(14, 5.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        draw(left, rows, [number(row, "kv_bytes_exact") / 2**20 for row in rows], None)
        left.set_xlabel("keys and values of the request (MiB)")
        left.set_title("what a smaller cache costs in quality")
        draw(right, rows, times, spreads)
        right.set_ylabel("")
        right.set_xlabel("time per output token (ms)")
        right.set_title("what it saves in time, as far as the rounds can tell")
        kinds = {
            colour(row): label
            for start, label in KINDS.items()
            for row in rows
            if row["case"]["name"].startswith(start)
        }
        right.legend(handles=[Patch(facecolor=shade, label=label) for shade, label in kinds.items()])
        host, workload = run["environment"]["host"], first["case"]["workload"]
        figure.supxlabel(
            f"{first['model']['label']} on {host['cores']} cores ({host['cpu']}), {first['case']['dtype']}; "
            f"{int(number(first, 'nll_tokens'))} scored tokens, {workload['protocol']}; {first['rounds']} rounds. Whiskers: "
            "two standard errors of the paired ratio, half the 95 % interval of a time.",
            fontsize=9,
        )  # fmt: skip
    options.picture.write_bytes(figure_bytes(figure, "png", dpi=130))


if __name__ == "__main__":
    main()
