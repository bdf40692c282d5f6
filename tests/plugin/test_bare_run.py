"""What a bare run leaves out: suites that are no part of it, unless their file or -k asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, TINY, copy_benchmarks, run_pytest

CONFTEST = f"""
from kvsuite.case import Case
from kvsuite.options.common import CommonOptions
from kvsuite.suites.suite import Suite
{NO_FIGURES}

class Fifth(Suite):
    name = "fifth"

    def cases(self, options):
        common = options.of(CommonOptions)
        return [
            Case(self.name, "hf", common.model, name, "cpu", "float32", workload={{"prompt_tokens": 8}})
            for name in ("one", "compression-only")
        ]

    def measure(self, case, session, run):
        return run.found


def pytest_kvsuite_suites(config):
    return [Fifth]
"""
TEST = """
import pytest


@pytest.mark.kv_suite("fifth")
def test_fifth(kv_case, kv_run):
    kv_run(kv_case)
"""
LINE = (
    "kvsuite: suite fifth is left out (2 cases of benchmarks/test_fifth.py): it is no part of a bare run; give its file, or "
    "-k fifth"
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = copy_benchmarks(tmp_path / "project", conftest=CONFTEST)
    (folder / "benchmarks" / "test_fifth.py").write_text(TEST)
    return folder


def collected(folder: Path, *arguments: str) -> tuple[set[str], list[str]]:
    """Suites whose cases are left, and what is said of those that are not."""
    run = run_pytest(folder, "--collect-only", *TINY, *arguments)
    names = {line.split("_")[1].partition("[")[0] for line in run.said("<Function test_")}
    return names, run.said("left out")


@pytest.mark.parametrize(
    ("arguments", "suites"),
    [
        ((), {"compression"}),
        (("benchmarks",), {"compression"}),
        # what make bench says
        (("benchmarks", "-k", "not (dse and (q4f16 or ctx1024)) and not fake_q3"), {"compression"}),
        (("-k", "fifth"), {"fifth"}),
        (("-k", "fifth or (compression and baseline)"), {"compression", "fifth"}),
        # the word is a suite, whatever a case of another one is called
        (("-k", "compression"), {"compression"}),
        (("-k", "compression and not streaming"), {"compression"}),
        (("-k", "compression-only"), {"fifth"}),
        (("-k", "fifth and compression"), {"fifth"}),
        (("benchmarks/test_fifth.py",), {"fifth"}),
        (("benchmarks/test_fifth.py::test_fifth[hf-one]",), {"fifth"}),
        (("benchmarks/test_fifth.py", "benchmarks/test_compression.py"), {"compression", "fifth"}),
    ],
)
def test_a_suite_without_a_place_in_a_bare_run_is_asked_for(
    project: Path, arguments: tuple[str, ...], suites: set[str]
) -> None:
    found, left_out = collected(project, *arguments)
    assert found == suites
    names_another = any("compression" in one for one in arguments if one.startswith("compression"))
    assert left_out == ([] if "fifth" in suites or names_another else [LINE])


def test_it_is_told_once_for_all_workers_and_what_is_left_is_measured(project: Path) -> None:
    pytest.importorskip("xdist")
    run = run_pytest(project, *TINY, "-n2")
    assert run.code == 0
    assert run.said("left out") == [LINE]
    assert {row["suite"] for row in run.rows().values()} == {"compression"}


def test_a_run_of_which_nothing_is_left_says_so(project: Path) -> None:
    (project / "benchmarks" / "test_compression.py").unlink()
    run = run_pytest(project)
    assert run.code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert run.said("left out") == [LINE]
    assert not run.reports
