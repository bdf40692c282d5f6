"""A user's own repository: a marker, two fixtures, ini twins; no benchmarks/ of ours."""

from __future__ import annotations

import pytest
from pytest_runs import TINY_NAMES, Run, run_pytest

from kvsuite.store.validate import validate

INI = """
[pytest]
kv_model = dummy:tiny
kv_device = cpu
kv_threads = 1
kv_prompt_tokens = 16
kv_max_new_tokens = 4
kv_start_size = 2
kv_recent_sizes = 4,8
kv_rounds = 3
kv_num_warmup = 1
"""
OWN_TESTS = """
from dataclasses import replace

import pytest


@pytest.mark.kv_suite("compression")
def test_cache(kv_case, kv_run):
    record = kv_run(kv_case)
    # a user's own rule: tests/plugin/test_own_suite.py wants to see it fail
    assert record.metrics["cache_tokens_max"]["value"] != 10


def test_by_hand(kv_options, kv_run):
    from kvsuite.case import Case
    from kvsuite.options.common import CommonOptions

    options = kv_options.of(CommonOptions)
    workload = {"protocol": "streaming-decode", "corpus": "default", "num_samples": 1, "max_tokens": 32,
                "prompt_tokens": 16, "max_new_tokens": options.max_new_tokens, "batch": 1}
    policy = {"start_size": 1, "recent_size": 2, "positions": "original", "skip_layers": [0]}
    record = kv_run(Case("mine", "hf", options.model, "tight", "cpu", "float32", policy="streaming_llm",
                         policy_params=policy, workload=workload))
    assert record.metrics["cache_tokens_min"]["value"] == 3
    assert record.metrics["cache_tokens_max"]["value"] == 19


@pytest.mark.kv_suite("compression")
def test_twice(kv_case, kv_run):
    kv_run(kv_case)
    with pytest.raises(ValueError, match="kv_run measures one case per test; parametrize the test instead"):
        kv_run(replace(kv_case, name="again"))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("own")
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_own.py").write_text(OWN_TESTS)
    return run_pytest(
        folder, "--strict-markers", "--strict-config", "-W", "error", "-k", "cache or hand or (twice and baseline)",
        KV_ROUNDS="2", KV_MODEL="dummy:tiny",
    )  # fmt: skip


def test_cases_come_from_the_marker_and_options_from_the_ini_file(run: Run) -> None:
    line, *rows = run.lines()
    names = [row["case"]["name"] for row in rows if "::test_cache[" in row["id"]]
    assert sorted(names) == sorted(TINY_NAMES)
    assert line["options"]["recent_sizes"] == [4, 8]
    assert line["options"]["rounds"] == 2, "the environment comes before the ini file"
    assert {row["rounds"] for row in rows} == {2}
    # what computes is known of the run, so that a later one can say what differs
    assert list(line["environment"]["engines"]) == ["hf"]
    assert line["environment"]["engines"]["hf"]["torch"] == line["environment"]["packages"]["torch"]
    for row in rows:
        validate("record", row, row["id"])


def test_a_rule_of_the_user_fails_its_test_and_keeps_the_row(run: Run) -> None:
    assert run.code == pytest.ExitCode.TESTS_FAILED
    assert run.said("2 failed, 5 passed")
    assert run.said("FAILED test_own.py::test_cache[hf-recent_only_10]")
    assert run.said("FAILED test_own.py::test_cache[hf-streaming_10]")
    assert {row["status"] for row in run.lines()[1:]} == {"ok"}


def test_a_case_made_by_hand_is_measured_and_written(run: Run) -> None:
    (row,) = [row for row in run.lines()[1:] if row["id"] == "test_own.py::test_by_hand"]
    assert (row["suite"], row["case"]["name"], row["status"]) == ("mine", "tight", "ok")
    assert row["metrics"]["cache_tokens_min"]["value"] == 3


def test_one_case_per_test(run: Run) -> None:
    (row,) = [row for row in run.lines()[1:] if "::test_twice[" in row["id"]]
    assert row["case"]["name"] == "baseline"


def test_report_has_the_rows_of_both_suites(run: Run) -> None:
    assert {"report.json", "records.jsonl", "table.txt"} <= {path.name for path in run.report.iterdir()}
    assert not run.said("error: ")
