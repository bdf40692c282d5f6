from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.workloads.windows import (
    PREFIX_RULES,
    PROTOCOLS,
    TextCounts,
    Window,
    default_prefix,
    merge_windows,
    original_perplexity,
    plan_windows,
    protocol_title,
    target_positions,
    target_weights,
    window_inputs,
)

PREFIX = -7
lengths, contexts = st.integers(2, 400), st.integers(3, 60)


def first_context(windows: list[Window]) -> dict[int, int]:
    """Position where the context of every target begins."""
    return {t: w.begin for w in windows for t in range(w.first_scored, w.end)}


def check_windows(windows: list[Window], ctx: int, room: int = 0) -> None:
    """What holds for every protocol: targets once and in order, each with a token before it, no window too long."""
    positions = target_positions(windows)
    assert positions == sorted(set(positions))
    for window in windows:
        assert window.end - 1 - window.begin <= ctx - room
        assert window.targets >= 0


def test_the_originals_windows() -> None:
    windows = plan_windows("hf-strided", 5000, 2048, 512)
    assert len(windows) == 10
    assert [w.begin for w in windows] == [0, 0, 0, 0, 512, 1024, 1536, 2048, 2560, 3072]
    assert windows[-1] == Window(3072, 5000, 4608)
    assert windows[-1].targets == 392
    assert sum(w.targets for w in windows) == 4999
    assert all(w.end - w.begin == 2048 for w in windows[3:-1])


def test_disjoint_loses_a_token_a_window() -> None:
    windows = plan_windows("disjoint", 5000, 2048)
    assert windows == plan_windows("hf-strided", 5000, 2048, 2048)
    assert [(w.begin, w.end, w.targets) for w in windows] == [(0, 2048, 2047), (2048, 4096, 2047), (4096, 5000, 903)]
    assert sum(w.targets for w in windows) == 4997


@given(lengths, contexts, st.data())
def test_strided_targets(n: int, ctx: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, ctx))
    windows = plan_windows("hf-strided", n, ctx, stride)
    check_windows(windows, ctx)
    assert len(windows) == math.ceil(n / stride)
    missing = set(range(0, n, stride)) if stride == ctx else {0}
    assert set(target_positions(windows)) == set(range(n)) - missing
    for target, begin in first_context(windows).items():
        assert begin == max(target // stride * stride + stride - ctx, 0)


def documentation(n: int, ctx: int, stride: int) -> tuple[list[tuple[int, int, list[int]]], list[int]]:
    """The documentation's loop without the model: begin and end of each window with its scored positions, and its weight."""
    windows, weights, before = [], [], 0
    for begin in range(0, n, stride):
        end = min(begin + ctx, n)
        labels = end - before
        # the model shifts the labels: the first one of a window is predicted by nothing
        windows.append((begin, end, [t for t in range(end - labels, end) if t > begin]))
        weights.append(labels - 1)
        before = end
        if end == n:
            break
    return windows, weights


@given(lengths, contexts, st.data())
def test_the_documentations_windows_and_weights(n: int, ctx: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, ctx))
    windows = plan_windows("hf-docs", n, ctx, stride)
    expected, counts = documentation(n, ctx, stride)
    assert [(w.begin, w.end, list(range(w.first_scored, w.end))) for w in windows] == expected
    check_windows(windows, ctx)
    weights = target_weights("hf-docs", windows)
    assert weights is not None
    for window, count in zip(windows, counts, strict=True):
        own, weights = weights[: window.targets], weights[window.targets :]
        if own:
            assert own == [count / len(own)] * len(own)
    assert weights == []


def test_the_documentations_windows_are_not_the_original_programs() -> None:
    documented, original = plan_windows("hf-docs", 3000, 512, 200), plan_windows("hf-strided", 3000, 512, 200)
    assert [w.begin for w in documented] == list(range(0, 2601, 200))
    assert [w.begin for w in original[:5]] == [0, 0, 88, 288, 488]
    assert target_positions(documented) == target_positions(original) == list(range(1, 3000))
    weights = target_weights("hf-docs", documented)
    assert weights is not None
    assert sum(weights) == pytest.approx(2999 - 13)  # a token less in every window but the first
    assert all(target_weights(p, original) is None for p in PROTOCOLS if p != "hf-docs")


def test_protocols_are_shown_by_whose_rule_they_are() -> None:
    assert protocol_title("hf-strided") == "strided (original program)"
    assert protocol_title("hf-docs") == "strided (Hugging Face documentation)"
    assert protocol_title("disjoint") == "disjoint"


