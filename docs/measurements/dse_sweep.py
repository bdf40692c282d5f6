"""A sweep in one process against a fresh process for every point: wall time, and how much of it is setting up.

usage: python docs/measurements/dse_sweep.py --out FOLDER --space "ctx=512,1024;batch=1,4" -- --kv-model=dummy:Llama-3-8B ...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from kvsuite.memory_model.space_text import parse_space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--space", required=True)
    parser.add_argument("--quantization", default="q4f16_1")
    parser.add_argument("rest", nargs="*", help="options of pytest, the same for all")
    asked = parser.parse_args()
    points = parse_space(asked.space, quantizations=[asked.quantization]).points
    rest = [*asked.rest, f"--kv-quantization={asked.quantization}"]
    together, measured = _run(asked.out / "sweep", [*rest, f"--kv-space={asked.space}"], len(points))
    print(f"sweep of {len(points)} points: {together:.1f} s, {measured:.1f} s of them in cases", flush=True)
    apart = 0.0
    for number, point in enumerate(points, 1):
        axes = {"context": point.context_window_size, "chunk": point.prefill_chunk_size, "batch": point.max_batch_size}
        axes |= {"window": point.sliding_window_size, "sink": point.attention_sink_size}
        space = ";".join(f"{name}={value}" for name, value in axes.items())
        seconds, in_case = _run(asked.out / f"point{number}", [*rest, f"--kv-space={space}"], 1)
        apart += seconds
        print(
            f"fresh process {number}/{len(points)} {point.id}: {seconds:.1f} s, {in_case:.1f} s in its case", flush=True
        )
    print(f"{len(points)} fresh processes: {apart:.1f} s; ratio {apart / together:.2f}")


def _run(folder: Path, options: list[str], cases: int) -> tuple[float, float]:
    """Wall time of a run in seconds, and the part of it that its cases took."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "dse", "-q", "-p", "no:cacheprovider"]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, *options, f"--kv-report-dir={folder}"], capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - begin
    rows = [json.loads(line) for found in folder.glob("*/records.jsonl") for line in found.read_text().splitlines()]
    records = [row for row in rows if row.get("schema", "").startswith("kvsuite.record")]
    if done.returncode or len(records) != cases or any(row["status"] != "ok" for row in records):
        said = done.stdout[-3000:] + done.stderr[-2000:]
        sys.exit(f"{folder}: exit code {done.returncode}, {len(records)} of {cases} records\n{said}")
    return seconds, sum(row["duration_s"] for row in records)


if __name__ == "__main__":
    main()
