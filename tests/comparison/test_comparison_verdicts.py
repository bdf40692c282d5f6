"""The verdict on a metric, whatever happened to it."""

from __future__ import annotations

from typing import Any

import pytest
from comparison_samples import record, side

from kvsuite.comparison import Comparison, Side, compare, parse_rules
from kvsuite.comparison.rules import Rules
from kvsuite.comparison.tables import comparison_markdown, comparison_text
from kvsuite.comparison.verdicts import Verdict, change_text, number_pair

DEFAULT = parse_rules("default")
NLL = [1.0 + 0.5 * (i % 7) for i in range(100)]
QUALITY = {"perplexity": 10.0, "perplexity_se": 1.0, "nll_tokens": 100, "next_token_acc": 0.4, "nll_sum": 230.0}
FAILED = {"type": "E", "message": "planted"}


def one(before: dict[str, Any], after: dict[str, Any], metric: str, rules: Rules = DEFAULT, **sides: Any) -> Verdict:
    result = compare(side([record("a", before)]), side([record("a", after)], **sides), rules)
    (row,) = [row for row in result.rows if row.metric == metric]
    return row


EXACT = {
    "equal": ("kv_bytes_exact", 4096, 4096, "same"),
    "one byte more": ("kv_bytes_exact", 4096, 4097, "regression"),
    "fewer": ("kv_bytes_exact", 4096, 4000, "better"),
    "no rule": ("cache_tokens_min", 10, 11, "worse"),
    "inside the limit": ("mem_measured_peak_bytes", 1000000, 1019999, "worse"),
    "beyond it": ("mem_measured_peak_bytes", 1000000, 1020001, "regression"),
    "rounding of an allocator": ("mem_measured_peak_bytes", 10**9, 10**9 + 512, "same"),
    "higher is better": ("ratio_effective", 0.5, 0.48, "regression"),
    "from zero": ("ratio_effective", 0.0, 0.0, "same"),
    "to zero": ("kv_bytes_exact", 4096, 0, "better"),
    "more than nothing": ("kv_bytes_exact", 0, 1, "regression"),
    "a fact": ("nll_tokens", 100, 90, "information"),
    "ambient": ("mem_measured_driver_bytes", 1, 100, "information"),
    "lost": ("kv_bytes_exact", 4096, None, "regression"),
    "ambient lost": ("mem_measured_driver_bytes", 4096, None, "information"),
    "never had": ("kv_bytes_exact", None, 4096, "information"),
}


@pytest.mark.parametrize(("metric", "before", "after", "word"), EXACT.values(), ids=EXACT)
def test_what_has_no_noise(metric: str, before: Any, after: Any, word: str) -> None:
    row = one({metric: before}, {metric: after}, metric)
    assert row.verdict == word
    failures = compare(side([record("a", {metric: before})]), side([record("a", {metric: after})]), DEFAULT).failures
    assert bool(failures) == (word == "regression")


def test_a_metric_that_the_record_lacks_is_lost_and_one_that_nobody_had_is_no_row() -> None:
    row = one({"kv_bytes_exact": 1, "kld": None}, {"kld": None}, "kv_bytes_exact")
    assert (row.verdict, row.note) == ("regression", "lost: the record lacks it")
    both = compare(side([record("a", {"kld": None})]), side([record("a", {"kld": None})]), DEFAULT)
    assert (both.rows, both.compared) == ([], 1)


@pytest.mark.parametrize("field", ["version", "clock", "protocol", "unit"])
def test_another_definition_is_another_number(field: str) -> None:
    now = record("a", {"kv_bytes_exact": 9000})
    now["metrics"]["kv_bytes_exact"][field] = 2 if field == "version" else "other"
    (row,) = compare(side([record("a", {"kv_bytes_exact": 4096})]), side([now]), DEFAULT).rows
    assert row.verdict == "information"
    assert row.note.startswith(f"another {field}: ")


STATUS = {
    ("ok", "oom"): "regression",
    ("ok", "crashed"): "regression",
    ("ok", "skipped"): "regression",
    ("skipped", "error"): "regression",
    ("oom", "ok"): "better",
    ("oom", "oom"): "information",
    ("oom", "error"): "information",
    ("skipped", "skipped"): "information",
}


