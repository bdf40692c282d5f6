"""The controller's rules: published numbers, bounds, and one test for each fault of the original that it must not have."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.controller import (
    ControllerInputs,
    ControllerSettings,
    Decision,
    PhaseInputs,
    choose_phase,
    decide,
    decode_budget,
    inert_axes,
    layers_per_step,
)
from kvsuite.nanovllm.cost_model import (
    MeasuredCost,
    PublishedCost,
    kind_of,
    published_bandwidth,
    speedup,
)

# Qwen3-8B on an H100 by the original's table
PUBLISHED = ControllerSettings(
    method="h2o", factor=5, layers=36, kv_heads=8, head_dim=128, weight_bytes=15_100_000_000, token_bytes=147_456,
    bandwidth=3350e9, bandwidth_source="published: H100", cost="published",
)  # fmt: skip
MEASURED = replace(PUBLISHED, cost="measured", bandwidth=4.2e12, bandwidth_source="measured")
FIRST = ControllerInputs(
    counter=1, batch=8, seq_len=3968, expected_output=128, pending=0, sm_ratio=0.25, streams=2, layers_per_step=4
)
MLP = replace(PUBLISHED, method="mlp")


@pytest.mark.parametrize(
    ("gpu", "gains"),
    [
        ("NVIDIA H100 80GB HBM3", (1.185, 1.916, 3.021)),
        ("NVIDIA A100-SXM4-80GB", (1.295, 2.313, 3.508)),
        ("NVIDIA GeForce RTX 4090", (1.555, 2.989, 4.092)),
    ],
)
def test_gains_of_the_published_cost_model(gpu, gains):
    bandwidth, source = published_bandwidth(gpu, None)
    cost = PublishedCost(bandwidth=bandwidth, method="h2o", kv_heads=8, head_dim=128, layers=36)
    found = [speedup(cost, batch=b, tokens=3968, factor=5, output=128, is_async=False) for b in (1, 8, 32)]
    assert [round(gain, 3) for gain in found] == list(gains)
    assert source.startswith("published: ")


def test_short_prompts_gain_less_by_the_published_model():
    cost = PublishedCost(bandwidth=3350e9, method="h2o", kv_heads=8, head_dim=128, layers=36)
    found = [speedup(cost, batch=b, tokens=256, factor=5, output=64, is_async=False) for b in (1, 8, 32)]
    assert [round(gain, 3) for gain in found] == [1.012, 1.075, 1.249]
    short = replace(FIRST, seq_len=256, expected_output=64)
    assert [decide(PUBLISHED, replace(short, batch=b)).pipeline for b in (1, 8)] == ["none", "prefill"]


def test_gpus_of_the_table_and_those_beside_it():
    assert published_bandwidth("NVIDIA A100-PCIE-40GB", None)[0] == 2039e9
    assert published_bandwidth("NVIDIA H200", 139 * 2**30) == (13_900e9, "published: NVIDIA H200 by its memory")


@pytest.mark.parametrize("memory", [None, 0, -1])
def test_a_probe_that_failed_divides_nothing_by_zero(memory):
    with pytest.raises(CaseInvalid, match="memory is unknown"):
        published_bandwidth("", memory)
    for broken in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(CaseInvalid, match="measure it again"):
            decide(replace(MEASURED, bandwidth=broken), FIRST)
        with pytest.raises(CaseInvalid, match="measure it again"):
            decide(replace(PUBLISHED, bandwidth=broken), FIRST)


@pytest.mark.parametrize("batch", [1, 7, 8, 32])
def test_the_first_decision_of_h2o(batch):
    found = decide(PUBLISHED, replace(FIRST, batch=batch))
    assert found.published == {
        "pipeline": "prefill",
        "async_compress": batch >= 8,
        "compression_streams": 1,
        "decode_layers_per_step": 4,
        "greenctx_enabled": True,
        "sm_compress_ratio": 0.25,
        "sm_main_ratio": 0.75,
    }


@pytest.mark.parametrize("short", [{"seq_len": 255}, {"expected_output": 63}])
def test_short_requests_are_left_alone(short):
    found = decide(PUBLISHED, replace(FIRST, **short))
    assert (found.pipeline, found.greenctx_enabled) == ("none", False)
    assert (found.sm_compress_ratio, found.sm_main_ratio, found.sm_ratio) == (0.0, 1.0, 0.25)
    assert found.reasons[0].startswith("rule 1")
    assert decide(replace(PUBLISHED, force=True), replace(FIRST, **short)).pipeline == "prefill"


def test_the_thresholds_themselves_are_long_enough():
    assert decide(PUBLISHED, replace(FIRST, seq_len=256, expected_output=64)).pipeline == "prefill"


def test_the_measured_model_reads_weights_which_the_published_one_forgets():
    # one sequence: 0.6 of 15.7 GB are keys and values, a fifth of which stays
    assert decide(MEASURED, replace(FIRST, batch=1)).pipeline == "none"
    assert decide(PUBLISHED, replace(FIRST, batch=1)).pipeline == "prefill"
    found = decide(MEASURED, replace(FIRST, batch=32))
    assert found.pipeline == "prefill"
    full = 15_100_000_000 + 32 * 3968 * 147_456
    small = 15_100_000_000 + 32 * 793 * 147_456
    compress = 32 * 3968 * 147_456 * 1.2
    assert found.speedup == pytest.approx(full * 128 / (compress + small * 128))


def test_what_steps_took_takes_the_place_of_what_bytes_would_take():
    model = {"bandwidth": 1e9, "weight_bytes": 1_000_000, "token_bytes": 1000, "factor": 5}
    guessed = MeasuredCost(**model)
    assert guessed.decode_s(2, 500) == pytest.approx(2e-3)
    timed = MeasuredCost(**model, step_s=5e-3, step_tokens=1000, compress_measured_s=7e-3)
    assert timed.decode_s(2, 500) == pytest.approx(5e-3)
    assert timed.decode_s(2, 100) == pytest.approx(4.2e-3)
    assert timed.compress_s(2, 500) == 7e-3
    # never faster than the memory
    assert MeasuredCost(**model, step_s=1e-6, step_tokens=0).decode_s(2, 500) == guessed.decode_s(2, 500)


def test_shares_follow_what_compression_takes():
    taken = {"prefill_s": 1.0, "compress_samples": 1}
    assert decide(PUBLISHED, replace(FIRST, compress_s=0.81, **taken)).sm_compress_ratio == 0.30
    assert decide(PUBLISHED, replace(FIRST, compress_s=0.60, **taken)).sm_compress_ratio == 0.25
    assert decide(PUBLISHED, replace(FIRST, compress_s=0.39, **taken)).sm_compress_ratio == 0.20
    assert decide(PUBLISHED, replace(FIRST, pending=3)).sm_compress_ratio == 0.30
    assert decide(PUBLISHED, replace(FIRST, pending=2)).sm_compress_ratio == 0.25
    # bound by products, it is held against decode steps
    gemm = {"decode_s": 1.0, "expected_output": 512, "sm_ratio": 0.40}
    assert decide(MLP, replace(FIRST, compress_s=1.11, **gemm)).sm_compress_ratio == 0.45
    assert decide(MLP, replace(FIRST, compress_s=0.59, **gemm)).sm_compress_ratio == 0.35


def test_shares_start_by_what_a_method_is_bound_by():
    assert [replace(PUBLISHED, method=name).first_ratio for name in ("mlp", "knorm", "snapkv")] == [0.40, 0.20, 0.25]
    assert (kind_of("streaming_llm"), kind_of("somebodys_own")) == ("memory", "mixed")


def test_partitions_go_off_where_compression_is_short():
    short = replace(FIRST, prefill_s=1.0, compress_s=0.34)
    assert decide(PUBLISHED, replace(short, compress_samples=2)).greenctx_enabled
    assert not decide(PUBLISHED, replace(short, compress_samples=3)).greenctx_enabled
    assert decide(PUBLISHED, replace(short, compress_samples=3, compress_s=0.36)).greenctx_enabled
    assert not decide(replace(PUBLISHED, greenctx=False), FIRST).greenctx_enabled
    few = replace(FIRST, expected_output=512, sm_ratio=0.40)
    assert decide(MLP, few).greenctx_enabled
    assert not decide(MLP, replace(few, batch=7)).greenctx_enabled
    assert not decide(MLP, replace(few, expected_output=127)).greenctx_enabled


def test_streams_and_whether_compression_has_its_own():
    taken = {"prefill_s": 1.0, "compress_samples": 1}
    assert decide(PUBLISHED, replace(FIRST, compress_s=0.9, pending=1, **taken)).compression_streams == 3
    assert decide(PUBLISHED, replace(FIRST, compress_s=0.9, pending=3, **taken)).compression_streams == 4
    assert decide(PUBLISHED, replace(FIRST, compress_s=0.3, pending=1, **taken)).compression_streams == 1
    assert decide(PUBLISHED, replace(FIRST, batch=1, pending=1)).async_compress
    assert decide(PUBLISHED, replace(FIRST, batch=1, compress_s=0.41, **taken)).async_compress
    assert not decide(PUBLISHED, replace(FIRST, batch=32, compress_s=0.39, **taken)).async_compress


def test_the_mlp_takes_the_decode_pipeline_from_four_prompts_on():
    long = replace(FIRST, expected_output=512, sm_ratio=0.40)
    assert decide(replace(MLP, force=True), replace(long, batch=3)).pipeline == "prefill"
    found = decide(replace(MLP, force=True), replace(long, batch=4))
    assert (found.pipeline, found.async_compress) == ("decode", True)


def test_layers_of_a_step_follow_what_was_measured():
    """In the original the plan's chunk size (4 at least for the MLP) is put over it every time."""
    # 36 layers in 36 ms, and a decode step of 2 ms hides two of them
    slow = replace(FIRST, decode_s=2e-3, compress_s=36e-3)
    assert layers_per_step(MLP, slow) == 3
    assert layers_per_step(MLP, replace(slow, layers_per_step=3)) == 2
    assert layers_per_step(MLP, replace(slow, layers_per_step=2)) == 2
    assert layers_per_step(MLP, replace(slow, decode_s=1.0, layers_per_step=8)) == 8
    assert layers_per_step(MLP, FIRST) == 4


