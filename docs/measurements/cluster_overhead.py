"""What a case costs on a cluster beyond its own time: cases that sleep, on workers of a simulated node of Ray on this machine.

    python docs/measurements/cluster_overhead.py --cases 1000 --workers 8 --seconds 1

A case of a scripted suite sleeps and loads nothing. Overhead a case: what the workers were there for, from the first begin of a
case to the last row, less the sleeping, over the number of cases. Between two rows of one worker lies: the row's way to the
controller, its test there, the line on the disk, the next order's way back. The controller's memory is sampled on the way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "cluster"))

from scripted_package import BENCHMARK, install


def lines(folder: Path) -> list[dict[str, Any]]:
    """The rows that are there by now."""
    found = list(folder.glob("reports/*/records.jsonl"))
    rows = [json.loads(line) for line in found[0].read_text().splitlines()] if found else []
    return [row for row in rows if row["schema"] == "kvsuite.record/1"]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        does = str(given.seconds)
        install(folder, [{"name": f"c{at}", "model": "tiny", "bytes": at, "does": does} for at in range(given.cases)])
        (folder / "test_scripted.py").write_text(BENCHMARK)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": given.workers, "include_dashboard": False})
        command = [
            sys.executable, "-m", "pytest", "-q", "test_scripted.py", "--kv-cluster=auto", "--kv-cluster-cores=1",
            "--kv-device=cpu", "-p", "no:cacheprovider",
        ]  # fmt: skip
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        with (folder / "out.txt").open("wb") as out:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
            memory: list[tuple[int, int]] = []
            while process.poll() is None:
                time.sleep(5)
                try:
                    held = psutil.Process(process.pid).memory_info().rss
                    # one that has ended and was not waited for yet holds nothing
                    if held:
                        memory.append((len(lines(folder)), held))
                except psutil.Error:
                    break
            code = process.wait()
        rows = lines(folder)
        cluster.shutdown()
        assert code == 0, (folder / "out.txt").read_text()[-2000:]
        assert len({row["id"] for row in rows}) == len(rows) == given.cases
        report(rows, memory, given)


def report(rows: list[dict[str, Any]], memory: list[tuple[int, int]], given: argparse.Namespace) -> None:
    """Overhead and memory."""
    spans: dict[int, list[list[float]]] = {}
    for row in rows:
        spans.setdefault(row["effective"]["pid"], []).append(row["samples"]["clock"])
    gaps = []
    for own in spans.values():
        own.sort()
        gaps += [after[0] - before[1] for before, after in itertools.pairwise(own)]
    slept = sum(end - begin for own in spans.values() for begin, end in own)
    there = sum(own[-1][1] - own[0][0] for own in spans.values())
    gaps.sort()
    print(f"{len(rows)} cases of {given.seconds:g} s on {len(spans)} workers")
    print(f"overhead a case: {1000 * (there - slept) / len(rows):.1f} ms in the mean")
    print(
        f"between two cases of a worker: median {1000 * median(gaps):.1f} ms, p99 {1000 * gaps[int(0.99 * len(gaps))]:.1f} ms"
    )
    shown = 0
    for count, size in memory:
        if count >= shown:
            print(f"controller after {count} rows: {size / 2**20:.1f} MiB")
            shown = count + len(rows) // 10


if __name__ == "__main__":
    main()