@pytest.mark.parametrize(("before", "after", "word"), [(*pair, word) for pair, word in STATUS.items()])
def test_how_a_case_ended(before: str, after: str, word: str) -> None:
    rows = []
    for status in (before, after):
        reason = "planted" if status == "skipped" else None
        error = None if status in ("ok", "skipped") else FAILED
        rows.append(record("a", {"kv_bytes_exact": 1}, status=status, reason=reason, error=error))
    (row,) = compare(side(rows[:1]), side(rows[1:]), DEFAULT).rows
    assert (row.metric, row.change, row.verdict) == ("status", f"{before} -> {after}", word)


def columns(nll: list[float], correct: list[float] | list[bool] | None = None, token: int = 7) -> dict[str, Any]:
    n = len(nll)
    return {
        "text": [0] * n,
        "position": list(range(n)),
        "token": [token] * n,
        "nll": nll,
        "correct": correct or [True] * n,
    }


def quality(shift: list[float] | None, change: float, **more: Any) -> Comparison:
    """Two sides with token losses, the second shifted; without losses where ``shift`` is None."""
    before = record("a", QUALITY)
    after = record("a", QUALITY | {"perplexity": QUALITY["perplexity"] * change} | more)
    old = {} if shift is None else {before["id"]: columns(NLL)}
    new = {} if shift is None else {before["id"]: columns([a + b for a, b in zip(NLL, shift, strict=True)])}
    return compare(side([before], tokens=old), side([after], tokens=new), parse_rules("perplexity:+0.5%"))


def verdict(result: Comparison, metric: str = "perplexity") -> Verdict:
    (row,) = [row for row in result.rows if row.metric == metric]
    return row


def test_perplexity_is_judged_by_its_paired_error() -> None:
    even = [0.006 + (0.01 if i % 2 else -0.01) for i in range(100)]
    row = verdict(quality(even, 1.006))
    assert (row.verdict, row.note) == ("regression", "more than 2 standard errors, paired by token")
    uneven = [0.6 if i == 0 else 0.0 for i in range(100)]
    assert verdict(quality(uneven, 1.006)).verdict == "unstable"
    assert verdict(quality([0.0] * 100, 1.00005)).verdict == "same"
    assert verdict(quality([-value for value in even], 0.994)).verdict == "better"


def test_without_token_losses_the_standard_errors_decide() -> None:
    row = verdict(quality(None, 1.006))
    assert row.verdict == "unstable"
    assert "not paired: a side has no token losses" in row.note
    assert verdict(quality(None, 1.5)).verdict == "regression"


def test_losses_of_other_tokens_are_not_paired() -> None:
    before = record("a", QUALITY)
    after = record("a", QUALITY | {"perplexity": 10.06})
    tokens = [{before["id"]: columns(NLL, token=token)} for token in (7, 8)]
    result = compare(side([before], tokens=tokens[0]), side([after], tokens=tokens[1]), parse_rules("perplexity:+0.5%"))
    assert "not paired" in verdict(result).note


def test_accuracy_has_its_own_error() -> None:
    result = quality(None, 1.0, next_token_acc=0.41)
    assert verdict(result, "next_token_acc").verdict == "same"
    assert verdict(quality(None, 1.0, next_token_acc=0.9), "next_token_acc").verdict == "better"


def answers(correct: list[float] | None, exact: float) -> Comparison:
    """Two sides of 100 samples, the first of which answers half of them; without samples where ``correct`` is None."""
    before = record("a", {"retrieval_exact": 0.5, "retrieval_exact_se": 0.05, "retrieval_logprob": -2.0})
    after = record("a", {"retrieval_exact": exact, "retrieval_exact_se": 0.05, "retrieval_logprob": -2.0})
    half = [0.0, 1.0] * 50
    tokens = [{} if correct is None else {before["id"]: columns(NLL, correct=side_of)} for side_of in (half, correct)]
    return compare(
        side([before], tokens=tokens[0]), side([after], tokens=tokens[1]), parse_rules("retrieval_exact:-5%")
    )


