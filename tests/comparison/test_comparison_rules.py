"""Rules: what they allow, what they refuse, which of several counts."""

from __future__ import annotations

import math

import pytest
from comparison_samples import record, side
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.comparison import compare, default_rules, known_metrics, parse_rules
from kvsuite.comparison.limits import parse_limit
from kvsuite.comparison.rules import Rule
from kvsuite.comparison.tables import comparison_text
from kvsuite.errors import UserError
from kvsuite.metrics.registry import ALIASES, Metric, MetricRegistry

KNOWN = known_metrics()
SUITES = ["compression", "perplexity", "dse"]


def find(text: str, metric: str, suite: str = "compression", case: str = "streaming_64") -> Rule | None:
    return parse_rules(text).of_case(suite, (case, f"hf-{case}")).find(metric, *KNOWN[metric][:3])


LIMITS = {
    "+2%": (100.0, 2.0, 2.1),
    "-5%": (100.0, 5.0, 5.1),
    "0.5%": (100.0, 0.5, 0.51),
    "+16MiB": (1e9, 2.0**24, 2.0**24 + 16),
    "+5ms": (1.0, 0.005, 0.0051),
    "+0.02": (3.0, 0.02, 0.021),
    "+1e-3": (3.0, 1e-3, 1.1e-3),
    "+0": (3.0, 0.0, 1e-9),
}


@pytest.mark.parametrize(("text", "numbers"), LIMITS.items(), ids=LIMITS)
def test_a_limit_allows_itself_and_no_more(text: str, numbers: tuple[float, float, float]) -> None:
    before, allowed, exceeded = numbers
    limit = parse_limit(text)
    assert not limit.exceeded(before, allowed, "near_deterministic")
    assert limit.exceeded(before, exceeded, "near_deterministic")
    assert not limit.exceeded(before, -1e9, "near_deterministic")


def test_a_share_of_nothing_has_an_absolute_limit() -> None:
    limit = parse_limit("+2%")
    assert limit.exceeded(0.0, 1.0, "deterministic")
    assert not limit.exceeded(0.0, 0.0, "deterministic")
    assert not limit.exceeded(0.0, 0.0009, "near_deterministic")
    assert limit.exceeded(0.0, 0.0011, "near_deterministic")
    assert not parse_limit("+0.5").exceeded(0.0, 0.4, "near_deterministic")


def test_off_allows_everything() -> None:
    assert not parse_limit("off").exceeded(1.0, math.inf, "deterministic")


def test_the_last_rule_that_matches_counts() -> None:
    text = "mem_*:+1%,peak_vram:+5%,compression/streaming_*/peak_vram:off,perplexity/*:+9%"
    found = {
        (suite, case): rule.text
        for suite, case in [("compression", "streaming_64"), ("compression", "baseline"), ("perplexity", "x")]
        if (rule := find(text, "mem_measured_peak_bytes", suite, case))
    }
    assert found == {
        ("compression", "streaming_64"): "compression/streaming_*/peak_vram:off",
        ("compression", "baseline"): "peak_vram:+5%",
        ("perplexity", "x"): "perplexity/*:+9%",
    }
    assert find(text, "ttft_s") is None


def test_a_sign_chooses_the_metrics_of_a_pattern() -> None:
    assert find("*:+2%", "ttft_s") is not None
    assert find("*:+2%", "decode_tok_s_agg") is None
    assert find("*:2%", "decode_tok_s_agg") is not None
    # a fact without direction and an ambient number are never gated
    assert find("*:2%", "nll_tokens") is None
    assert find("*:2%", "mem_measured_driver_bytes") is None


def test_cases_are_called_by_name_and_by_id() -> None:
    for case in ("streaming_64", "hf-streaming_64", "stream*", "hf-*"):
        assert find(f"compression/{case}/ttft:+1%", "ttft_s") is not None
    assert find("compression/nano-*/ttft:+1%", "ttft_s") is None


def test_a_whole_id_is_a_name() -> None:
    whole = "benchmarks/test_compression.py::test_compression[hf-streaming_64]"
    rules = parse_rules(f"compression/{whole}/kv_bytes_exact:+0")
    assert rules.of_case("compression", ("streaming_64", "hf-streaming_64", whole)).find(
        "kv_bytes_exact", *KNOWN["kv_bytes_exact"][:3]
    )
    assert rules.about_nothing([("compression", (whole,))]) == []