@given(lengths, contexts)
def test_rolling_targets(n: int, ctx: int) -> None:
    windows = plan_windows("lm-eval-rolling", n, ctx)
    check_windows(windows, ctx)
    assert target_positions(windows) == list(range(n))
    assert windows[0].begin == -1
    for window in windows[1:]:
        # whole windows are conditioned on one token, the last one on as many as fit
        assert window.end - 1 - window.begin == ctx
        assert window.targets == ctx or window is windows[-1]


def test_rolling_is_lm_evaluation_harness() -> None:
    """The expected windows of its own test: 34 tokens, max_seq_len 10, context_len 1."""
    text = list(range(34))
    windows = plan_windows("lm-eval-rolling", 34, 10)
    inputs = [window_inputs(text, w, prefix="bos_first", prefix_token=-100) for w in windows]
    assert inputs == [
        [-100, *range(9)],
        list(range(9, 19)),
        list(range(19, 29)),
        list(range(23, 33)),
    ]
    assert [list(range(w.first_scored, w.end)) for w in windows] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 30)),
        list(range(30, 34)),
    ]


@given(contexts, st.integers(2, 6), st.data())
def test_halves_targets(ctx: int, chunks: int, data: st.DataObject) -> None:
    rest = data.draw(st.integers(0, ctx - 1))
    windows = plan_windows("llama.cpp-half", chunks * ctx + rest, ctx)
    check_windows(windows, ctx)
    assert [(w.begin, w.end) for w in windows] == [(k * ctx, (k + 1) * ctx) for k in range(chunks)]
    assert {w.targets for w in windows} == {ctx - ctx // 2 - 1}


@pytest.mark.parametrize("protocol", ["hf-strided", "disjoint"])
@given(n=lengths, ctx=st.integers(4, 60), data=st.data())
def test_prefix_rules(protocol: str, n: int, ctx: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, ctx - 1)) if protocol == "hf-strided" else None
    plain = plan_windows(protocol, n, ctx, stride)
    over = plan_windows(protocol, n, ctx, stride, prefix="bos_over_first")
    before = plan_windows(protocol, n, ctx, stride, prefix="bos_first")
    each = plan_windows(protocol, n, ctx, stride, prefix="bos_each_window")
    assert over == plain
    # the prefix token stands at position -1, and windows of stride == ctx still lose their first token
    lost = set(range(ctx - 1, n, ctx)) if protocol == "disjoint" else set()
    assert target_positions(before) == sorted(set(range(n)) - lost)
    assert target_positions(each) == list(range(n))
    for windows, room in ((before, 0), (each, 1)):
        check_windows(windows, ctx, room)


@given(n=lengths, ctx=st.integers(4, 60), data=st.data())
def test_inputs_end_where_the_last_target_begins(n: int, ctx: int, data: st.DataObject) -> None:
    protocol = data.draw(st.sampled_from(("hf-strided", "hf-docs", "disjoint", "lm-eval-rolling")))
    stride = data.draw(st.integers(1, ctx - 1))
    own = {"lm-eval-rolling": ("bos_first",), "hf-docs": ("none",)}
    rule = data.draw(st.sampled_from(own.get(protocol, PREFIX_RULES)))
    text = list(range(n))
    for window in merge_windows(plan_windows(protocol, n, ctx, stride, prefix=rule)):
        inputs = window_inputs(text, window, prefix=rule, prefix_token=PREFIX)
        assert len(inputs) <= ctx
        predictors = inputs[-window.targets :]
        expected = [t - 1 for t in range(window.first_scored, window.end)]
        # only the first predictor can be the prefix token
        assert predictors[1:] == expected[1:]
        assert predictors[0] in (expected[0], PREFIX)
        assert (inputs.count(PREFIX) == 1) == (
            rule in ("bos_each_window", "bos_over_first") or (rule == "bos_first" and window.begin < 0)
        )


@given(lengths, contexts, st.data())
def test_merging_keeps_targets_and_contexts(n: int, ctx: int, data: st.DataObject) -> None:
    windows = plan_windows("hf-strided", n, ctx, data.draw(st.integers(1, ctx)))
    merged = merge_windows(windows)
    assert first_context(merged) == first_context(windows)
    assert len({w.begin for w in merged}) == len(merged)
    assert all(w.targets for w in merged)


def test_windows_that_begin_together_are_not_joined_beyond_what_they_share() -> None:
    windows = plan_windows("hf-strided", 64, 48, 16)
    assert merge_windows(windows) == [Window(0, 48, 1), Window(16, 64, 48)]
    assert merge_windows(windows, 48) == merge_windows(windows)
    assert merge_windows(windows, 40) == [Window(0, 32, 1), Window(0, 48, 32), Window(16, 64, 48)]