def test_exact_answers_are_judged_by_their_paired_samples() -> None:
    # a lost answer in ten of the hundred, and seven lost where six others were won: the mean of the latter is noise
    lost = [0.0, 0.0] * 10 + [0.0, 1.0] * 40
    row = verdict(answers(lost, 0.4), "retrieval_exact")
    assert (row.verdict, row.note) == ("regression", "more than 2 standard errors, paired by sample")
    exchanged = [0.0, 0.0] * 8 + [1.0, 1.0] * 5 + [0.0, 1.0] * 37
    assert verdict(answers(exchanged, 0.47), "retrieval_exact").verdict == "unstable"
    assert verdict(answers([0.0, 1.0] * 50, 0.5), "retrieval_exact").verdict == "same"
    unpaired = verdict(answers(None, 0.4), "retrieval_exact")
    assert (unpaired.verdict, "not paired: a side has no sample losses" in unpaired.note) == ("unstable", True)


TIMES = {"ttft_s": [0.1, 0.101, 0.099, 0.1, 0.102], "kv_bytes_exact": 1000}
SLOW = {"ttft_s": [0.2, 0.201, 0.199, 0.2, 0.202], "kv_bytes_exact": 1001}


@pytest.mark.parametrize("gpu", [{"name": "H200"}, {"driver": "580"}])
def test_another_machine_gates_bytes_alone(gpu: dict[str, str]) -> None:
    base, now = side([record("a", TIMES)]), side([record("a", SLOW)], gpu=gpu)
    result = compare(base, now, DEFAULT)
    assert {row.metric: row.verdict for row in result.rows} == {"ttft_s": "information", "kv_bytes_exact": "regression"}
    assert "another machine" in result.notes[0]
    same = compare(side([record("a", TIMES)], gpu=gpu), now, DEFAULT)
    assert {row.verdict for row in same.rows} == {"regression"}


@pytest.mark.parametrize("name", ["threads", "concurrent_workers"])
def test_other_settings_make_times_information(name: str) -> None:
    now = side([record("a", SLOW, effective={name: 2})])
    result = compare(side([record("a", TIMES, effective={name: 1})]), now, DEFAULT)
    row = verdict(result, "ttft_s")
    assert row.verdict == "information"
    assert row.note.startswith(f"{name} 1 -> 2; ")


def test_times_with_other_kernels_are_information() -> None:
    prepared, not_prepared = ({"kernels": words} for words in ("prepared", "not prepared: flashinfer fa3"))
    base = side([record("a", TIMES, effective=prepared)])
    row = verdict(compare(base, side([record("a", SLOW, effective=not_prepared)]), DEFAULT), "ttft_s")
    assert row.verdict == "information"
    assert row.note == (
        "kernels prepared -> not prepared: flashinfer fa3; run python -m kvsuite doctor --prepare --kv-model=m "
        "--kv-device=cpu --kv-dtype=float32 before both"
    )
    # an engine that builds none, and a record that is older than the fact, are compared as ever
    for effective in (prepared, {}):
        other = verdict(compare(base, side([record("a", SLOW, effective=effective)]), DEFAULT), "ttft_s")
        assert other.verdict == "regression"


def test_of_records_older_than_the_kernels_what_attended_tells() -> None:
    old = {"attention": "paged: flashinfer fa3", "decode_attention": {"32": "split"}}
    base = side([record("a", TIMES, effective=old)])

    def found(**effective: Any) -> Any:
        return verdict(compare(base, side([record("a", SLOW, effective=old | effective)]), DEFAULT), "ttft_s")

    missing = {"kernels": "not prepared: flashinfer fa3"}
    slower = found(attention="paged: torch flash", **missing)
    assert slower.verdict == "information"
    assert slower.note.startswith("attention paged: flashinfer fa3 -> paged: torch flash; run python -m kvsuite doctor")
    assert found(decode_attention={"32": "flashinfer fa2"}, **missing).note.startswith(
        "decode_attention split -> flashinfer fa2; "
    )
    # the same ones attended; and engines that build none may say what they like
    assert {found(**missing).verdict, found(attention="sdpa").verdict} == {"regression"}