METERS = st.one_of(st.none(), st.floats(1e-6, 10))
INPUTS = st.builds(
    ControllerInputs,
    counter=st.integers(1, 1000), batch=st.integers(1, 512), seq_len=st.integers(1, 100_000),
    expected_output=st.floats(1, 4096), pending=st.integers(0, 64), sm_ratio=st.sampled_from([0.1, 0.25, 0.4, 0.6]),
    streams=st.integers(1, 4), layers_per_step=st.integers(1, 8), prefill_s=METERS, decode_s=METERS, compress_s=METERS,
    compress_samples=st.integers(0, 9), decode_tokens=st.one_of(st.none(), st.floats(0, 1e7)),
)  # fmt: skip
SETTINGS = st.builds(
    replace,
    st.sampled_from([PUBLISHED, MEASURED]),
    method=st.sampled_from(["mlp", "h2o", "knorm", "snapkv", "streaming_llm", "expected_attention", "other"]),
    factor=st.sampled_from([1, 1.5, 2, 5, 10]),
    force=st.booleans(),
    greenctx=st.booleans(),
)


@given(SETTINGS, INPUTS)
def test_decisions_stay_within_their_bounds_and_survive_json(settings, inputs):
    found = decide(settings, inputs)
    assert 0.10 <= found.sm_ratio <= 0.60
    assert 1 <= found.compression_streams <= 4
    assert 1 <= found.decode_layers_per_step <= 8
    if found.pipeline == "none":
        assert not found.greenctx_enabled
        assert not settings.force
    else:
        assert found.sm_main_ratio == pytest.approx(1 - found.sm_compress_ratio)
    assert Decision.of(json.loads(json.dumps(found.to_dict()))) == found
    assert ControllerInputs(**json.loads(json.dumps(asdict(inputs)))) == inputs
    assert ControllerSettings(**json.loads(json.dumps(asdict(settings)))) == settings


