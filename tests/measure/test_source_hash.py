"""What makes another measurement of a run, and what does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import kvsuite
from kvsuite.measure.source_hash import source_hash

PACKAGE = Path(kvsuite.__file__).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy") / "kvsuite"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def edited(copy: Path, name: str, old: str, new: str) -> str:
    """The hash with one edit, which is taken back."""
    path = copy / name
    before = path.read_text(encoding="utf-8")
    assert old in before
    path.write_text(before.replace(old, new, 1), encoding="utf-8")
    try:
        return source_hash.__wrapped__(copy)
    finally:
        path.write_text(before, encoding="utf-8")


def test_a_copy_has_the_same_hash(copy: Path) -> None:
    assert source_hash.__wrapped__(copy) == source_hash()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("suites/compression/figure.py", "TITLE = ", "# a comment\nTITLE = "),
        ("suites/compression/figure.py", 'TITLE = "', 'TITLE = "Another '),
        ("suites/dse/figures/pareto.py", "annotations\n", "annotations\nimport json\n"),
        ("commands/report.py", "annotations\n", "annotations\nimport json\n"),
        # of what measures: only what is executed
        ("meters/quality.py", "import math", "# a comment\nimport math"),
        ("meters/quality.py", "Pool the losses", "Put together the losses"),
    ],
)
def test_what_shows_or_explains_is_not_in_it(copy: Path, name: str, old: str, new: str) -> None:
    assert edited(copy, name, old, new) == source_hash()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("meters/quality.py", "exponential(mean)", "exponential(-mean)"),
        ("suites/compression/quality.py", "_LEAK_NATS, _LEAK_SIGMAS = 0.1", "_LEAK_NATS, _LEAK_SIGMAS = 0.2"),
        ("engines/hf/session.py", "annotations\n", "annotations\nimport json\n"),
        ("nanovllm/scheduler.py", "annotations\n", "annotations\nimport json\n"),
    ],
)
def test_what_measures_is_in_it(copy: Path, name: str, old: str, new: str) -> None:
    assert edited(copy, name, old, new) != source_hash()
