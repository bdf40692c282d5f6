"""A comparison as a part of pytest: planted regressions fail the right test, and nothing else does."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

# a run inside this process forgets what it imported, and numpy cannot be loaded twice
import pyarrow.parquet
import pytest
import rich.table
import scipy.stats
from pytest_runs import run_pytest
from scripted_runs import ARGUMENTS, METRICS, NLL, project, script, tokens

pytestmark = pytest.mark.usefixtures("what_runs_import")

LOADED = (pyarrow, rich, scipy)
RULES = "peak_vram:+2%,kv_bytes_exact:+0,perplexity:+0.5%,decode_tok_s:-5%,ttft:+10%"
ID = "benchmarks/test_compression.py::test_compression[hf-streaming_6]"


class Project:
    """A folder with a first run in it."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester, self.path = pytester, pytester.path

    def run(self, *arguments: str) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess(*ARGUMENTS, *arguments)

    def comparison(self) -> dict[str, Any]:
        newest = max(self.path.glob("reports/*/comparison.json"), key=lambda path: path.stat().st_mtime_ns)
        found: dict[str, Any] = json.loads(newest.read_text())
        return found

    def junit(self) -> dict[str, str | None]:
        """Failure text, or None, of every test case."""
        cases = list(ElementTree.parse(self.path / "junit.xml").iter("testcase"))
        found = {case.attrib["name"]: case.findtext("failure") for case in cases}
        assert len(found) == len(cases), "a case is there twice"
        return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its first run, which is the base of the others."""
    folder = project(tmp_path_factory.mktemp("first"))
    assert run_pytest(folder, *ARGUMENTS, "-q").code == 0
    return folder


@pytest.fixture
def based(pytester: pytest.Pytester, first: Path) -> Project:
    """A copy of it."""
    shutil.copytree(first, pytester.path, dirs_exist_ok=True)
    return Project(pytester)


PLANTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "+3 % allocated bytes": (
        {"mem_measured_peak_bytes": 8_240_000_000}, "mem_measured_peak_bytes 7.451 GiB -> 7.674 GiB (+3.0 %)", "peak_vram:+2%",
    ),
    "one more KV block": (
        {"kv_bytes_exact": 1_048_576 + 16 * 1024}, "kv_bytes_exact 1 MiB -> 1.016 MiB (+1.6 %)", "kv_bytes_exact:+0",
    ),
    "a bound broken by a byte": (
        {"kv_bytes_exact": 1_048_577}, "kv_bytes_exact 1,048,576 bytes -> 1,048,577 bytes (+9.5e-05 %)", "kv_bytes_exact:+0",
    ),
    "half the speed": (
        {"decode_tok_s_agg": [25.0, 25.1, 24.9, 25.0, 25.2]}, "decode_tok_s_agg 50 tok/s -> 25 tok/s (-50.0 %)",
        "decode_tok_s:-5%",
    ),
    "lost": ({"perplexity": None}, "perplexity 150 -> none (n/a)", "perplexity:+0.5%"),
}  # fmt: skip


@pytest.mark.parametrize(("metrics", "line", "rule"), PLANTED.values(), ids=PLANTED)
def test_a_planted_regression_fails_its_case_and_no_other(
    based: Project, metrics: dict[str, Any], line: str, rule: str
) -> None:
    script(based.path, streaming_6={"metrics": metrics})
    result = based.run("--kv-compare=latest", f"--kv-fail={RULES}", "--junitxml=junit.xml")
    assert result.ret == 1
    result.assert_outcomes(passed=2, failed=1)
    failures = based.junit()
    text = failures.pop("test_compression[hf-streaming_6]")
    assert set(failures.values()) == {None}
    assert text is not None
    assert f"{ID}: {line}; regression; rule {rule}" in text
    assert "compared with streaming_llm_tiny_" in text
    (row,) = [row for row in based.comparison()["rows"] if row["verdict"] == "regression"]
    assert (row["case"], row["rule"]) == (ID, rule)


def test_perplexity_is_paired_by_token(based: Project) -> None:
    # +0.6 %, which two standard errors of 13 % each would never show
    worse = [loss + 0.006 + (0.004 if i % 2 else -0.004) for i, loss in enumerate(NLL)]
    script(based.path, streaming_6={"metrics": {"perplexity": 150.0 * 1.006018}, "tokens": tokens(worse)})
    result = based.run("--kv-compare=latest", f"--kv-fail={RULES}", "--junitxml=junit.xml")
    assert result.ret == 1
    text = based.junit()["test_compression[hf-streaming_6]"]
    assert text is not None
    assert (
        "perplexity 150 -> 150.9 (+0.6 %); regression; rule perplexity:+0.5%; more than 2 standard errors, paired"
        in text
    )


def test_a_perplexity_that_few_tokens_moved_is_unstable(based: Project) -> None:
    worse = [*NLL[:-1], NLL[-1] + 2.0]  # +1 %, all of it from one token
    script(based.path, streaming_6={"metrics": {"perplexity": 150.0 * 1.01005}, "tokens": tokens(worse)})
    result = based.run("--kv-compare=latest", f"--kv-fail={RULES}")
    result.assert_outcomes(passed=3)
    assert based.comparison()["counts"]["unstable"] == 1
    result = based.run(f"--kv-compare={based.path / 'reports'}", f"--kv-fail={RULES},unstable")
    assert result.ret == 0, "the folder holds both runs, whose median is the base"


def test_the_same_numbers_pass_and_are_in_the_table(based: Project) -> None:
    result = based.run("--kv-compare=latest", f"--kv-fail={RULES},missing,new,renamed,unstable")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        ["*kvsuite comparison*", "hf-*kv_bytes_exact*1 MiB*1 MiB*+0.0 %*same*kv_bytes_exact:+0*", "3 cases compared: *"]
    )
    found = based.comparison()
    assert found["schema"] == "kvsuite.comparison/1"
    assert found["failures"] == []
    assert {row["metric"] for row in found["rows"]} == set(METRICS)


def test_without_rules_nothing_fails(based: Project) -> None:
    script(based.path, streaming_6={"metrics": {"kv_bytes_exact": 2_000_000}})
    result = based.run("--kv-compare=latest")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["hf-streaming_6*kv_bytes_exact*+90.7 %*worse*", "*no rules, so nothing fails"])


def test_an_oom_where_there_was_none_is_a_regression(based: Project) -> None:
    script(based.path, streaming_6={"status": "oom"})
    based.run("--kv-compare=latest", "--kv-fail=default").assert_outcomes(passed=2, failed=1)
    (row,) = [row for row in based.comparison()["rows"] if row["metric"] == "status"]
    assert (row["change"], row["verdict"], row["note"]) == ("ok -> oom", "regression", "planted")


def test_a_case_that_is_skipped_now_has_lost_its_numbers(based: Project) -> None:
    script(based.path, streaming_6={"reason": "kvpress is missing"})
    result = based.run("--kv-compare=latest", "--kv-fail=default", "--junitxml=junit.xml")
    result.assert_outcomes(passed=2, failed=1)
    text = based.junit()["test_compression[hf-streaming_6]"]
    assert text is not None
    assert "status ok -> skipped; regression; kvpress is missing" in text


def test_another_gpu_turns_times_into_information_and_gates_bytes(based: Project) -> None:
    slow = {"ttft_s": [1.0, 1.01, 0.99, 1.0, 1.02], "kv_bytes_exact": 2_000_000}
    script(based.path, gpu={"name": "H200", "driver": "580.1"}, streaming_6={"metrics": slow})
    result = based.run("--kv-compare=latest", f"--kv-fail={RULES}")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["note: another machine, so times are information and no gate: GPU none -> H200; *"])
    words = {row["metric"]: row["verdict"] for row in based.comparison()["rows"] if row["case"] == ID}
    assert (words["ttft_s"], words["kv_bytes_exact"]) == ("information", "regression")


def test_missing_new_and_renamed_cases(based: Project) -> None:
    # other sizes: two cases less, two more
    result = based.run("--kv-compare=latest", "--kv-fail=missing,new", "--kv-recent-sizes=5", "--junitxml=junit.xml")
    result.assert_outcomes(passed=1, failed=4)
    failures = based.junit()
    assert failures["test_compression[hf-baseline]"] is None
    missing, new = failures["test_compression[hf-streaming_6]"], failures["test_compression[hf-streaming_7]"]
    assert missing is not None
    assert new is not None
    assert "missing, the base has it; rule missing" in missing
    assert "new, nothing to compare with; rule new" in new
    # without the words they are listed and do not fail
    again = based.run(f"--kv-compare={_first(based)}", "--kv-fail=default", "--kv-recent-sizes=5")
    again.assert_outcomes(passed=3)
    again.stdout.re_match_lines([rf"missing: {re.escape(ID)}", r"new: .*streaming_7\]"])


def test_a_renamed_case_is_found_by_its_key(based: Project) -> None:
    test = based.path / "benchmarks" / "test_compression.py"
    test.write_text(test.read_text().replace("def test_compression", "def test_caches"))
    result = based.run("--kv-compare=latest", "--kv-fail=default,missing,new")
    result.assert_outcomes(passed=3)
    result.stdout.re_match_lines([rf"renamed: {re.escape(ID)} is now .*::test_caches\[hf-streaming_6\]"])
    based.run(f"--kv-compare={_first(based)}", "--kv-fail=renamed").assert_outcomes(failed=3)


def test_what_was_deselected_is_not_missing(based: Project) -> None:
    result = based.run("--kv-compare=latest", "--kv-fail=default,missing", "-k", "baseline")
    result.assert_outcomes(passed=1, deselected=2)
    assert based.comparison()["missing"] == []


def test_nothing_in_common_fails(based: Project) -> None:
    result = based.run(f"--kv-compare={_first(based)}", "--kv-fail=default", "--kv-dtype=bfloat16")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["warning: nothing was compared: *another model, dtype*"])


def test_a_run_whose_tests_were_all_skipped_compared_nothing(based: Project) -> None:
    conftest = based.path / "benchmarks" / "conftest.py"
    skipping = "\n\n@pytest.fixture(autouse=True)\ndef _skip():\n    pytest.skip('planted')\n"
    conftest.write_text(conftest.read_text() + skipping)
    result = based.run("--kv-compare=latest", "--kv-fail=default")
    result.assert_outcomes(skipped=3)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["warning: nothing was compared: *"])
    assert based.run("--kv-compare=latest", "--kv-fail=default", "--kv-plan").ret == 0


def _first(based: Project) -> Path:
    return min(based.path.glob("reports/*"), key=lambda path: path.stat().st_mtime_ns)


def test_the_ini_file_gates_too(based: Project) -> None:
    ini = based.path / "pytest.ini"
    ini.write_text(
        ini.read_text() + "kv_compare = latest\nkv_fail = kv_bytes_exact:+1MiB,compression/stream*/kv_*:+0\n"
    )
    metrics = {"metrics": {"kv_bytes_exact": 1_050_000}}
    script(based.path, streaming_6=dict(metrics), baseline=dict(metrics))
    based.run().assert_outcomes(passed=2, failed=1)
    based.run("--kv-fail=off").assert_outcomes(passed=3)


def test_pytest_benchmarks_own_storage(pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_benchmark")
    project(pytester.path)
    made = Project(pytester)
    # its files are written where a round was timed through it
    timed = "\n\ndef test_timed(benchmark):\n    benchmark.pedantic(int, rounds=2)\n"
    test = made.path / "benchmarks" / "test_compression.py"
    test.write_text(test.read_text() + timed)
    made.run("--benchmark-autosave").assert_outcomes(passed=4)
    script(made.path, streaming_6={"metrics": {"kv_bytes_exact": 2_000_000}})
    result = made.run("--benchmark-compare", "--kv-fail=default", "--junitxml=junit.xml")
    assert result.ret == 1
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["hf-streaming_6*kv_bytes_exact*1 MiB*1.907 MiB*+90.7 %*regression*"])
    assert made.junit()["test_compression[hf-streaming_6]"]
    # paired, because the run's folder is still there
    worse = [loss + 0.006 for loss in NLL]
    script(made.path, baseline={"metrics": {"perplexity": 150.0 * 1.006018}, "tokens": tokens(worse)})
    made.run("--benchmark-compare=0001", "--kv-fail=perplexity:+0.5%").assert_outcomes(passed=3, failed=1)


BAD = {
    "metric": ("--kv-fail=peak_vramm:+2%", "--kv-fail=peak_vramm:+2%: no metric peak_vramm (did you mean peak_vram?)"),
    "suite": ("--kv-fail=compresion/ttft:+2%", "no suite compresion (did you mean compression?)"),
    "sign": ("--kv-fail=peak_vram:-2%", "is better when lower, so what fails is a change of +; write + or no sign"),
    "limit": ("--kv-fail=peak_vram:2percent", "percent of 2percent is no unit; use % or B, bytes, KiB"),
    "unit": ("--kv-fail=peak_vram:+5ms", "is in bytes, not in s; write the limit in its unit or in %"),
    "fact": ("--kv-fail=nll_tokens:+5%", "has no better direction and is never judged; drop the rule"),
    "word": ("--kv-fail=mising", "mising is no rule; did you mean missing?"),
    "scope": ("--kv-fail=a//ttft:+5%", "is no scope; write METRIC, SUITE/METRIC or SUITE/CASE/METRIC"),
    "path": ("--kv-compare=nowhere", "--kv-compare=nowhere: cannot be read (No such file or directory); give a run's folder"),
    "a test": ("--kv-compare=benchmarks/test_compression.py", "not a run of kvsuite"),
    "no base": ("--kv-fail=default", "there is nothing to compare with; add --kv-compare=latest"),
    "no run yet": ("--kv-compare=latest", "--kv-compare=latest: no run under reports that has a case of this one"),
}  # fmt: skip


@pytest.mark.parametrize(("argument", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_at_the_start(based: Project, argument: str, message: str) -> None:
    if argument == "--kv-compare=latest":
        shutil.rmtree(based.path / "reports")
    with_base = argument.startswith("--kv-fail") and argument != "--kv-fail=default"
    result = based.run(argument, *(["--kv-compare=latest"] if with_base else []))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if "kvsuite: " in line]
    assert message in line
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_a_run_without_our_cases_is_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess("--kv-compare=latest", "--kv-fail=default")
    result.assert_outcomes(passed=1)
    assert "comparison" not in result.stdout.str()


@pytest.fixture
def forked(tmp_path: Path, first: Path) -> Path:
    """The project with a base, for runs on workers."""
    pytest.importorskip("xdist")
    shutil.copytree(first, tmp_path / "forked")
    return tmp_path / "forked"


def test_under_xdist_the_right_case_fails(forked: Path) -> None:
    script(forked, streaming_6={"metrics": {"kv_bytes_exact": 2_000_000, "tpot_s": 0.0112}})
    give_step(forked, 0.010)
    run = run_pytest(
        forked, *ARGUMENTS, "-n2", "--kv-compare=latest", "--kv-fail=default,missing", "--junitxml=junit.xml",
        "--kv-recent-sizes=4,5",
    )  # fmt: skip
    assert run.code == 1
    failed = [case.attrib["name"] for case in ElementTree.parse(forked / "junit.xml").iter("testcase") if len(case)]
    assert failed == ["test_compression[hf-streaming_6]"]
    assert run.said("new: benchmarks/test_compression.py::test_compression[hf-streaming_7]")
    told = {row["case"]["name"]: row["warnings"] for row in newest_rows(forked)}
    disturbed = {name: [line for line in lines if "measured alone" in line] for name, lines in told.items()}
    [warning] = disturbed.pop("streaming_6")
    assert warning.startswith("tpot_s is 12.0% above that of streaming_llm_")
    assert not any(disturbed.values()), "the others have no decode steps"


def give_step(folder: Path, seconds: float) -> None:
    """Write a decode step into the base's record of the case that changes."""
    [path] = folder.glob("reports/*/records.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    [row] = [line for line in lines if line.get("id") == ID]
    row["metrics"]["tpot_s"] = row["metrics"]["ttft_s"] | {"value": seconds}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def newest_rows(folder: Path) -> list[dict[str, Any]]:
    path = max(folder.glob("reports/*/records.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["schema"] == "kvsuite.record/1"]


def test_under_xdist_pytest_benchmarks_comparison_is_refused(forked: Path) -> None:
    run = run_pytest(forked, *ARGUMENTS, "-n2", "--benchmark-compare")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert run.said("kvsuite: --benchmark-compare: pytest-benchmark switches itself off under xdist (-n)")
    assert run.said("use --kv-compare=latest")