def test_a_pattern_that_matches_no_case_is_told() -> None:
    rules = parse_rules("ttft:+5%,compression/hf-streeming_*/tpot:+5%,compression/base*/tpot:+5%")
    assert rules.about_nothing([("compression", ("baseline", "hf-baseline"))]) == [
        "rule compression/hf-streeming_*/tpot:+5% is about no case that was compared"
    ]
    result = compare(side([record("a")]), side([record("a")]), parse_rules("*/b/ttft:+5%"))
    assert result.notes == ["rule */b/ttft:+5% is about no case that was compared"]


def test_rules_about_what_is_not_known_yet() -> None:
    parse_rules("joules:+1%,mine/ttft:+1%").check(KNOWN, SUITES, "--fail", complete=False)
    for misspelt in ("dsee/ttft:+1%", "perplexty:+1%"):
        with pytest.raises(UserError, match="did you mean"):
            parse_rules(misspelt).check(KNOWN, SUITES, "--fail", complete=False)
    with pytest.raises(UserError, match="write - or no sign"):
        parse_rules("decode_tok_s:+5%").check(KNOWN, SUITES, "--fail", complete=False)


def test_words_and_the_default() -> None:
    rules = parse_rules("default, missing ,new,renamed,unstable,ttft:off")
    assert rules.words == {"missing", "new", "renamed", "unstable"}
    assert len(rules.rules) == len(default_rules()) + 1
    rules.check(KNOWN, SUITES, "--fail")
    assert parse_rules("missing")


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_names_its_metric(alias: str) -> None:
    (rule,) = parse_rules(f"{alias}:5%").rules
    assert rule.metric == ALIASES[alias]
    parse_rules(f"{alias}:5%").check(KNOWN, SUITES, "--fail")


BAD = {
    "": "is empty",
    ",,": "is empty",
    "ttft": "ttft is no rule",
    "ttft:": "nothing is no limit; write",
    ":+2%": "nothing is no scope",
    "/ttft:+2%": "is no scope",
    "ttft:+1e999": "is no finite limit",
    "ttft:+nan": "is no limit",
    "ttft:++2%": "is no limit",
    "ttft:+2%%": "%% of +2%% is no unit",
    "ttft:+2parsec": "parsec of +2parsec is no unit",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=[text or "empty" for text in BAD])
def test_what_is_no_rule_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_rules(text)
    assert message in str(caught.value)


UNKNOWN = {
    "decode_tok_s_ag:-5%": "no metric decode_tok_s_ag (did you mean decode_tok_s_agg?)",
    "decode_toks:-5%": "did you mean decode_tok_s?",
    "dsee/ttft:+5%": "no suite dsee (did you mean dse?); there are compression, dse, perplexity",
    "decode_tok_s:+5%": "is better when higher, so what fails is a change of -; write - or no sign",
    "kvv_*:+5%": "no metric that kvv_* matches can have this limit",
    "mem_*:+5s": "no metric that mem_* matches can have this limit",
    "mem_measured_driver_bytes:+5%": "is never judged",
    "itl_s:+5%": "pools the gaps of all rounds and is never judged; write tpot_s",
}


@pytest.mark.parametrize(("text", "message"), UNKNOWN.items(), ids=UNKNOWN)
def test_rules_that_can_never_gate_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_rules(text).check(KNOWN, SUITES, "--fail")
    assert str(caught.value).startswith(f"--fail={text}: ")
    assert message in str(caught.value)


@given(st.text(st.sampled_from("abtf_*?[]/:,+-%.0189eMiBs ptm"), max_size=40))
def test_any_text_is_rules_or_one_line(text: str) -> None:
    message = "fine"
    try:
        parse_rules(text).check(KNOWN, SUITES, "--fail")
    except (UserError, ValueError) as error:
        message = str(error)
    assert message
    assert "\n" not in message


def test_the_default_gates_what_others_say_of_their_metrics() -> None:
    energy = Metric("joules", "J", "lower", "near_deterministic", "energy", limit="+5%")
    rows = []
    for value in (10.0, 11.0):
        rows.append(record("a"))
        rows[-1]["metrics"]["joules"] = MetricRegistry([energy]).value("joules", value)
    base, now = side([rows[0]]), side([rows[1]])
    result = compare(base, now, parse_rules("default", known_metrics(base, now)))
    assert [(row.metric, row.verdict, row.rule) for row in result.rows] == [("joules", "regression", "joules:+5%")]
    assert "joules" in comparison_text(compare(base, base, parse_rules("default"))), "shown even where nothing moved"
    rows[0]["metrics"]["joules"]["limit"] = "+5%,missing"
    broken = side([rows[0]])
    with pytest.raises(ValueError, match="%,missing"):
        parse_rules("default", known_metrics(broken))
