"""Every formula of a record, exactly, on a synthetic engine with a scripted clock."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
from synthetic_session import Bench, Script, case, perplexity_of

from kvsuite.record import schema

# What the program that this suite replaces got wrong has a test named after its number: 01 memory came out as 0.00,
# 02 positions, 03 uncompressed layers left out, 04 a ratio that was a bound, 05 warm-up of another shape, 06 a TTFT
# without a prefill, 07 perplexities averaged, 08 unseeded choice, 09 names that collide, 10 no way to skip no layer,
# 11 sizes of 0, 13 the cache read through an API that is gone, 14 a copy of the cache at every token, 15 no dtype,
# 16 no repeats. 12, fewer texts than asked, is in tests/workloads/test_corpus.py.


def value(record: Any, name: str) -> Any:
    return record.metrics[name]["value"]


def test_every_timing_formula_exactly() -> None:
    bench = Bench()
    record = bench.run().record
    assert (record.status, record.reason, record.error) == ("ok", None, None)
    # prefill 0.5, first token at 0.75, then 0.125, 0.25, 0.125
    expected = {
        "prefill_s": 0.5,
        "ttft_s": 0.75,
        "e2e_s": 1.25,
        "tpot_s": 0.5 / 3,
        "prefill_tok_s_computed": 40.0,
        "prefill_tok_s_logical": 40.0,
        "decode_tok_s_req": 6.0,
        "decode_tok_s_agg": 6.0,
        "output_tok_s": 4 / 1.25,
        "itl_s": 0.125,
        "first_step_s": 0.75,
    }
    for name, wanted in expected.items():
        assert value(record, name) == pytest.approx(wanted, rel=1e-12), name
        assert record.metrics[name]["clock"] == "scripted"
    itl = record.metrics["itl_s"]
    assert itl["values"] == [0.125, 0.25, 0.125] * 3
    assert itl["pooled"] == "pooled_tokens"
    assert itl["mean"] == pytest.approx(value(record, "tpot_s"))
    assert record.tokens == {"prompt": 20, "prefill_computed": 20, "generated": 4, "requested": 4}
    assert [row["itl_s"] for row in record.samples["rounds"]] == [[0.125, 0.25, 0.125]] * 3


def test_defect_16_rounds_are_kept_and_spread() -> None:
    record = Bench(Script(round_factors=[1.0, 2.0, 4.0])).run().record
    ttft = record.metrics["ttft_s"]
    assert ttft["values"] == [0.75, 1.5, 3.0]
    # the headline is the median
    assert (ttft["value"], ttft["n"], ttft["mean"]) == (1.5, 3, 1.75)
    assert ttft["std"] == pytest.approx(0.75 * math.sqrt(7 / 3))
    assert record.metrics["decode_tok_s_agg"]["values"] == [6.0, 3.0, 1.5]
    assert record.rounds == 3


def test_chunks_of_several_tokens() -> None:
    # five tokens in three chunks: a gap is not a token
    bench = Bench(Script(gaps=[0.5, 0.25], chunks=[1, 3, 1]))
    record = bench.run(workload={"max_new_tokens": 5}).record
    assert record.status == "ok"
    assert value(record, "tpot_s") == 0.75 / 4
    assert record.metrics["itl_s"]["values"] == [0.5, 0.25] * 3
    assert value(record, "decode_tok_s_agg") == 4 / 0.75


def test_one_token_has_no_tpot() -> None:
    record = Bench(Script(gaps=[])).run(workload={"max_new_tokens": 1}).record
    assert record.status == "ok"
    for name in ("tpot_s", "itl_s", "decode_tok_s_req", "decode_tok_s_agg"):
        assert value(record, name) is None, name
        assert record.metrics[name]["reason"] == "needs at least two output tokens"
    assert value(record, "ttft_s") == 0.75


def test_another_number_of_tokens_is_invalid() -> None:
    record = Bench(Script(gaps=[0.5])).run().record
    assert record.status == "invalid"
    assert record.reason == "generated 2 tokens instead of 4: no timing is comparable"
    assert "ttft_s" not in record.metrics


def test_quality_is_pooled_and_paired() -> None:
    def nll(position: int) -> float:
        return 2.0 + position / 10

    measured = Bench(Script(nll=nll, nll_full=lambda p: nll(p) - 0.25)).run()
    record = measured.record
    losses = [nll(p) for p in range(1, 41)]
    assert value(record, "nll_tokens") == 40
    assert value(record, "nll_sum") == pytest.approx(math.fsum(losses))
    assert value(record, "perplexity") == pytest.approx(perplexity_of(losses))
    assert value(record, "perplexity_full") == pytest.approx(perplexity_of(losses) * math.exp(-0.25))
    assert value(record, "ppl_ratio") == pytest.approx(math.exp(0.25))
    assert value(record, "ppl_ratio_se") == pytest.approx(0, abs=1e-9)
    assert value(record, "perplexity_se") > 0.1
    assert value(record, "next_token_acc") == 10 / 40
    assert record.metrics["perplexity"]["protocol"] == "streaming-decode"
    assert record.dataset is not None
    assert record.dataset["text_hash"].startswith("sha256:")
    # the sidecar's rows, one a scored token
    assert measured.tokens is not None
    assert measured.tokens["nll"] == losses
    assert measured.tokens["position"] == list(range(1, 41))
    assert measured.tokens["nll_full"] == pytest.approx([x - 0.25 for x in losses])


def test_defect_07_losses_of_several_texts_are_pooled() -> None:
    easy_then_hard = [1.0] * 40 + [4.0] * 40
    own, full = iter(easy_then_hard), iter(easy_then_hard)
    measured = Bench(Script(nll=lambda p: next(own), nll_full=lambda p: next(full))).run(workload={"num_samples": 2})
    record = measured.record
    texts = record.samples["texts"]
    # the values of the texts are kept beside the pooled one
    assert [(text["tokens"], text["nll_sum"]) for text in texts] == [(40, 40.0), (40, 160.0)]
    assert texts[0]["sha256"] != texts[1]["sha256"]
    assert (value(record, "nll_tokens"), value(record, "nll_sum")) == (80, 200.0)
    # a mean of the texts' perplexities would be 28.7
    assert value(record, "perplexity") == value(record, "perplexity_full") == pytest.approx(math.exp(2.5))
    assert measured.tokens is not None
    assert measured.tokens["text"] == [0] * 40 + [1] * 40


def test_prefix_continuation_has_a_prefix() -> None:
    bench = Bench()
    record = bench.run(workload={"protocol": "prefix-continuation"}).record
    assert bench.session.called("score") == [("score", "prefix-continuation", 20, 61)]
    # the reference scores the same tokens: the continuation without its first
    assert bench.session.called("reference") == [("reference", 21, 61)]
    assert value(record, "nll_tokens") == 40
    assert record.metrics["perplexity"]["prefix"] == 20


def test_random_weights_have_no_quality() -> None:
    bench = Bench(Script(is_dummy=True))
    record = bench.run().record
    assert record.status == "ok"
    for name in (
        "perplexity",
        "perplexity_se",
        "nll_sum",
        "nll_tokens",
        "next_token_acc",
        "perplexity_full",
        "ppl_ratio",
    ):
        assert (value(record, name), record.metrics[name]["reason"]) == (None, "random weights")
    assert bench.session.called("score") == []
    assert value(record, "ttft_s") == 0.75


@pytest.mark.parametrize(("below", "status"), [(0.0, "ok"), (0.05, "ok"), (0.2, "invalid"), (2.0, "invalid")])
def test_the_leak_guard(below: float, status: str) -> None:
    record = Bench(Script(nll=lambda p: 4.0 - below, nll_full=lambda p: 4.0)).run().record
    assert record.status == status
    if status == "invalid":
        full, found = math.exp(4.0), math.exp(4.0 - below)
        assert record.reason is not None
        assert record.reason.startswith(
            f"leak guard: perplexity {found:.3f} is clearly below the full cache's {full:.3f} on the same tokens"
        )
        # what was found stays in the record, and nothing was timed
        assert value(record, "perplexity") == pytest.approx(found)
        assert "ttft_s" not in record.metrics


def test_the_leak_guard_knows_noise() -> None:
    # 0.3 nats better on the mean, but by single tokens that differ by nats in both directions
    noisy = Bench(Script(nll=lambda p: 4.0 - 0.3 + (3.0 if p % 2 else -3.0), nll_full=lambda p: 4.0)).run().record
    assert noisy.status == "ok"
    worse = Bench(Script(nll=lambda p: 9.0, nll_full=lambda p: 4.0)).run().record
    assert worse.status == "ok"


def test_memory_in_three_columns() -> None:
    record = Bench(Script(compress_s=0.125)).run().record
    expected = {
        "kv_bytes_exact": 60, "kv_bytes_exact_prefill": 40, "mem_predicted_kv_bytes": 60, "cache_tokens_mean": 6.0,
        "cache_tokens_min": 4, "cache_tokens_max": 8, "ratio_effective": 1 - 40 / 200, "mem_weights_bytes": 10_000,
        "mem_measured_before_bytes": 500, "mem_measured_prefill_peak_bytes": 900, "mem_measured_decode_peak_bytes": 800,
        "mem_measured_peak_bytes": 900, "mem_measured_dynamic_bytes": 400, "mem_measured_reserved_bytes": 1_000,
        "mem_measured_rss_peak_bytes": 5_000, "compress_s": 0.125, "tpot_floor_s": (8_000 + 50) / 1_000.0,
    }  # fmt: skip
    for name, wanted in expected.items():
        assert value(record, name) == pytest.approx(wanted), name
    assert (value(record, "evict_s"), record.metrics["evict_s"]["reason"]) == (None, "nothing is compressed then")
    driver = record.metrics["mem_measured_driver_bytes"]
    assert (driver["value"], driver["reason"], driver["scope"]) == (None, "no driver", "device")
    assert value(record, "ratio_requested") is None
    assert record.memory["measured"] == {
        "kv_bytes_allocated": 80,
        "cache_tokens_per_layer": [4, 8],
        "cache_tokens_per_layer_prefill": [3, 5],
    }
    assert record.memory["predicted"] == {"kv_bytes": 60, "weights_bytes": 10_000}
    assert "a warning of the pass" in record.warnings


def test_defect_01_no_meter_is_null_and_never_zero() -> None:
    record = Bench(Script(peaks=(None, None))).run().record
    for name in ("prefill_peak", "decode_peak", "peak", "dynamic", "before"):
        entry = record.metrics[f"mem_measured_{name}_bytes"]
        assert (entry["value"], entry["reason"]) == (None, "no allocator"), name


def test_passes_in_order_on_different_prompts() -> None:
    bench = Bench(options={"rounds": "3", "num_warmup": "2"})
    bench.run()
    names = [call[0] for call in bench.session.calls]
    timed = [call for call in bench.session.called("generate") if call[2] == 4]
    assert names == ["prepare", "score", "reference", "warm", "memory"] + ["generate"] * 6 + ["finish"]
    prompts = [call[1] for call in bench.session.called("warm") + bench.session.called("memory") + timed]
    assert len(set(prompts)) == len(prompts) == 5
    assert all(len(prompt) == 20 for prompt in prompts)
    # the old meaning of TTFT: one token, an empty cache
    assert [(len(call[1]), call[2]) for call in bench.session.called("generate")[3:]] == [(1, 1)] * 3


def test_rounds_go_through_the_given_runner() -> None:
    bench = Bench()
    asked: list[int] = []

    def run_rounds(round_: Any, rounds: int) -> None:
        asked.append(rounds)
        for _ in range(rounds):
            round_()

    record = bench.runner.run(case(), "tests::case", run_rounds=run_rounds).record
    assert asked == [3]
    assert len(record.metrics["ttft_s"]["values"]) == 3


def test_beyond_the_trained_length_is_a_warning() -> None:
    within = Bench().run(workload={"prompt_tokens": 60}).record
    assert within.warnings == ["a warning of the pass"]
    beyond = Bench().run(workload={"prompt_tokens": 61}).record
    assert "65 positions are more than the trained length 64" in beyond.warnings


def test_defect_15_the_dtype_in_effect_is_in_the_record_and_its_key() -> None:
    record = Bench().run(dtype="checkpoint").record
    assert record.effective["dtype"] == "float16"
    named = Bench().run(dtype="float16").record
    # "the checkpoint's own" and its name are the same case; another dtype is another
    assert record.case_key == named.case_key != Bench().run(dtype="bfloat16").record.case_key


def test_identity_of_a_record() -> None:
    first, again = Bench().run().record, Bench().run().record
    assert (first.case_key, first.settings_hash) == (again.case_key, again.settings_hash)
    fewer = Bench(options={"rounds": "2"}).run().record
    assert fewer.case_key == first.case_key
    assert fewer.settings_hash != first.settings_hash
    other_text = Bench().run(workload={"max_tokens": 40}).record
    assert other_text.case_key != first.case_key
    key = case().key(model_revision="sha256:weights", dataset_revision=None)
    assert first.case_key != key


def test_what_the_session_says_is_in_the_record() -> None:
    record = Bench().run().record
    assert record.effective == {"dtype": "float16", "decode_step": "eager"}
    assert record.inert == {"threads": "the script has none"}
    assert record.model["revision"] == "sha256:weights"
    assert record.duration_s is not None
    assert record.started_utc.endswith("+00:00")


@pytest.mark.parametrize("script", [Script(), Script(is_dummy=True), Script(gaps=[0.5]), Script(peaks=(None, None))])
def test_a_record_follows_its_schema(script: Script) -> None:
    row = Bench(script).run().record.to_dict()
    jsonschema.validate(row, schema("record"))
    json.dumps(row, allow_nan=False)
