"""Real pairs of runs of the same code: no rule is broken, however busy the machine is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, TINY, copy_benchmarks, run_pytest

from kvsuite.comparison import compare, parse_rules, read_side

ARGUMENTS = (*TINY, "--kv-rounds=7", "-k", "baseline or streaming_6", "-q", "-p", "no:cacheprovider")


def pairs_without_a_regression(folder: Path, pairs: int) -> None:
    """Measure ``pairs`` + 1 times, each in a process of its own, and compare each run with the one before."""
    copy_benchmarks(folder, conftest=NO_FIGURES)
    for _ in range(pairs + 1):
        run = run_pytest(folder, *ARGUMENTS)
        assert run.code == 0, run.out
    runs = sorted((folder / "reports").iterdir(), key=lambda path: (path / "records.jsonl").stat().st_mtime_ns)
    sides = [read_side(str(path), option="A") for path in runs]
    for base, now in itertools.pairwise(sides):
        result = compare(base, now, parse_rules("default,missing,new,renamed"))
        assert result.failures == []
        assert result.compared == 2
        exact = [row for row in result.rows if row.metric.startswith(("kv_", "mem_weights", "cache_"))]
        assert len(exact) >= 10
        assert {row.verdict for row in exact} == {"same"}


def test_three_pairs(tmp_path: Path) -> None:
    pairs_without_a_regression(tmp_path / "project", 3)


@pytest.mark.slow
def test_twenty_pairs(tmp_path: Path) -> None:
    pairs_without_a_regression(tmp_path / "project", 20)
