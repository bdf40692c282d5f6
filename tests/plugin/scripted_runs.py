"""Runs of pytest whose measurements are scripted: every number of every case is known, and nothing is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_runs import copy_benchmarks

# stands in the place of the runner that measures; everything from the fixture on is real
CONFTEST = """
import json
from pathlib import Path

import pytest

from kvsuite.metrics import MetricRegistry
from kvsuite.measure.runner import Measured
from kvsuite.record import Record
from kvsuite.plugin.stash import RUNNER


def pytest_configure(config):
    # figures are half of the time of such a run, and a library that draws cannot be loaded twice into one process
    plugin = config.pluginmanager.get_plugin("kvsuite")
    config.hook.pytest_kvsuite_figures._remove_plugin(plugin)


class Scripted:
    class sessions:
        current = None

    # what a process remembers of a CUDA error or a stopped case
    poisoned = None
    timed_out = False
    spent = None

    def __init__(self, script):
        self.script, self.environment = script, script["environment"]

    def run(self, case, case_id, *, order_index, run_rounds, progress):
        script = self.script["all"] | self.script["cases"].get(case.name, {})
        record = Record(case=case, id=case_id, rounds=script.get("rounds", 5), order_index=order_index)
        record.case_key = case.key(model_revision="r1", dataset_revision="d1")
        record.model = {"label": "tiny"}
        record.effective = dict(script.get("effective", {}))
        record.status = script.get("status", "ok")
        if record.status != "ok":
            record.error = {"type": "E", "message": "planted", "phase": "decode", "traceback": None}
        elif "reason" in script:
            record.status, record.reason = "skipped", script["reason"]
        else:
            value = MetricRegistry().value
            for name, samples in script["metrics"].items():
                record.metrics[name] = value(name, samples, reason="scripted", clock="perf_counter")
        return Measured(record, script.get("tokens"))


@pytest.fixture(scope="session")
def kv_runner(pytestconfig):
    script = json.loads((Path(__file__).parent / "script.json").read_text())
    runner = pytestconfig.stash[RUNNER] = Scripted(script)
    return runner
"""
NLL = [2.0 + 0.7 * (i % 11) for i in range(200)]
METRICS: dict[str, Any] = {
    "perplexity": 150.0,
    "perplexity_se": 20.0,
    "nll_tokens": 200,
    "kv_bytes_exact": 1_048_576,
    "mem_measured_peak_bytes": 8_000_000_000,
    "ttft_s": [0.100, 0.101, 0.099, 0.100, 0.102],
    "decode_tok_s_agg": [50.0, 50.2, 49.9, 50.1, 50.0],
    "mem_measured_driver_bytes": 9_000_000_000,
}
ARGUMENTS = (
    "--kv-model=dummy:tiny",
    "--kv-device=cpu",
    "--kv-start-size=2",
    "--kv-recent-sizes=4",
    "-p",
    "no:cacheprovider",
)


def tokens(nll: list[float]) -> dict[str, Any]:
    """Sidecar columns of one text."""
    n = len(nll)
    return {"text": [0] * n, "position": list(range(n)), "token": [7] * n, "nll": nll, "correct": [True] * n}


def project(folder: Path) -> Path:
    """The compression suite with scripted measurements."""
    copy_benchmarks(folder)
    (folder / "conftest.py").write_text(CONFTEST)
    script(folder)
    return folder


def script(
    folder: Path, *, gpu: dict[str, Any] | None = None, everywhere: dict[str, Any] | None = None, **cases: Any
) -> None:
    """Say what will be measured: ``streaming_6={"metrics": {...}}`` changes one case, the rest is as in `METRICS`."""
    for case in cases.values():
        case["metrics"] = METRICS | case.get("metrics", {})
    environment = {
        "host": {"os": "Linux", "cpu": "scripted", "cores": 2}, "gpu": gpu or {}, "packages": {}, "command": ["pytest"],
    }  # fmt: skip
    facts = {"metrics": METRICS, "tokens": tokens(NLL)} | (everywhere or {})
    (folder / "script.json").write_text(json.dumps({"environment": environment, "all": facts, "cases": cases}))
