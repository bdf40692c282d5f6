from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.meters.timing import RequestTimes, RoundTimes


def request(*times: float, start: float = 0.0, prompt: int = 100, prefill_end: float | None = None) -> RequestTimes:
    return RequestTimes(prompt, prompt, [(time, 1) for time in times], start=start, prefill_end=prefill_end)


def test_one_request() -> None:
    one = request(2.0, 2.5, 3.25, 3.5, start=1.0, prefill_end=1.75)
    assert (one.generated, one.ttft_s, one.e2e_s) == (4, 1.0, 2.5)
    assert one.tpot_s == 0.5
    assert one.itl_s == [0.5, 0.75, 0.25]
    assert sum(one.itl_s) / 3 == one.tpot_s
    assert RoundTimes([one], "scripted").metrics() == {
        "ttft_s": 1.0,
        "e2e_s": 2.5,
        "tpot_s": 0.5,
        "prefill_s": 0.75,
        "prefill_tok_s_computed": 100 / 0.75,
        "prefill_tok_s_logical": 100 / 0.75,
        "decode_tok_s_req": 2.0,
        "decode_tok_s_agg": 2.0,
        "output_tok_s": 4 / 2.5,
    }


def test_one_token_has_no_tpot() -> None:
    one = request(2.0, start=1.0)
    assert one.tpot_s is None
    assert one.itl_s == []
    found = RoundTimes([one], "scripted").metrics()
    assert found["tpot_s"] is found["decode_tok_s_req"] is found["decode_tok_s_agg"] is None
    assert (found["ttft_s"], found["e2e_s"], found["output_tok_s"]) == (1.0, 1.0, 1.0)


def test_a_chunk_is_not_a_token() -> None:
    one = RequestTimes(10, 10, [(1.0, 1), (2.0, 3), (4.0, 2)])
    assert one.generated == 6
    assert one.itl_s == [1.0, 2.0]
    assert one.tpot_s == 3.0 / 5
    assert RoundTimes([one], "scripted").metrics()["decode_tok_s_agg"] == 5 / 3


def test_the_first_token_is_never_a_gap() -> None:
    assert request(100.0, 101.0, 102.0).itl_s == [1.0, 1.0]


def test_computed_is_not_logical() -> None:
    """A prompt of 39 tokens of which a prefix cache held 38 (measurement.md 1.3)."""
    one = RequestTimes(39, 1, [(0.5, 1), (1.0, 1)], prefill_end=0.25)
    found = RoundTimes([one], "scripted").metrics()
    assert (found["prefill_tok_s_computed"], found["prefill_tok_s_logical"]) == (4.0, 156.0)


def test_without_a_prefill_stamp_there_is_no_prefill() -> None:
    found = RoundTimes([request(1.0, 2.0), request(1.0, 2.0, prefill_end=0.5)], "scripted").metrics()
    assert found["prefill_s"] is found["prefill_tok_s_computed"] is found["prefill_tok_s_logical"] is None


def test_aggregate_and_per_request_rates_differ() -> None:
    fast = request(1.0, 1.5, 2.0, 2.5, 3.0)
    late = request(2.0, 4.0, 6.0, start=1.0)
    found = RoundTimes([fast, late], "scripted").metrics()
    assert found["ttft_s"] == 1.0
    assert found["e2e_s"] == (3.0 + 5.0) / 2
    assert found["tpot_s"] == (0.5 + 2.0) / 2
    assert found["decode_tok_s_req"] == 1 / 1.25
    # from the first token of all to the last of all
    assert found["decode_tok_s_agg"] == (4 + 2) / (6.0 - 1.0)
    assert found["output_tok_s"] == 8 / 6.0


def test_one_short_request_leaves_no_tpot_but_an_aggregate() -> None:
    found = RoundTimes([request(1.0), request(1.0, 2.0)], "scripted").metrics()
    assert found["tpot_s"] is found["decode_tok_s_req"] is None
    assert found["decode_tok_s_agg"] == 1.0


def gaps() -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(1e-4, 10), min_size=2, max_size=30)


@given(gaps=gaps(), start=st.floats(0, 1000))
def test_the_numbers_of_a_request_agree(gaps: list[float], start: float) -> None:
    times: list[float] = []
    for gap in gaps:
        times.append((times[-1] if times else start) + gap)
    one = request(*times, start=start)
    assert one.tpot_s is not None
    assert one.tpot_s * (one.generated - 1) + one.ttft_s == pytest.approx(one.e2e_s, rel=1e-9)
    assert sum(one.itl_s) / len(one.itl_s) == pytest.approx(one.tpot_s, rel=1e-9)
    found = RoundTimes([one], "scripted").metrics()
    assert found["output_tok_s"] == pytest.approx(one.generated / one.e2e_s)
    assert found["decode_tok_s_agg"] == pytest.approx(found["decode_tok_s_req"])


@given(gaps=gaps(), copies=st.integers(1, 6))
def test_requests_in_step_only_scale_the_aggregates(gaps: list[float], copies: int) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    alone = RoundTimes([request(*times, prefill_end=gaps[0] / 2)], "scripted").metrics()
    together = RoundTimes([request(*times, prefill_end=gaps[0] / 2)] * copies, "scripted").metrics()
    for name, value in alone.items():
        assert value is not None
        scale = copies if name in ("decode_tok_s_agg", "output_tok_s") else 1
        assert together[name] == pytest.approx(scale * value), name


def test_the_full_batch_begins_with_the_last_first_token_and_ends_with_the_first_last_one() -> None:
    # the prompt of the second is fed while the first waits with its first token
    first, second = request(1.0, 3.5, 4.0, 4.5), request(3.0, 3.5, 4.0, 4.5)
    assert RoundTimes([first, second], "scripted").full_batch() == (0.5, 4.0)
    assert RoundTimes([first, second], "scripted").metrics()["decode_tok_s_agg"] == 6 / 3.5
    # one that runs ahead ends the phase
    ahead = request(1.0, 2.0, 3.5, 4.0)
    assert RoundTimes([ahead, second], "scripted").full_batch() == (0.5, 4.0)


def test_without_a_step_of_all_there_is_no_full_batch() -> None:
    assert RoundTimes([request(1.0, 2.0), request(2.0, 3.0)], "scripted").full_batch() is None
    assert RoundTimes([request(1.0), request(1.0)], "scripted").full_batch() is None


@given(gaps=gaps(), copies=st.integers(1, 5))
def test_of_requests_in_step_the_full_batch_is_their_decoding(gaps: list[float], copies: int) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    together = RoundTimes([request(*times)] * copies, "scripted")
    step, rate = together.full_batch() or (0.0, 0.0)
    assert step == pytest.approx(together.metrics()["tpot_s"])
    assert rate == pytest.approx(copies / step)


def test_the_prefill_phase_is_that_of_all_prompts() -> None:
    early, late = request(2.0, 3.0, prompt=30, prefill_end=1.0), RequestTimes(50, 20, [(4.0, 1)], prefill_end=2.5)
    assert RoundTimes([early, late], "scripted").prefill_phase() == (2.5, 20.0, 32.0)
    assert RoundTimes([early, request(2.0)], "scripted").prefill_phase() is None
    alone = RoundTimes([early], "scripted")
    assert alone.prefill_phase() == tuple(
        alone.metrics()[name] for name in ("prefill_s", "prefill_tok_s_computed", "prefill_tok_s_logical")
    )