def test_times_of_two_nodes_of_a_cluster_are_information_and_bytes_are_gated() -> None:
    first, other = ({"node": {"name": name, "ip": "10.0.0.1"}} for name in "ab")
    result = compare(side([record("a", TIMES, effective=first)]), side([record("a", SLOW, effective=other)]), DEFAULT)
    assert (
        verdict(result, "ttft_s").note == "node a (10.0.0.1) -> node b (10.0.0.1); times of two machines do not compare"
    )
    assert {row.metric: row.verdict for row in result.rows} == {"ttft_s": "information", "kv_bytes_exact": "regression"}
    same = compare(side([record("a", TIMES, effective=first)]), side([record("a", SLOW, effective=first)]), DEFAULT)
    assert {row.verdict for row in same.rows} == {"regression"}


def test_pooled_gaps_are_not_rounds() -> None:
    rows = [record("a", {"itl_s": [0.01] * 50}) for _ in range(2)]
    for row in rows:
        row["metrics"]["itl_s"]["pooled"] = "pooled_tokens"
    (found,) = compare(side(rows[:1]), side(rows[1:]), DEFAULT).rows
    assert found.verdict == "information"


def test_several_processes_are_one_side() -> None:
    base = side([record("a", {"kv_bytes_exact": 10})], [record("a", {"kv_bytes_exact": 10})])
    now = side([record("a", {"kv_bytes_exact": 10})], [record("a", {"kv_bytes_exact": None})])
    (row,) = compare(base, now, DEFAULT).rows
    assert row.verdict == "regression", "one process lost it"
    failed = side([record("a", {"kv_bytes_exact": 10})], [record("a", status="oom", error=FAILED)])
    (row,) = compare(base, failed, DEFAULT).rows
    assert row.change == "ok -> oom"


@pytest.mark.parametrize("bad", ["oom", "lost", "absent"])
def test_one_bad_run_makes_no_bad_base(bad: str) -> None:
    fine = record("a", {"kv_bytes_exact": 100})
    worse = {
        "oom": record("a", status="oom", error=FAILED),
        "lost": record("a", {"kv_bytes_exact": None}),
        "absent": record("a", {"nll_tokens": 3}),
    }[bad]
    for base in (side([worse], [fine], [fine]), side([fine], [fine], [worse])):
        result = compare(base, side([record("a", {"kv_bytes_exact": 300})]), DEFAULT)
        assert [line.partition(": ")[2] for line in result.failures] == [
            "kv_bytes_exact 100 B -> 300 B (+200.0 %); regression; rule kv_bytes_exact:+0"
        ]
        (failure,) = compare(base, side([record("a", {"kv_bytes_exact": None})]), DEFAULT).failures
        assert "lost" in failure
        (failure,) = compare(base, side([record("a", {"nll_tokens": 3})]), DEFAULT).failures
        assert "lost: the record lacks it" in failure
        if bad == "oom":
            assert result.rows[0].note == "1 of 3 runs of the base are left out: oom"
            (failure,) = compare(base, side([worse]), DEFAULT).failures
            assert "ok -> oom" in failure


ZEROS = {
    "a rate that is gone": ("decode_tok_s_agg", 50.0, 0.0, "decode_tok_s:-5%", "regression"),
    "beyond an absolute limit": ("ttft_s", 0.0, 5.0, "ttft:+5ms", "regression"),
    "inside it": ("ttft_s", 0.0, 0.001, "ttft:+5ms", "unstable"),
    "a share of nothing": ("ttft_s", 0.0, 5.0, "ttft:+5%", "unstable"),
    "both": ("ttft_s", 0.0, 0.0, "ttft:+5%", "same"),
}


@pytest.mark.parametrize(("metric", "before", "after", "rule", "word"), ZEROS.values(), ids=ZEROS)
def test_times_of_zero(metric: str, before: float, after: float, rule: str, word: str) -> None:
    assert one({metric: [before] * 5}, {metric: [after] * 5}, metric, parse_rules(rule)).verdict == word


HOSTILE = "x\x1b]0;owned\x07\x1b[2J\nfine\n::error::x"


