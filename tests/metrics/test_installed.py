"""Metrics that packages bring by the entry-point group: what cannot be used is one line, and the others go on working."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvsuite.entry_points import find, warn
from kvsuite.metrics.installed import installed_metrics

MODULE = """
from kvsuite.metrics import Metric

JOULES = Metric("joules_per_token", "J", "lower", "timed", "energy / generated tokens", label="Energy", format=".3f")
TAKEN = [Metric("ttft_s", "s", "lower", "timed", "mine"), Metric("watts", "W", "none", "ambient", "mean power")]
NONE = "joules"
"""
POINTS = """[kvsuite.metrics]
broken = energy_meter:MISSING
joules = energy_meter:JOULES
none = energy_meter:NONE
taken = energy_meter:TAKEN
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package on the path, as an installer would leave it."""
    (tmp_path / "energy_meter.py").write_text(MODULE)
    info = tmp_path / "energy_meter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: energy-meter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    # workers of xdist leave the telling to their controller
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    # another test of this process may have looked for entry points before
    caches = find, warn, installed_metrics
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("package")
def test_usable_ones_are_there_and_the_others_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert [metric.name for metric in installed_metrics()] == ["joules_per_token", "watts"]
    lines = capsys.readouterr().err.splitlines()
    where = "kvsuite: warning: energy-meter: entry point kvsuite.metrics"
    assert [line.removeprefix(where).partition(";")[0] for line in lines] == [
        ", broken = energy_meter:MISSING: cannot be imported (AttributeError: module 'energy_meter' has no attribute "
        "'MISSING')",
        ", none = energy_meter:NONE: 'joules' is no Metric",
        ", taken = energy_meter:TAKEN: the metric ttft_s is taken by kvsuite",
    ]
    assert all(";" in line for line in lines), "a mend"
