"""The same cases on 1, 2, 4, 8 cards of one host: wall time, what loading and handing out cost, whether neighbours disturb.

    python docs/measurements/gpu_scaling.py --out OUT --cards 1,2,4,8
    python docs/measurements/gpu_scaling.py --out OUT --cards 1,2 --by xdist,ray -- --kv-rounds=5
    python docs/measurements/gpu_scaling.py --out OUT --cards 1,8 --simulated --models dummy:tiny --cases "dse" -- --kv-rounds=2

A run for each model, way and number of cards; options behind ``--`` go to all of them. With ``--simulated`` the CPU stands in
for the cards, which says nothing of GPUs and tries the way. The first number of cards is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

MODELS = ("dummy:Llama-3.2-1B", "dummy:Qwen3-8B")
# 4 design points and 6 caches in two formats: 20 cases a model
CASES = "(dse or compression) and not synthetic"
OPTIONS = (
    "--kv-space=ctx=2048,4096;chunk=512;batch=1,16", "--kv-quantization=none,q4f16_1", "--kv-engine=nano",
    "--kv-method=streaming_llm,fix_size_l2", "--kv-recent-sizes=508,1020", "--kv-fix-kv-sizes=1024", "--kv-keep-ratios=0.5",
    "--kv-prompt-tokens=2048", "--kv-max-new-tokens=256", "--kv-rounds=7",
)  # fmt: skip
WAYS = ("xdist", "ray")
STEPS = ("decode_step_s", "tpot_s")


@dataclass(frozen=True)
class Outcome:
    """One run: its rows, and the seconds that its process took."""

    model: str
    way: str
    cards: int
    wall_s: float
    began: float
    rows: tuple[dict[str, Any], ...]

    @property
    def span_s(self) -> float:
        """From the first case's beginning to the last one's end; rows know the second in which they began."""
        return max(_begun(row) + row["duration_s"] for row in self.rows) - min(map(_begun, self.rows))

    @property
    def first_row_s(self) -> float:
        """From the command to the first row."""
        return min(_begun(row) + row["duration_s"] for row in self.rows) - self.began

    @property
    def measuring(self) -> float:
        """Share of the cards' time in which a case ran."""
        return sum(row["duration_s"] for row in self.rows) / (self.cards * self.span_s)

    @property
    def loading(self) -> float:
        """Share of the cards' time in which weights were loaded: no two loads take the same time."""
        loads = {(row["case"]["quantization"], row["model"].get("load_s")) for row in self.rows}
        return sum(load for _, load in loads if load) / (self.cards * self.span_s)

    def steps(self) -> dict[str, tuple[str, float]]:
        """The card and the seconds of a decode step, by case."""
        found = {}
        for row in self.rows:
            value = next((row["metrics"][name]["value"] for name in STEPS if name in row["metrics"]), None)
            if value is not None:
                found[row["case"]["name"]] = str((row["effective"].get("gpu") or {}).get("visible")), float(value)
        return found


def _begun(row: dict[str, Any]) -> float:
    return datetime.fromisoformat(row["started_utc"]).timestamp()


def run(asked: argparse.Namespace, model: str, way: str, cards: int) -> Outcome:
    """Measure; what fails ends the script with what was printed."""
    # one folder for all: a row beside neighbours then says how far it is from the one that was alone
    folder = asked.out / model.partition(":")[2]
    before = set(folder.glob("*/records.jsonl"))
    spread = [f"-n{cards}"] if way == "xdist" else ["--kv-cluster=local"]
    device = "--kv-device=cpu" if asked.simulated else "--kv-device=cuda"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command += ["-k", asked.cases, f"--kv-model={model}", device, *spread, *OPTIONS, *asked.rest]
    environment = dict(os.environ)
    if asked.simulated:
        environment["KVSUITE_SIMULATED_GPUS"] = str(cards)
    else:
        seen = environment.get("CUDA_VISIBLE_DEVICES")
        every = [str(card) for card in range(cards)] if seen is None else seen.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(every[:cards])
    began, clock = time.time(), time.monotonic()
    done = subprocess.run(
        [*command, f"--kv-report-dir={folder}"], env=environment, capture_output=True, text=True, check=False
    )
    wall = time.monotonic() - clock
    lines = [
        json.loads(line)
        for path in set(folder.glob("*/records.jsonl")) - before
        for line in path.read_text().splitlines()
    ]
    rows = tuple(line for line in lines if line.get("schema", "").startswith("kvsuite.record"))
    failed = [row["case"]["name"] for row in rows if row["status"] != "ok"]
    if not rows or failed:
        sys.exit(f"{folder}: exit code {done.returncode}, failed: {failed}\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return Outcome(model, way, cards, wall, began, rows)


def against(one: Outcome, base: Outcome) -> dict[str, Any]:
    """How much longer a decode step is beside neighbours than in ``base``: of all cases, and of each card."""
    alone = base.steps()
    by_card: dict[str, list[float]] = {}
    for name, (card, seconds) in one.steps().items():
        if name in alone:
            by_card.setdefault(card, []).append(seconds / alone[name][1] - 1)
    every = [change for changes in by_card.values() for change in changes]
    if not every:
        return {}
    return {
        "step_change_median": statistics.median(every), "step_change_worst": max(every),
        "step_change_by_card": {card: statistics.median(changes) for card, changes in sorted(by_card.items())},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cards", default="1,2,4,8")
    parser.add_argument("--by", default="xdist")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--cases", default=CASES, help="what -k is given")
    parser.add_argument("--simulated", action="store_true", help="the CPU stands in for the cards")
    parser.add_argument("rest", nargs="*", help="options of pytest, the same for all")
    asked = parser.parse_args()
    ways = asked.by.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--by: {', '.join(sorted(unknown))}: use {', '.join(WAYS)}")
    if asked.simulated and "ray" in ways:
        parser.error("--simulated: cards of Ray are real ones; give --by xdist")
    asked.out.mkdir(parents=True, exist_ok=True)
    heads = (
        "model",
        "by",
        "cards",
        "cases",
        "wall s",
        "first row s",
        "cases alone s",
        "of one card",
        "measuring",
        "loading",
    )
    print(f"| {' | '.join(heads)} | step, median | worst |\n|{'---|' * (len(heads) + 2)}", flush=True)
    with (asked.out / "gpu_scaling.jsonl").open("a") as stream:
        for model in asked.models.split(","):
            base = None
            for way in ways:
                for cards in map(int, asked.cards.split(",")):
                    one = run(asked, model, way, cards)
                    base = base or one
                    if {row["case"]["name"] for row in one.rows} != {row["case"]["name"] for row in base.rows}:
                        sys.exit(f"{model}, {way}, {cards}: other cases than before; empty {asked.out}")
                    told = {
                        "model": model, "by": way, "cards": cards, "cases": len(one.rows), "wall_s": one.wall_s,
                        "first_row_s": one.first_row_s, "span_s": one.span_s, "of_one": one.span_s / base.span_s,
                        "measuring": one.measuring, "loading": one.loading, **against(one, base),
                    }  # fmt: skip
                    stream.write(json.dumps(told) + "\n")
                    stream.flush()
                    changes = [told.get(f"step_change_{name}") for name in ("median", "worst")]
                    shown = ["n/a" if change is None else f"{change:+.1%}" for change in changes]
                    print(
                        f"| {model} | {way} | {cards} | {len(one.rows)} | {one.wall_s:.1f} | {one.first_row_s:.1f} | "
                        f"{one.span_s:.1f} | {told['of_one']:.3f} | {one.measuring:.0%} | {one.loading:.0%} | "
                        f"{' | '.join(shown)} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