def test_a_text_shorter_than_a_window_is_one_pass() -> None:
    assert merge_windows(plan_windows("hf-strided", 100, 2048, 16)) == [Window(0, 100, 1)]
    assert plan_windows("disjoint", 100, 2048) == [Window(0, 100, 1)]
    assert plan_windows("lm-eval-rolling", 100, 2048) == [Window(-1, 100, 0)]


def test_a_last_window_of_one_token_scores_nothing() -> None:
    windows = plan_windows("disjoint", 9, 4)
    assert windows[-1] == Window(8, 9, 9)
    assert sum(w.targets for w in windows) == 9 - len(windows)
    assert original_perplexity([1.0] * 6, windows) is None


@pytest.mark.parametrize(
    ("arguments", "prefix", "message"),
    [
        (("hf-strided", 100, 16, 17), "none", "--kv-stride=17: longer than the window of 16 tokens"),
        (("hf-strided", 100, 16, 16), "bos_each_window", "--kv-stride=16: longer than the window of 15 tokens"),
        (("hf-strided", 100, 16, 0), "none", "--kv-stride=0"),
        (("hf-strided", 100, 16, None), "none", "--kv-stride=None"),
        (("hf-docs", 100, 16, 17), "none", "--kv-stride=17: longer than the window of 16 tokens"),
        (("hf-docs", 100, 16, 8), "bos_first", "--kv-bos=bos_first: hf-docs cannot have it; choose one of auto, none"),
        (("hf-strided", 0, 16, 8), "none", "the text is empty"),
        (("disjoint", 1, 16), "none", "the text has one token only"),
        (("lm-eval-rolling", 1, 16), "bos_first", "the text has one token only"),
        (("llama.cpp-half", 31, 16), "none", "needs a text of at least 32 tokens, this one has 31"),
        (("disjoint", 100, 2), "none", "--kv-max-length=2"),
        (("disjoin", 100, 16), "none", "--kv-ppl-protocol=disjoin: "),
        (
            ("lm-eval-rolling", 100, 16),
            "none",
            "--kv-bos=none: lm-eval-rolling cannot have it; choose one of auto, bos_first",
        ),
        (("llama.cpp-half", 100, 16), "bos_first", "--kv-bos=bos_first"),
    ],
)
def test_bad_input(arguments: tuple, prefix: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_windows(*arguments, prefix=prefix)
    assert "\n" not in str(caught.value)


def test_a_rule_without_a_token_is_refused() -> None:
    with pytest.raises(UserError, match="--kv-bos=bos_over_first: the tokenizer has neither"):
        window_inputs([1, 2, 3], Window(0, 3, 1), prefix="bos_over_first", prefix_token=None)


def test_defaults_are_the_programs_own() -> None:
    assert [default_prefix(p, has_bos=True) for p in PROTOCOLS] == [
        "none", "none", "none", "bos_first", "bos_over_first",
    ]  # fmt: skip
    assert default_prefix("llama.cpp-half", has_bos=False) == "none"


@given(st.integers(20, 300), st.integers(4, 40), st.floats(0.1, 9), st.floats(0.1, 9), st.data())
def test_the_originals_formula(n: int, ctx: int, early: float, late: float, data: st.DataObject) -> None:
    """Its closed form (systems.md 2.8) for stride < ctx: the first window's loss counts t0 / (t0 - 1) times."""
    stride = data.draw(st.integers(2, ctx - 1))
    windows = plan_windows("hf-strided", n, ctx, stride)
    t0 = min(stride, n)
    nll = [early] * (t0 - 1) + [late] * (n - t0)
    found = original_perplexity(nll, windows)
    assert found == pytest.approx(math.exp((t0 / (t0 - 1) * early * (t0 - 1) + late * (n - t0)) / n), rel=1e-9)
    # constant losses: no difference to the correct formula
    assert original_perplexity([late] * (n - 1), windows) == pytest.approx(math.exp(late), rel=1e-9)


def test_words_and_bytes() -> None:
    counts = TextCounts.of("naïve  words,\nthree")
    assert (counts.words, counts.utf8_bytes) == (3, 20)
    assert TextCounts.of(" a b ").words == 4  # as the harness counts, empty ends included
    nll = 30.0
    assert counts.word_perplexity(nll) == pytest.approx(math.exp(10))
    assert counts.byte_perplexity(nll) == pytest.approx(2 ** counts.bits_per_byte(nll))
    assert counts.bits_per_byte(20 * math.log(2)) == pytest.approx(1)
