from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvsuite.suites.pipeline.figures.course import Course, Span, spans_of, state_of
from tests.suites.pipeline.pipeline_rows import pipeline_row, simulated


def step(lane: str, start: float, end: float, prompts: int, decodes: int, running: int = 1) -> dict[str, Any]:
    return {
        "lane": lane, "start_s": start, "end_s": end, "prompt_tokens": prompts, "decode_tokens": decodes,
        "running": running, "waiting": 0, "used_blocks": 5,
    }  # fmt: skip


def test_steps_of_a_kind_are_one_span() -> None:
    assert spans_of(
        [
            step("both", 0.0, 1.0, 64, 0),
            step("both", 1.0, 1.1, 0, 2),
            step("both", 1.1, 1.2, 0, 3),
            step("both", 1.2, 1.5, 16, 3),
            step("both", 1.5, 1.6, 0, 4),
        ]
    ) == [
        Span("both", "prompt", 0.0, 1.0, 1, 64, 0),
        Span("both", "decode", 1.0, 1.2, 2, 0, 5),
        Span("both", "both", 1.2, 1.5, 1, 16, 3),
        Span("both", "decode", 1.5, 1.6, 1, 0, 4),
    ]


def test_a_pause_ends_a_span_and_lanes_do_not_end_each_others() -> None:
    assert spans_of(
        [
            step("decode", 0.0, 0.1, 0, 1),
            step("prompt", 0.05, 0.5, 64, 0),
            step("decode", 0.1, 0.2, 0, 1),
            step("decode", 0.4, 0.5, 0, 1),
        ]
    ) == [
        Span("decode", "decode", 0.0, 0.2, 2, 0, 2),
        Span("prompt", "prompt", 0.05, 0.5, 1, 64, 0),
        Span("decode", "decode", 0.4, 0.5, 1, 0, 1),
    ]


def test_only_changes_of_the_state_are_kept_from_the_start_of_their_step_on() -> None:
    found = state_of([step("both", at, at + 1, 0, 1, running) for at, running in enumerate((1, 1, 2, 2, 1))])
    assert found == [(0.0, 1, 0, 5), (2.0, 2, 0, 5), (4.0, 1, 0, 5)]


def test_nothing_runs_while_no_lane_has_a_step_and_what_ends_first_counts_where_two_have_one() -> None:
    steps = [step("prompt", 0.0, 0.5, 64, 0, 3), step("decode", 0.0, 0.2, 0, 1, 2), step("decode", 0.9, 1.0, 0, 1, 2)]
    assert state_of(steps) == [(0.0, 2, 0, 5), (0.2, 3, 0, 5), (0.5, 0, 0, 0), (0.9, 2, 0, 5)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["decode", "prompt", "both"]), st.floats(0, 9), st.floats(1e-4, 1), st.integers(0, 9),
            st.integers(0, 9),
        ),
        max_size=40,
    )
)  # fmt: skip
def test_no_token_is_lost(drawn: list[tuple[str, float, float, int, int]]) -> None:
    steps = [step(lane, start, start + length, prompts, decodes) for lane, start, length, prompts, decodes in drawn]
    spans = spans_of(steps)
    for name in ("prompt_tokens", "decode_tokens"):
        assert sum(getattr(span, name) for span in spans) == sum(one[name] for one in steps)
    assert sum(span.steps for span in spans) == sum(1 for one in steps if one["prompt_tokens"] or one["decode_tokens"])
    assert all(span.start_s <= span.end_s for span in spans)


def test_the_course_of_a_record() -> None:
    decisions: list[dict[str, Any]] = [
        {"time_s": at, "inputs": {}, "decision": {"pipeline": word, "speedup": 1.0 + at, "reasons": [str(at)]}}
        for at, word in enumerate(("prefill", "prefill", "none", "none"))
    ]
    decisions.insert(1, {"time_s": 0.5, "inputs": {}, "phase": "decode", "reason": "its turn"})
    served = simulated(requests=3)
    course = Course.of(pipeline_row(served=served, decisions=decisions)["samples"])
    assert course is not None
    assert course.end_s == served.requests[2].token_s[-1]
    assert course.lanes == {"both"}
    assert [one["time_s"] for one in course.decisions] == [0, 2]
    assert Course.of({}) is None
    assert Course.of({"requests": [], "steps": {"start_s": []}}) is None