def test_names_from_a_file_do_not_steer_the_terminal() -> None:
    base, now = (
        Side(HOSTILE, side([record(HOSTILE, {"kv_bytes_exact": size}), record(HOSTILE + more)]).runs)
        for size, more in ((1, "b"), (2, "c"))
    )
    result = compare(base, now, parse_rules("default,missing"))
    assert len(result.failures) == 2
    lines = comparison_text(result).splitlines()
    assert not [line for line in lines if not line.isprintable() or line.startswith("::")]
    assert all(line.isprintable() for line in result.failures[:1])
    marked = comparison_markdown(result).splitlines()
    assert not [line for line in marked if not line.isprintable() or line.startswith("::")]


def test_markdown_says_what_it_leaves_out() -> None:
    base, now = (
        side([record(f"c{i}", {"kv_bytes_exact": size, "ttft_s": [1.0] * 5}) for i in range(250)]) for size in (1, 2)
    )
    result = compare(base, now, DEFAULT)
    text = comparison_markdown(result)
    assert "- 50 more against the rules" in text
    assert "300 more rows that matter less: --all shows them" in text
    assert comparison_markdown(result, everything=True).count("| ttft\\_s |") == 250


# which case is which


def names(result: Comparison) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    return result.missing, result.new, result.renamed


def compared(base: Side, now: Side) -> Comparison:
    return compare(base, now, parse_rules("missing,new,renamed"))


@pytest.mark.parametrize("axis", ["model", "dtype", "engine", "suite"])
def test_another_model_or_dtype_is_another_case(axis: str) -> None:
    result = compared(side([record("a", id="x")]), side([record("a", id="x", **{axis: "other"})]))
    assert names(result) == (["x"], ["x"], [])
    assert result.compared == 0


def test_a_renamed_case_is_found_by_key_but_never_takes_another_ones_place() -> None:
    base = side([record("a", id="old"), record("b", id="b")])
    result = compared(base, side([record("b", id="b"), record("a", id="new")]))
    assert names(result) == ([], [], [("old", "new")])
    assert result.failures == ["new: was old; rule renamed"]
    # two cases of one key keep their names
    twins = [record("a", id="x"), record("a", id="y")]
    assert names(compared(side(twins), side(twins[::-1]))) == ([], [], [])
    assert names(compared(side(twins), side([record("a", id="z")]))) == (["y"], [], [("x", "z")])


def test_a_case_that_failed_before_its_text_was_known_is_found_by_id() -> None:
    failed = record("a", status="oom", error=FAILED)
    failed["case_key"] = "sha256:without revisions"
    result = compared(side([record("a", {"kv_bytes_exact": 1})]), side([failed]))
    assert names(result) == ([], [], [])
    assert result.rows[0].verdict == "regression"


def test_missing_and_new_fail_by_their_words_alone() -> None:
    base, now = side([record("a"), record("b")]), side([record("a"), record("c")])
    assert compare(base, now, DEFAULT).failures == []
    assert [line.partition(": ")[2] for line in compared(base, now).failures] == [
        "missing, the base has it; rule missing", "new, nothing to compare with; rule new",
    ]  # fmt: skip
    assert compare(base, now, parse_rules("ttft:off")).counts == {}


# how numbers are written

NUMBERS = {
    "bytes": (2.0**20, 2.0**21, "bytes", ("1 MiB", "2 MiB")),
    "exact where rounding hides": (2.0**30, 2.0**30 + 1, "bytes", ("1,073,741,824 bytes", "1,073,741,825 bytes")),
    "times": (0.0123, 0.5, "s", ("12.3 ms", "500 ms")),
    "pure": (17.6951, 17.8, "1", ("17.7", "17.8")),
    "none": (None, 3.0, "tokens", ("none", "3 tokens")),
    "small": (1e-5, 2e-5, "s", ("10 us", "20 us")),
}


@pytest.mark.parametrize(("base", "now", "unit", "texts"), NUMBERS.values(), ids=NUMBERS)
def test_numbers(base: float | None, now: float | None, unit: str, texts: tuple[str, str]) -> None:
    assert number_pair(base, now, unit) == texts


def test_changes() -> None:
    assert [change_text(change) for change in (0.03, -0.0512, 0.0, 1e-6, None, "ok -> oom")] == [
        "+3.0 %", "-5.1 %", "+0.0 %", "+0.0001 %", "n/a", "ok -> oom",
    ]  # fmt: skip
