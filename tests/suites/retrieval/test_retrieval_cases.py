"""The space of the retrieval suite: names, which methods are run with the question inside, and what is refused."""

from __future__ import annotations

import pytest

from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.suites.retrieval.cases import retrieval_cases
from kvsuite.suites.retrieval.suite import RetrievalSuite


def cases(**typed: str) -> list[Case]:
    return retrieval_cases(default_options(**({"device": "cpu"} | typed)))


def test_the_default_is_two_tasks_and_three_caches_of_which_two_hold_as_much() -> None:
    found = cases()
    methods = ["full", "streaming_64", "recent_only_64"]
    assert [case.name for case in found] == [f"{t}-320-{m}" for t in ("facts4", "multi_query") for m in methods]
    assert found[0].policy is None
    assert (found[0].workload["depths"], found[0].workload["num_samples"]) == ([0.0, 0.5, 1.0], 24)


def test_lengths_formats_and_parameters_are_axes() -> None:
    found = cases(
        task="copy", task_lengths="128,256", cache_dtype="auto,int8", task_methods="full,snapkv(keep_ratio=[0.2,0.5])"
    )
    names = [case.name for case in found]
    assert names[:6] == [
        "copy-128-full", "copy-128-snapkv_kr=0.2", "copy-128-snapkv_kr=0.2_question_seen", "copy-128-snapkv_kr=0.5",
        "copy-128-snapkv_kr=0.5_question_seen", "copy-128-full_int8",
    ]  # fmt: skip
    assert len(set(names)) == len(names) == 20


def test_what_looks_at_queries_is_also_run_with_the_question_inside() -> None:
    asked = {
        case.params["method"]: case.params["question"] for case in cases(task="copy", task_methods="h2o,knorm,full")
    }
    assert asked == {"h2o": "after", "h2o_question_seen": "question_seen", "knorm": "after", "full": "after"}
    # each question alone inside its prompt would be compared with questions in turn
    in_turn = cases(task="multi_query", task_methods="h2o,full")
    assert [case.params["question"] for case in in_turn] == ["after", "after"]
    pressed = [case.params["method"] for case in cases(task="copy", task_methods="kvpress:SnapKV(keep_ratio=0.3)")]
    assert pressed == ["SnapKV_kr=0.3", "SnapKV_kr=0.3_question_seen"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ({"task": "riddles"}, r"--kv-task=riddles: .*facts1"),
        ({"task": "copy,copy"}, "--kv-task=copy,copy: names the same value twice"),
        ({"task_depths": "0.5,0.5"}, "--kv-task-depths=.* names the same value twice"),
        ({"task_depths": "1.5"}, r"--kv-task-depths=1\.5: .*must lie from 0 to 1"),
        ({"task_lengths": "16"}, "--kv-task-lengths=16: .*at least 32"),
        ({"task_samples": "1"}, "--kv-task-samples=1: .*at least 2"),
        ({"task_methods": "full,full"}, "--kv-task-methods=full,full: names the same value twice"),
        (
            {"task_methods": "streaming_llm(start_size=4,recent_size=60),streaming_llm(start_size=8,recent_size=56)"},
            "--kv-task-methods: streaming_64 occurs twice",
        ),
        ({"task_methods": "full(size=3)"}, "the full cache has no parameters"),
        ({"task_methods": "snapkw"}, "--kv-task-methods=snapkw: unknown method; known: full, "),
        ({"task_methods": "snapkv(size=3)"}, "snapkv has no parameter size"),
        ({"task_methods": "kvpress:None"}, "--kv-task-methods=kvpress:None"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_cannot_be_is_refused_in_a_line(typed: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        cases(**typed)
    assert "\n" not in str(caught.value)


def test_a_dummy_costs_one_context_and_the_full_cache_is_computed_once() -> None:
    suite, options = RetrievalSuite(), default_options(device="cpu")
    full, streaming = cases(task="facts4")[:2]
    assert suite.cost(streaming, options).bulk > suite.cost(full, options).bulk > 24 * 320
    # contexts share steps: eight of the default length, one of the longest
    [[short], [long]] = [cases(task="facts4", task_methods="full", task_lengths=str(one)) for one in (320, 4000)]
    assert suite.cost(long, options).steps == 8 * suite.cost(short, options).steps
    [dummy] = cases(task="facts4", task_methods="full", model="dummy:tiny")
    assert suite.cost(dummy, options).bulk == 320