@given(SETTINGS, INPUTS, st.floats(1.0, 10))
def test_slower_compression_never_takes_sms_away(settings, inputs, slower):
    if inputs.compress_s is None:
        return
    settings = replace(settings, force=True)
    before = decide(settings, inputs)
    after = decide(settings, replace(inputs, compress_s=inputs.compress_s * slower))
    assert after.sm_ratio >= before.sm_ratio
    assert after.greenctx_enabled >= before.greenctx_enabled
    if before.pipeline == "prefill":
        assert after.compression_streams >= before.compression_streams
        assert after.async_compress >= before.async_compress


@given(SETTINGS, INPUTS, st.integers(0, 64))
def test_more_pending_compressions_never_take_anything_away(settings, inputs, more):
    settings = replace(settings, force=True)
    before, after = decide(settings, inputs), decide(settings, replace(inputs, pending=inputs.pending + more))
    assert after.sm_ratio >= before.sm_ratio
    assert after.compression_streams >= before.compression_streams
    assert after.async_compress >= before.async_compress


@given(SETTINGS, INPUTS)
def test_a_larger_factor_never_gains_less_while_it_costs_the_same(settings, inputs):
    if settings.cost == "measured" and not inputs.compress_s:
        return
    gains = [decide(replace(settings, factor=factor, force=True), inputs).speedup for factor in (1, 2, 4)]
    assert gains == pytest.approx(sorted(gains), rel=1e-9)


