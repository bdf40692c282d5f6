"""The suites of the package, for those who have no checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_runs import run_module

import kvsuite.benchmarks
from kvsuite.__main__ import main

ROOT = Path(__file__).parents[2]
TINY = ("--kv-model=dummy:tiny", "--kv-device=cpu", "--kv-threads=1", "--kv-rounds=2", "--kv-num-warmup=1")


def test_bench_measures_in_the_folder_where_it_is_called(tmp_path: Path) -> None:
    done = run_module(tmp_path, "kvsuite", "bench", "-k", "compression and baseline", *TINY)
    assert done.code == 0, done.out + done.err
    assert "1 passed" in done.out
    assert len(list(tmp_path.glob("reports/*/records.jsonl"))) == 1
    # pytest-benchmark makes a folder of its own
    assert {path.name for path in tmp_path.iterdir()} <= {"reports", ".benchmarks"}


@pytest.mark.parametrize(
    "command", [("kvsuite", "bench"), ("pytest", "-p", "no:cacheprovider", "--pyargs", "kvsuite.benchmarks")]
)
def test_all_suites_of_a_bare_run_are_there(command: tuple[str, ...], tmp_path: Path) -> None:
    done = run_module(tmp_path, *command, "--collect-only", "-q", *TINY)
    for suite in ("compression[hf-baseline]", "dse[nano-none", "perplexity[default-none"):
        assert f"::test_{suite}" in done.out, done.out + done.err


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    done = run_module(tmp_path, "kvsuite", "bench", "--kv-method=nope", *TINY)
    assert done.code == pytest.ExitCode.USAGE_ERROR
    assert "--kv-method=nope: unknown method" in done.err


def test_help_is_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "pytest --pyargs kvsuite.benchmarks" in " ".join(capsys.readouterr().out.split())


def test_the_package_and_the_checkout_have_the_same_suites() -> None:
    package = Path(kvsuite.benchmarks.__file__).parent
    assert {path.name for path in package.glob("test_*.py")} == {
        path.name for path in (ROOT / "benchmarks").glob("test_*.py")
    }
    for path in package.glob("test_*.py"):
        theirs = (ROOT / "benchmarks" / path.name).read_text()
        assert path.read_text() == theirs.replace("pytest benchmarks", "pytest --pyargs kvsuite.benchmarks")
