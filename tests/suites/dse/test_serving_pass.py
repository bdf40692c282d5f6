"""Design points as records: every axis moves its own number, what is inert or invalid says so, and records are valid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from synthetic_session import ENVIRONMENT
from tiny_checkpoint import TEXT, TRAINED_LENGTH, save_checkpoint

from kvsuite.engines.registry import SessionPool
from kvsuite.measure.runner import CaseRunner
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.record import Record, schema
from kvsuite.suites.dse.cases import dse_cases
from kvsuite.suites.registry import suite_named

Run = Callable[..., dict[str, Record]]
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
LENGTH, NEW_TOKENS = 24, 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "danube.txt").write_text(TEXT * 2, encoding="utf-8")
    return save_checkpoint(folder)


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Run:
    """Records of a space by the name of the case without its weight format."""

    def measure(space: str, *, backwards: bool = False, **options: str) -> dict[str, Record]:
        given = {
            "model": str(checkpoint), "device": "cpu", "rounds": "2", "num_warmup": "1", "quantization": "none",
            "max_new_tokens": str(NEW_TOKENS), "corpus": str(checkpoint / "danube.txt"), "eval_tokens": "200",
        }  # fmt: skip
        resolved = default_options(**(given | options), space=space)
        with pytest.MonkeyPatch.context() as patch:
            # two seconds a model, and not what is tested here
            patch.setattr("kvsuite.meters.bandwidth.copy_bandwidth", lambda device: 1e10)
            sessions = SessionPool(threads=1)
            cases = dse_cases(resolved)
            runner = CaseRunner(resolved, MetricRegistry(), ENVIRONMENT, sessions, suite_named, planned=cases)
            found = {}
            for case in cases[::-1] if backwards else cases:
                record = runner.run(case, f"tests::{case.id}").record
                jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema("record"))
                found[case.name.partition("-")[2]] = record
            sessions.close()
        return found

    return measure


@pytest.fixture(scope="module")
def star(run: Run) -> dict[str, Record]:
    """A base point, and every axis moved alone."""
    found: dict[str, Record] = {}
    for space in (
        "ctx=48,60;chunk=16", "ctx=48;chunk=8,24", "ctx=48;chunk=16;batch=3", "ctx=48;chunk=16;window=16;sink=0,2",
        "ctx=60;chunk=16;window=16",
    ):  # fmt: skip
        found |= run(space)
    return found


BASE, LONG = "ctx48-pc16-bs01-swoff-sink0", "ctx60-pc16-bs01-swoff-sink0"
FINE, WHOLE = "ctx48-pc8-bs01-swoff-sink0", "ctx48-pc24-bs01-swoff-sink0"
THREE, SLID, SUNK = "ctx48-pc16-bs03-swoff-sink0", "ctx48-pc16-bs01-sw16-sink0", "ctx48-pc16-bs01-sw16-sink2"
SLID_LONG = "ctx60-pc16-bs01-sw16-sink0"


def value(record: Record, name: str) -> Any:
    return record.metrics[name]["value"]


def test_every_point_is_fine(star: dict[str, Record]) -> None:
    assert set(star) == {BASE, LONG, FINE, WHOLE, THREE, SLID, SUNK, SLID_LONG}
    for name, record in star.items():
        assert (record.status, record.reason, record.error) == ("ok", None, None), name
        assert [w for w in record.warnings if not w.startswith("unstable")] == []
        batch = 3 if name == THREE else 1
        prompt = int(name[3:5]) // 2
        assert record.tokens == {
            "prompt": batch * prompt, "prefill_computed": batch * prompt, "generated": batch * NEW_TOKENS,
            "requested": batch * NEW_TOKENS, "requests": batch, "scored": value(record, "nll_tokens"),
        }  # fmt: skip
        for metric in ("ttft_s", "e2e_s", "tpot_s", "decode_step_s", "decode_tok_s_batch", "prefill_tok_s_computed"):
            assert len(record.metrics[metric]["values"]) == 2
            assert value(record, metric) > 0
        assert len(record.samples["approx_chars"]) == 2
        assert record.metrics["ttft_cached_s"]["value"] is None
        assert "--kv-prefix-caching" in record.metrics["ttft_cached_s"]["reason"]


def test_predicted_reported_and_measured_memory_stand_side_by_side(star: dict[str, Record]) -> None:
    for record in star.values():
        predicted, reported, measured = (record.memory[name] for name in ("predicted", "reported", "measured"))
        assert predicted["pool_bytes"] == reported["pool_bytes"] == measured["kv_bytes_allocated"]
        assert predicted["kv_bytes"] == value(record, "kv_bytes_exact") == value(record, "mem_predicted_kv_bytes")
        parts = ("weights_bytes", "pool_bytes", "workspace_bytes")
        assert predicted["total_bytes"] == sum(predicted[name] for name in parts)
        # one buffer of rotary frequencies beside the weights
        assert 0 <= value(record, "mem_weights_bytes") - predicted["weights_bytes"] < 100


def test_the_effective_limits_are_the_points(star: dict[str, Record]) -> None:
    names = ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "sliding_window", "attention_sinks")
    limits = {name: tuple(record.effective[limit] for limit in names) for name, record in star.items()}
    assert limits[BASE] == (48, 16, 1, None, 0)
    assert limits[THREE] == (48, 16, 3, None, 0)
    assert limits[SUNK] == (48, 16, 1, 16, 2)
    assert {record.effective["prefix_caching"] for record in star.values()} == {False}


def test_context_and_batch_move_bytes(star: dict[str, Record]) -> None:
    assert value(star[BASE], "kv_bytes_exact") == (LENGTH + NEW_TOKENS - 1) * TOKEN_BYTES
    assert value(star[LONG], "kv_bytes_exact") == (30 + NEW_TOKENS - 1) * TOKEN_BYTES
    assert value(star[THREE], "kv_bytes_exact") == 3 * value(star[BASE], "kv_bytes_exact")
    pools = {
        name: record.memory["measured"]["kv_bytes_allocated"] // (16 * TOKEN_BYTES) for name, record in star.items()
    }
    # blocks of 16 tokens, and one for scratch
    assert (pools[BASE], pools[LONG], pools[THREE]) == (3 + 1, 4 + 1, 9 + 1)
    assert value(star[THREE], "decode_batch") == 3
    assert value(star[BASE], "decode_batch") == 1
    floors = {name: star[name].metrics["tpot_floor_s"]["bytes"] for name in (BASE, THREE)}
    mean = sum(LENGTH + step for step in range(1, NEW_TOKENS)) / (NEW_TOKENS - 1)
    assert floors[THREE] - floors[BASE] == pytest.approx(2 * mean * TOKEN_BYTES)


def test_the_chunk_moves_steps_and_workspace(star: dict[str, Record]) -> None:
    steps = {name: value(star[name], "prefill_steps") for name in (BASE, FINE, WHOLE, THREE, LONG)}
    assert steps == {
        BASE: math.ceil(LENGTH / 16), FINE: math.ceil(LENGTH / 8), WHOLE: 1, THREE: math.ceil(3 * LENGTH / 16),
        LONG: math.ceil(30 / 16),
    }  # fmt: skip
    workspaces = [star[name].memory["predicted"]["workspace_bytes"] for name in (FINE, BASE, WHOLE)]
    assert workspaces == sorted(set(workspaces))


def test_past_the_window_bytes_are_flat(star: dict[str, Record]) -> None:
    # whole blocks leave the window: never more than a block beyond it
    for name in (SLID, SLID_LONG):
        assert 16 * TOKEN_BYTES <= value(star[name], "kv_bytes_exact") < (16 + 16) * TOKEN_BYTES
    assert value(star[SLID_LONG], "kv_bytes_exact") < value(star[LONG], "kv_bytes_exact")


def test_past_the_window_the_pool_is_flat(run: Run) -> None:
    options = {"model": "dummy:tiny", "prompt_share": "0.25", "rounds": "1"}
    found = run("ctx=512,1024;chunk=64;window=off,64", **options)
    pools = {name: record.memory["measured"]["kv_bytes_allocated"] for name, record in found.items()}
    block = 16 * 2 * TOKEN_BYTES  # the preset has four layers
    assert pools["ctx512-pc64-bs01-sw64-sink0"] == pools["ctx1024-pc64-bs01-sw64-sink0"] < 13 * block
    assert pools["ctx512-pc64-bs01-swoff-sink0"] == (512 // 16 + 1) * block
    assert pools["ctx1024-pc64-bs01-swoff-sink0"] == (1024 // 16 + 1) * block
    exact = {name: value(record, "kv_bytes_exact") for name, record in found.items()}
    assert exact["ctx1024-pc64-bs01-sw64-sink0"] < (64 + 16) * 2 * TOKEN_BYTES
    assert exact["ctx1024-pc64-bs01-swoff-sink0"] == (256 + NEW_TOKENS - 1) * 2 * TOKEN_BYTES


def test_window_and_sinks_move_the_perplexity_and_nothing_else_does(star: dict[str, Record]) -> None:
    found = {name: value(star[name], "perplexity") for name in (BASE, FINE, WHOLE, THREE, SLID, SUNK)}
    for name in (FINE, WHOLE, THREE):
        assert found[name] == pytest.approx(found[BASE], rel=1e-5)
    assert len({round(found[name], 3) for name in (BASE, SLID, SUNK)}) == 3
    # all points score the same text, in streams of which the first token is not scored
    assert {record.dataset["tokens_hash"] for record in star.values()} == {star[BASE].dataset["tokens_hash"]}
    assert value(star[BASE], "nll_tokens") == 200 - math.ceil(200 / 48)
    entry = star[SUNK].metrics["perplexity"]
    assert (entry["protocol"], entry["context"], entry["window"], entry["sink"]) == ("stream", 48, 16, 2)


def test_a_chunk_that_splits_nothing_is_named(star: dict[str, Record]) -> None:
    assert {name: list(record.inert) for name, record in star.items() if record.inert} == {WHOLE: ["prefill_chunk"]}


# points that are not measured


def test_the_format_of_keys_and_values_is_no_axis_that_could_be_inert(run: Run) -> None:
    found = run("ctx=48", cache_dtype="auto,int8")
    assert [(record.status, record.reason) for record in found.values()] == 2 * [("ok", None)]
    sizes = [value(record, "kv_bytes_exact") for record in found.values()]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("backwards", [False, True])
def test_of_points_that_differ_in_an_inert_axis_the_first_runs(backwards: bool, run: Run) -> None:
    found = run("ctx=48;chunk=16,24,40;window=off,48", backwards=backwards)
    assert {name: (record.status, record.reason) for name, record in found.items()} == {
        BASE: ("ok", None),
        "ctx48-pc16-bs01-sw48-sink0": ("skipped", f"axis inert, same as nano-none-{BASE}"),
        WHOLE: ("ok", None),
        "ctx48-pc24-bs01-sw48-sink0": ("skipped", f"axis inert, same as nano-none-{WHOLE}"),
        "ctx48-pc40-bs01-swoff-sink0": ("skipped", f"axis inert, same as nano-none-{WHOLE}"),
        "ctx48-pc40-bs01-sw48-sink0": ("skipped", f"axis inert, same as nano-none-{WHOLE}"),
    }
    assert list(found["ctx48-pc40-bs01-sw48-sink0"].inert) == ["prefill_chunk", "window"]
    assert found["ctx48-pc16-bs01-sw48-sink0"].metrics == {}


def test_points_that_break_a_rule_are_invalid_and_stand_for_nobody(run: Run) -> None:
    # of the three points that reach the runtime alike the first breaks a rule
    found = run("ctx=48;chunk=16;window=48,off;sink=0,8", backwards=True)
    statuses = {name: record.status for name, record in found.items()}
    assert statuses == {
        "ctx48-pc16-bs01-sw48-sink0": "ok", "ctx48-pc16-bs01-sw48-sink8": "invalid", BASE: "skipped",
        "ctx48-pc16-bs01-swoff-sink8": "invalid",
    }  # fmt: skip
    assert "sink-within-eighth-of-window" in str(found["ctx48-pc16-bs01-sw48-sink8"].reason)
    assert "sink-needs-window" in str(found["ctx48-pc16-bs01-swoff-sink8"].reason)


def test_beyond_the_trained_length_only_random_weights_run(run: Run) -> None:
    (real,) = run(f"ctx={TRAINED_LENGTH + 1};chunk=16").values()
    assert real.status == "invalid"
    assert f"more than the {TRAINED_LENGTH} positions" in str(real.reason)
    (dummy,) = run("ctx=40000;chunk=16", model="dummy:tiny", prompt_share="0.001").values()
    assert (dummy.status, dummy.tokens["prompt"]) == ("ok", 40)
    assert any("random weights, so it runs" in warning for warning in dummy.warnings)
    for name in ("perplexity", "perplexity_se", "nll_sum", "nll_tokens", "next_token_acc"):
        assert (dummy.metrics[name]["value"], dummy.metrics[name]["reason"]) == (None, "random weights")


def test_a_prompt_that_leaves_no_room_is_invalid(run: Run) -> None:
    (found,) = run("ctx=48;chunk=16", prompt_share="0.9").values()
    assert found.status == "invalid"
    assert "a prompt of 43 tokens and 6 new ones do not fit context_window_size=48" in str(found.reason)


def test_another_engine_and_a_format_that_is_quality_only_are_invalid(run: Run) -> None:
    (hf,) = run("ctx=48;chunk=16", engine="hf").values()
    assert (hf.status, hf.reason) == (
        "invalid",
        "engine hf serves one request at a time; use batch=1, or --kv-engine=nano where it can run the model",
    )
    (rounded,) = run("ctx=48;chunk=16", quantization="fake_q3").values()
    assert rounded.status == "invalid"
    assert "quality only" in str(rounded.reason)


def test_cached_and_computed_ttft_are_two_numbers(run: Run) -> None:
    (found,) = run("ctx=48;chunk=16;batch=2", prefix_caching="true").values()
    assert found.status == "ok"
    assert len(found.metrics["ttft_cached_s"]["values"]) == 2
    # prompts of 24 tokens: a block of 16 each; what is timed first is computed
    assert found.tokens["prefix_hits"] == 2 * 16
    assert found.tokens["prefill_computed"] == 2 * LENGTH
    assert found.effective["prefix_caching"] is True
    (short,) = run("ctx=48;chunk=16", prefix_caching="true", prompt_share="0.25").values()
    assert short.metrics["ttft_cached_s"]["value"] is None
    assert "no block of a prompt was found again" in short.metrics["ttft_cached_s"]["reason"]


def test_quantised_weights_are_a_case_of_their_own(run: Run, star: dict[str, Record]) -> None:
    (found,) = run("ctx=48;chunk=16", quantization="q4f32_1").values()
    assert found.status == "ok"
    assert found.case.id == f"nano-q4f32_1-{BASE}"
    assert value(found, "mem_weights_bytes") < value(star[BASE], "mem_weights_bytes")
    assert value(found, "kv_bytes_exact") == value(star[BASE], "kv_bytes_exact")
    assert value(found, "perplexity") != value(star[BASE], "perplexity")


def test_a_cache_format_changes_the_pool_and_nothing_of_the_point(run: Run) -> None:
    found = run("ctx=64;batch=2;chunk=64", cache_dtype="auto,int8", rounds="1")
    assert [record.status for record in found.values()] == ["ok", "ok"]
    plain, packed = found.values()
    assert packed.effective["kv_cache_dtype"] == "int8"
    assert packed.effective["num_blocks"] == plain.effective["num_blocks"]
    # float32, heads of 16: 64 bytes a vector, and 16 with a scale of 2
    for record, vector in ((plain, 64), (packed, 18)):
        pool = record.memory["measured"]["kv_bytes_allocated"]
        assert pool == record.memory["predicted"]["pool_bytes"]
        assert pool == (record.effective["num_blocks"] + 1) * 16 * TOKEN_BYTES // 64 * vector
        assert record.metrics["kv_bytes_exact"]["value"] == record.metrics["mem_predicted_kv_bytes"]["value"]
    assert packed.metrics["perplexity"]["value"] != plain.metrics["perplexity"]["value"]