PHASES = st.builds(
    PhaseInputs,
    waiting=st.integers(0, 100), running=st.integers(0, 100), pipeline=st.sampled_from(["none", "prefill", "decode"]),
    slot=st.integers(0, 3), decoded=st.integers(0, 3), prefill_s=METERS, decode_s=METERS,
)  # fmt: skip
BETWEEN = PhaseInputs(waiting=50, running=50, pipeline="decode", slot=0, decoded=0)
DUAL = replace(MLP, dual=True)


@given(PHASES)
def test_dual_batch_does_nothing_for_what_is_compressed_at_the_end_of_prompts(inputs):
    """Triad is auto-tune+greenctx for every eviction policy, and its axis is marked inert."""
    if inputs.pipeline == "decode":
        return
    auto, triad = PUBLISHED, replace(PUBLISHED, dual=True)
    assert choose_phase(auto, inputs)[0] == choose_phase(triad, inputs)[0]
    assert decide(auto, FIRST) == decide(triad, FIRST)


def test_an_inert_axis_is_marked_and_an_active_one_is_not():
    assert "always takes prompts first" in inert_axes(replace(PUBLISHED, dual=True))["auto_dual"]
    assert inert_axes(PUBLISHED) == {}
    assert inert_axes(DUAL) == {}


def test_dual_batch_by_who_waits():
    def phase(**how):
        return choose_phase(DUAL, replace(BETWEEN, **how))[0]

    assert phase(waiting=0) == "decode"
    assert phase(running=0) == "prefill"
    assert phase(waiting=0, running=0) == "prefill"
    assert phase(waiting=65, running=35) == "prefill"
    assert phase(waiting=15, running=85) == "decode"
    assert phase(waiting=40, running=60, decode_s=1.81, prefill_s=1.0, decoded=3) == "decode"
    assert phase(waiting=41, running=59, decode_s=1.81, prefill_s=1.0, decoded=3) == "prefill"


@pytest.mark.parametrize(
    ("running", "decode_s", "budget"),
    # share 0.5 and 0.15 for the decode pipeline, and 0.15 either way by the times of steps
    [(50, None, 3), (50, 1.26, 3), (50, 0.79, 2), (36, 0.79, 1), (84, 1.26, 3)],
)
def test_decode_steps_of_a_window(running, decode_s, budget):
    inputs = replace(BETWEEN, waiting=100 - running, running=running, decode_s=decode_s, prefill_s=1.0)
    assert decode_budget(DUAL, inputs) == budget
    if decode_s != 1.26:
        chosen = [choose_phase(DUAL, replace(inputs, slot=n, decoded=n))[0] for n in range(4)]
        assert chosen == ["decode"] * budget + ["prefill"] * (4 - budget)


@given(PHASES)
def test_a_window_always_has_a_step_with_prompts(inputs):
    if not inputs.waiting or not inputs.running:
        return
    assert 1 <= decode_budget(DUAL, inputs) <= 3


@pytest.mark.parametrize("wrong", [{"cost": "guessed"}, {"factor": 0.5}, {"interval": 0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(CaseInvalid, match=r"^controller: "):
        replace(PUBLISHED, **wrong)
