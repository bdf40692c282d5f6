"""How long `python -m kvsuite report` takes for a run of many records, and how much memory: python report_of_many.py [N].

The records are made up, but have what those of a real run have: 15 metrics with the values of five rounds, samples, warnings.
Prints seconds, seconds of a processor, which a busy machine changes less, and the peak resident set of the command.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from kvsuite.case import Case, digest
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.record import Record
from kvsuite.store.store import open_run

VALUES = [0.0123, 0.0121, 0.0127, 0.0122, 0.0125]
TIMED = ("ttft_s", "tpot_s", "e2e_s", "output_tok_s", "decode_step_s", "prefill_s")
ONCE = ("kv_bytes_exact", "cache_tokens_min", "cache_tokens_mean", "cache_tokens_max", "perplexity", "next_token_acc",
        "ppl_ratio", "perplexity_se")  # fmt: skip


def record(number: int, env: str) -> dict[str, Any]:
    """One made-up record of the compression suite."""
    registry = MetricRegistry()
    budget = 16 + number
    case = Case(
        "compression", "hf", "smollm2", f"streaming_{budget}" if number else "baseline", "cpu", "float32",
        policy="streaming_llm" if number else None, policy_params={"start_size": 4, "recent_size": budget - 4},
        workload={"protocol": "streaming-decode", "corpus": "default", "num_samples": 1, "max_tokens": 257,
                  "prompt_tokens": 192, "max_new_tokens": 32, "batch": 1},
        params={"group": "streaming" if number else "baseline", "budget": budget if number else None},
    )  # fmt: skip
    row = Record(
        case, f"benchmarks/test_compression.py::test_compression[{case.id}]", digest(number), digest("settings"),
        case_index=number, rounds=5, warmup=2, env=env, started_utc="2026-01-01T12:00:00+00:00", duration_s=3.5,
        model={"label": "SmolLM2-135M", "revision": "r", "kind": "smollm2"}, warnings=["the machine was busy"],
    )  # fmt: skip
    timed = {name: registry.value(name, VALUES) for name in TIMED}
    row.metrics = timed | {name: registry.value(name, 1.5 + number) for name in ONCE}
    row.metrics["mem_measured_peak_bytes"] = registry.value("mem_measured_peak_bytes", None, reason="not on a CPU")
    row.samples = {
        "rounds": [{"ttft_s": one, "itl_s": [one] * 31} for one in VALUES],
        "texts": [{"index": 0, "nll_sum": 700.5, "tokens": 256, "correct": 100, "chars": 1100, "sha256": "ab"}],
    }
    return row.to_dict()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    environment = {"host": {"name": "host"}, "packages": {}, "gpu": {}}
    facts = {"command": ["pytest"], "options": {}, "environment": environment, "seed": 0, "cases": count}
    with tempfile.TemporaryDirectory() as base:
        store = open_run(Path(base), method="all", model="smollm2", started=datetime(2026, 1, 1), facts=facts)
        store.close()
        lines = b"".join(_line(record(number, digest(environment))) for number in range(count))
        with (store.folder / "records.jsonl").open("ab") as file:
            file.write(lines)
        began = time.perf_counter()
        command = [sys.executable, "-m", "kvsuite", "report", str(store.folder), "--out", str(Path(base, "out"))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime
    print(
        f"{count} records, {len(lines) / 2**20:.0f} MiB: {seconds:.1f} s, {processor:.1f} s of a processor, "
        f"peak {used.ru_maxrss / 1024:.0f} MiB, load {os.getloadavg()[0]:.1f}"
    )


def _line(row: dict[str, Any]) -> bytes:
    import msgspec

    return msgspec.json.encode(row) + b"\n"


if __name__ == "__main__":
    main()
