"""Which cases the page rings as not beaten: the plot's own function, run by node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import kvsuite.reporting

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node: apt install nodejs")
SCRIPT = Path(kvsuite.reporting.__file__).parent / "templates" / "plot.js"
COLUMNS = {"kv": {"better": "lower", "timed": False}, "tpot": {"better": "lower", "timed": True}}


def ringed(points: list[tuple[float, float, float | None]]) -> tuple[list[int], int]:
    """Rows that are ringed, and how many are in no order; a point is (bytes, seconds, half the interval as a share)."""
    data = {"spread": {"kv": None, "tpot": [share for _, _, share in points]}}
    rows = [{"row": row, "x": size, "y": time, "q": 0} for row, (size, time, _) in enumerate(points)]
    code = f"""{SCRIPT.read_text()}
const columns = {json.dumps(COLUMNS)};
const plot = {{ columns: new Map(Object.entries(columns)), data: {json.dumps(data)},
  selects: {{ x: {{ value: 'kv' }}, y: {{ value: 'tpot' }}, q: {{ value: '' }} }},
  column(name) {{ return this.columns.get(this.selects[name].value); }} }};
const front = TradeOff.prototype.judge.call(plot, {json.dumps(rows)});
console.log(JSON.stringify([front.map((point) => point.row).sort(), plot.uncertain]));"""
    done = subprocess.run([str(NODE), "-e", code], capture_output=True, text=True, timeout=60, check=True)
    found, uncertain = json.loads(done.stdout)
    return found, uncertain


def test_what_differs_by_its_noise_is_not_beaten_by_it() -> None:
    assert ringed([(10, 1.00, 0.05), (10, 0.98, 0.05), (10, 2.0, 0.05)]) == ([0, 1], 0)


def test_times_that_are_too_uncertain_are_never_the_best() -> None:
    assert ringed([(10, 1.0, 0.02), (10, 0.5, 0.8), (5, 0.1, None)]) == ([0], 2)


def test_a_better_time_inside_its_noise_saves_nothing_that_is_worse_otherwise() -> None:
    assert ringed([(10, 1.00, 0.05), (20, 0.98, 0.05), (20, 0.5, 0.05)]) == ([0, 2], 0)
