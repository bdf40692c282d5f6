"""A weight format beside a reference on the same tokens: divergence, exactly, on synthetic engines; and without one."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from window_bench import Bench, N, WindowSession, loss, value

DIVERGENCE = (
    "kld", "kld_median", "kld_p99", "kld_max", "same_top1", "rms_delta_p", "mean_delta_p", "perplexity_reference",
    "delta_perplexity", "ppl_ratio_reference", "ppl_ratio_reference_se",
)  # fmt: skip


def test_divergence_from_the_reference(tmp_path: Path) -> None:
    beside = WindowSession(lambda position: 1.5)
    bench = Bench(tmp_path, beside=beside, options={"quantization": "q4f16_1", "reference": "none"})
    measured = bench.run()
    positions = range(1, N)
    kld = [0.25 * (p % 5) for p in positions]
    ours, theirs = [loss(p) for p in positions], [1.5 for p in positions]
    change = [math.exp(-a) - math.exp(-b) for a, b in zip(ours, theirs, strict=True)]
    difference = [a - b for a, b in zip(ours, theirs, strict=True)]
    ratio = math.exp(statistics.fmean(difference))
    expected = {
        "kld": statistics.fmean(kld),
        "kld_median": statistics.median(kld),
        "kld_p99": 1.0,
        "kld_max": 1.0,
        "same_top1": sum(p % 2 == 0 for p in positions) / (N - 1),
        "rms_delta_p": math.sqrt(statistics.fmean(x * x for x in change)),
        "mean_delta_p": statistics.fmean(change),
        "perplexity_reference": math.exp(1.5),
        "delta_perplexity": value(measured, "perplexity") - math.exp(1.5),
        "ppl_ratio_reference": ratio,
        "ppl_ratio_reference_se": ratio * statistics.stdev(difference) / math.sqrt(N - 1),
    }
    assert set(expected) == set(DIVERGENCE)
    for name, wanted in expected.items():
        assert value(measured, name) == pytest.approx(wanted, rel=1e-9), name
        entry = measured.record.metrics[name]
        assert (entry["reference"], entry["reference_dtype"]) == ("none", "float32")
    assert beside.closed
    ((case, overrides),) = bench.pool.asked
    assert (case.quantization, case.dtype) == (None, "float32")
    assert overrides == {"threads": 3}, "both models compute on as many threads"


def test_few_positions_have_no_percentile(tmp_path: Path) -> None:
    options = {"quantization": "q4f16_1", "reference": "none", "eval_tokens": "50"}
    record = Bench(tmp_path, beside=WindowSession(), options=options).run().record
    assert record.metrics["kld_p99"]["value"] is None
    assert record.metrics["kld_p99"]["reason"] == "fewer than 100 positions"
    assert record.metrics["kld_max"]["value"] == 1.0


@pytest.mark.parametrize(("chosen", "reference"), [("none", "none"), ("q4f16_1", "q4f16_1")])
def test_the_reference_does_not_diverge_from_itself(chosen: str, reference: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, options={"quantization": chosen, "reference": reference})
    record = bench.run().record
    assert record.status == "ok"
    for name in DIVERGENCE:
        assert (record.metrics[name]["value"], record.metrics[name]["reason"]) == (None, "this is the reference")
    assert bench.pool.asked == []


def test_a_reference_that_cannot_run_costs_only_its_metrics(tmp_path: Path) -> None:
    options = {"quantization": "q4f16_1", "reference": "4bit"}
    record = Bench(tmp_path, beside="4bit needs bitsandbytes", options=options).run().record
    assert record.status == "ok"
    assert record.metrics["kld"]["reason"] == "the reference cannot run: 4bit needs bitsandbytes"
    assert record.metrics["perplexity"]["value"] is not None


def test_without_a_reference_there_is_no_divergence(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert not set(DIVERGENCE) & set(bench.run().record.metrics)
    assert not bench.session.called("compare")


def test_a_comparison_that_fails_gives_the_reference_back(tmp_path: Path) -> None:
    beside = WindowSession()
    beside.losses = lambda position: 1 / 0
    bench = Bench(tmp_path, beside=beside, options={"quantization": "q4f16_1", "reference": "none"})
    record = bench.run().record
    assert (record.status, record.error["type"], record.error["phase"]) == ("error", "ZeroDivisionError", "reference")
    assert beside.closed
