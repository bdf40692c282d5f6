"""Design points on engine `mlc`, against the stand-in: what is sent, read and recorded, and what becomes of every failure.

The stand-in answers as a real mlc_llm was observed to. It cannot show that a real one still does, that its numbers are right,
or that any device works: docs/mlc.md says what was tried by hand.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mlc_doubles import commands, mlc_double
from mlc_doubles import options as on_the_double
from synthetic_session import ENVIRONMENT
from tiny_checkpoint import save_checkpoint

from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.mlc.engine import MlcEngine
from kvsuite.engines.mlc.memory_model import MlcMemory
from kvsuite.engines.registry import SessionPool
from kvsuite.errors import UserError
from kvsuite.measure.runner import CaseRunner
from kvsuite.memory_model.config import architecture_of
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.record import Record, schema
from kvsuite.suites.compression.cases import compression_cases
from kvsuite.suites.dse.cases import dse_cases, point_of
from kvsuite.suites.registry import suite_named

Run = Callable[..., dict[str, Record]]
LENGTH, NEW_TOKENS = 24, 8
BASE, WHOLE = "ctx48-pc16-bs01-swoff-sink0", "ctx48-pc24-bs01-swoff-sink0"
THREE, SLID, SUNK = "ctx48-pc16-bs03-swoff-sink0", "ctx48-pc16-bs01-sw16-sink0", "ctx48-pc16-bs01-sw16-sink2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlc")
    save_checkpoint(folder / "tiny-llama")
    return folder


@pytest.fixture(scope="module")
def patch(place: Path) -> Iterator[pytest.MonkeyPatch]:
    with mlc_double(place / "commands") as found:
        yield found


@pytest.fixture(scope="module")
def run(place: Path, patch: pytest.MonkeyPatch) -> Run:
    """Records of a space by the name of the case without its weight format; libraries are shared by all tests."""

    def measure(space: str, *, fault: str = "", timeout_s: int = 60, **options: str) -> dict[str, Record]:
        given = {
            "engine": "mlc", "model": str(place / "tiny-llama"), "device": "vulkan:0", "rounds": "2", "num_warmup": "1",
            "max_new_tokens": str(NEW_TOKENS), "cache_dir": str(place / "cache"),
        }  # fmt: skip
        resolved = default_options(**(given | options), space=space)
        patch.setenv("MLC_DOUBLE", fault)
        sessions = SessionPool(on_the_double(mlc_timeout=str(timeout_s)), cache_dir=place / "cache")
        cases = dse_cases(resolved)
        runner = CaseRunner(resolved, MetricRegistry(), ENVIRONMENT, sessions, suite_named, planned=cases)
        found = {}
        try:
            for case in cases:
                record = runner.run(case, f"tests::{case.id}").record
                jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema("record"))
                found[case.name.partition("-")[2]] = record
        finally:
            sessions.close()
        assert left_behind(place) == []
        return found

    return measure


def left_behind(place: Path) -> list[int]:
    """Processes of the stand-in that still run."""
    alive = []
    for line in (place / "commands").read_text().splitlines() if (place / "commands").exists() else ():
        pid = json.loads(line)[0]
        ends = time.monotonic() + 20
        while time.monotonic() < ends and _runs(pid):
            time.sleep(0.02)
        alive += [pid] * _runs(pid)
    return alive


def _runs(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"mlc_llm" in command


def value(record: Record, name: str) -> Any:
    return record.metrics[name]["value"]


@pytest.fixture(scope="module")
def star(run: Run) -> dict[str, Record]:
    """A base point, the axes that are alive here moved alone, and two that are not."""
    return run("ctx=48;chunk=16,24") | run("ctx=48;chunk=16;batch=3") | run("ctx=48;chunk=16;window=off,16;sink=0,2")


def test_ids_and_outcomes(star: dict[str, Record]) -> None:
    assert {name: record.status for name, record in star.items()} == {
        BASE: "ok", WHOLE: "ok", THREE: "ok", "ctx48-pc16-bs01-swoff-sink2": "invalid", SLID: "skipped", SUNK: "skipped",
    }  # fmt: skip
    assert star[BASE].id == f"tests::mlc-q4f16_1-{BASE}"
    assert star[SLID].reason == f"axis inert, same as mlc-q4f16_1-{BASE}"
    reason = "MLC's configuration of llama models has no such field"
    assert (star[SLID].inert, star[SUNK].inert) == ({"window": reason}, {"window": reason, "sink": reason})
    assert star[BASE].inert == {}


def test_a_point_is_what_the_server_is_started_with(star: dict[str, Record], place: Path) -> None:
    started = {line[line.index("--overrides") + 1]: line for line in commands(place / "commands", "serve")}
    room = 48 // 2 + NEW_TOKENS + 176
    lines = {
        "max_num_sequence=1;max_total_seq_length=208;context_window_size=48;prefill_chunk_size=16",
        "max_num_sequence=1;max_total_seq_length=208;context_window_size=48;prefill_chunk_size=24",
        "max_num_sequence=3;max_total_seq_length=624;context_window_size=48;prefill_chunk_size=16",
    }
    # ten free pages beside prompt and output of every running request, or mlc_llm takes requests back
    assert room == 208
    assert lines <= set(started)
    for line in started.values():
        assert line[line.index("--prefix-cache-mode") + 1] in ("disable", "radix")
        assert line[line.index("--device") + 1] == "vulkan:0"
        assert line[line.index("--mode") + 1] == "server"
        assert {"--enable-debug", "--model-lib"} <= set(line)
    assert star[THREE].effective | {
        "mode": "server", "max_num_sequence": 3, "max_total_sequence_length": 624, "prefill_chunk_size": 16,
        "context_window_size": 48, "max_batch_size": 3, "prefix_caching": False, "own_library": True, "mlc_opt": "O2",
        "mlc_llm": "0.20.0.dev0", "tvm": "0.26.0", "dtype": "float16", "weight_format": "q4f16_1", "device": "vulkan:0",
    } == star[THREE].effective  # fmt: skip


def test_times_are_the_clients_and_the_servers_stand_beside_them(star: dict[str, Record]) -> None:
    for name in (BASE, THREE):
        record, batch = star[name], 3 if name == THREE else 1
        assert record.tokens == {
            "prompt": batch * LENGTH, "prefill_computed": batch * LENGTH, "generated": batch * NEW_TOKENS,
            "requested": batch * NEW_TOKENS, "requests": batch,
        }  # fmt: skip
        for metric in ("ttft_s", "e2e_s", "tpot_s", "decode_step_s", "decode_tok_s_batch", "decode_tok_s_agg"):
            assert (len(record.metrics[metric]["values"]), record.metrics[metric]["clock"]) == (2, "client")
            assert value(record, metric) > 0
        for metric in ("engine_ttft_s", "engine_tpot_s"):
            assert (len(record.metrics[metric]["values"]), record.metrics[metric]["clock"]) == (2, "engine")
        assert value(record, "engine_ttft_s") <= value(record, "ttft_s") < value(record, "e2e_s")
        assert "engine_ttft_s" in record.metrics["prefill_s"]["reason"]
        assert value(record, "decode_batch") == batch
        assert record.metrics["prefill_steps"]["reason"]
        # the text of one token of eight waits for the next: a chunk is no token
        assert record.effective["served"]["chunks"] == batch * (NEW_TOKENS - 1)
        assert len(record.samples["rounds"][0]["itl_s"]) == batch * (NEW_TOKENS - 2)
        assert record.samples["approx_chars"] == [batch * 2 * (NEW_TOKENS - 1)] * 2


def test_the_servers_counters_are_those_of_the_timed_rounds(star: dict[str, Record]) -> None:
    counters = star[THREE].samples["engine_metrics"]
    assert counters["prompt_tokens_sum"] == counters["prefill_tokens_sum"] == 2 * 3 * LENGTH
    assert counters["completion_tokens_sum"] == 2 * 3 * NEW_TOKENS
    assert counters["decode_time_by_batch_size_count{batch_size=3}"] == 2 * (NEW_TOKENS - 1)
    assert counters["last_finished_request_decode_tokens"] == NEW_TOKENS - 1


def test_predicted_and_reported_memory_stand_side_by_side(star: dict[str, Record], place: Path) -> None:
    architecture = architecture_of(str(place / "tiny-llama"))
    for name in (BASE, WHOLE, THREE):
        record, batch = star[name], 3 if name == THREE else 1
        predicted, reported = record.memory["predicted"], record.memory["reported"]
        assert reported == {
            f"{part}_bytes": round(megabytes * 2**20)
            for part, megabytes in (("total", 50.988), ("params", 1.440), ("kvcache", 48.349), ("temp", 1.198))
        }
        case = record.case
        chunk = int(case.params["prefill_chunk"])
        model = MlcMemory(
            architecture, json_chunk=chunk, per_sequence=True, sequence_tokens=208, library_bytes=1000 * chunk
        )
        expected = model.predict(point_of(case))
        assert predicted["params_bytes"] == expected.part("parameters")
        assert predicted["kvcache_bytes"] == int(expected.part("kv_cache") or 0)
        assert model.total_tokens(point_of(case)) == record.effective["max_total_sequence_length"]
        # of an architecture without published libraries only the compiled one can tell
        assert predicted["temp_bytes"] == int(expected.part("temporary") or 0)
        assert predicted["total_bytes"] == int(expected.total or 0)
        assert not [warning for warning in record.warnings if "predicted" in warning]
        # float16: two layers, two heads of 16
        assert predicted["kv_bytes"] == batch * (LENGTH + NEW_TOKENS - 1) * 2 * 2 * 2 * 16 * 2
        assert value(record, "mem_weights_bytes") == 1000
        assert value(record, "mem_measured_rss_peak_bytes") == record.memory["measured"]["rss_peak_bytes"] > 5_000_000
        for metric in ("kv_bytes_exact", "mem_measured_peak_bytes", "tpot_floor_s", "perplexity", "cache_tokens_mean"):
            assert value(record, metric) is None
            assert record.metrics[metric]["reason"]
    assert "no losses" in star[BASE].metrics["perplexity"]["reason"]


def test_prompts_from_the_prefix_cache_are_another_number(run: Run) -> None:
    record = run("ctx=48;chunk=16", prefix_caching="true")[BASE]
    assert record.tokens["prefix_hits"] == LENGTH - 1
    assert record.tokens["prefill_computed"] == LENGTH
    assert value(record, "ttft_cached_s") > 0


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("crash_start", "error", "mlc_llm serve ended with exit code 1.*Device is not found on your local environment"),
        ("hang_start", "error", "did not come up within 3 s and was killed \\(--kv-mlc-timeout\\).*Under mode"),
        ("oom_start", "oom", "can answer no more.*Insufficient GPU memory"),
        ("hang_request", "error", "did not answer 3 request\\(s\\) within 3 s"),
        ("crash_request", "error", "mlc_llm serve ended with exit code 134.*the driver went away"),
        ("nan_request", "error", "can answer no more: a thread of it died.*prob distribution contains NAN"),
        ("bad_request", "error", "a request failed: answered with 400.*larger than the model input length"),
        ("no_usage", "error", "a stream ended without its usage"),
        ("preempted", "invalid", "computed 1869 prompt tokens for prompts of 72: it took requests back"),
    ],
)
def test_failures_are_told_and_leave_nothing(
    fault: str, status: str, message: str, run: Run, star: dict[str, Record]
) -> None:
    record = run("ctx=48;chunk=16;batch=3", fault=fault, timeout_s=3)[THREE]
    assert record.status == status
    text = str(record.reason if status == "invalid" else (record.error or {})["message"])
    assert re.search(message, text, re.DOTALL), text
    assert "\x1b" not in text


def test_a_server_without_a_memory_line(run: Run) -> None:
    record = run("ctx=48;chunk=16", fault="no_memory_line")[BASE]
    assert record.status == "ok"
    assert record.memory["reported"] == {}
    assert "mlc_llm printed no memory estimate" in record.warnings


def test_what_hangs_on_a_cpu_is_not_tried(run: Run, place: Path) -> None:
    before = len(commands(place / "commands", "serve"))
    found = run("ctx=48;chunk=16,24;batch=1,2", device="cpu")
    assert {name: record.status for name, record in found.items()} == {
        BASE: "invalid", WHOLE: "ok", "ctx48-pc16-bs02-swoff-sink0": "invalid", "ctx48-pc24-bs02-swoff-sink0": "invalid",
    }  # fmt: skip
    assert "gives NaN for a prompt (24 tokens) longer than prefill_chunk_size=16" in str(found[BASE].reason)
    assert "--kv-prompt-share of at most 0.333" in str(found[BASE].reason)
    assert "requests that run together" in str(found["ctx48-pc24-bs02-swoff-sink0"].reason)
    assert len(commands(place / "commands", "serve")) == before + 1
    assert value(found[WHOLE], "tpot_floor_s") > 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"device": "cuda:0"}, "skipped", "cannot use cuda:0: mlc_llm 0.20.0.dev0 finds no cuda device at all"),
        ({"device": "vulkan:1"}, "skipped", "finds vulkan:0 here.*https://mlc.ai/wheels"),
        ({"device": "mps"}, "skipped", "Apple's GPUs are metal:0"),
        ({"quantization": "none"}, "invalid", "no format of MLC; give --kv-quantization=q0f16, q0f32 or q4f16_1"),
        ({"quantization": "4bit"}, "invalid", "--kv-quantization=4bit: no weight format of MLC"),
    ],
)
def test_what_cannot_run_says_why(options: dict[str, str], status: str, message: str, run: Run) -> None:
    record = run("ctx=48;chunk=16", **options)[BASE]
    assert record.status == status
    assert re.search(message, str(record.reason)), record.reason


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("tiny-llama", {"mlc_opt": "O1", "model_lib": "model.so"}, "--kv-model-lib is compiled already; leave one"),
        (
            "HF://mlc-ai/any-q4f16_1-MLC",
            {"mlc_opt": "cudagraph=1;cutlass=0"},
            "takes one word then; give O0 to O3, or one",
        ),
    ],
)
def test_optimisations_that_nobody_would_read(
    model: str, given: dict[str, str], message: str, place: Path, patch: pytest.MonkeyPatch
) -> None:
    resolved = default_options(
        engine="mlc", model=model.replace("tiny-llama", str(place / "tiny-llama")), device="vulkan:0"
    )
    case, *_ = dse_cases(resolved)
    engine = MlcEngine(on_the_double(**given))
    assert engine.case_params()["mlc_opt"] == given["mlc_opt"]
    with pytest.raises(UserError, match=message):
        engine.load(case, EngineSettings.of(resolved))


def test_without_mlc_llm_the_install_line_is_the_reason(place: Path) -> None:
    for mlc in ({}, {"mlc_python": "/no/such/python"}, {"mlc_python": sys.executable}):
        resolved = default_options(engine="mlc", model=str(place / "tiny-llama"), device="cpu", **mlc)
        case, *_ = dse_cases(resolved)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PYTHONPATH", raising=False)
            sessions = SessionPool(resolved)
            record = (
                CaseRunner(resolved, MetricRegistry(), ENVIRONMENT, sessions, suite_named).run(case, case.id).record
            )
        assert record.status == "skipped"
        assert "https://mlc.ai/wheels" in str(record.reason)
        assert "--kv-mlc-python" in str(record.reason)


def test_other_suites_are_not_for_it(place: Path, patch: pytest.MonkeyPatch) -> None:
    resolved = default_options(engine="mlc", model=str(place / "tiny-llama"), device="vulkan:0")
    case, *_ = compression_cases(resolved)
    sessions = SessionPool(on_the_double(), cache_dir=place / "cache")
    record = CaseRunner(resolved, MetricRegistry(), ENVIRONMENT, sessions, suite_named).run(case, case.id).record
    assert record.status == "invalid"
    assert "engine mlc runs the design-space suite alone" in str(record.reason)


def test_versions_are_those_of_the_interpreter_that_runs_it(patch: pytest.MonkeyPatch) -> None:
    found = MlcEngine(on_the_double()).version()
    assert (found["mlc_llm"], found["tvm"]) == ("0.20.0.dev0", "0.26.0")
    # what is not there computes nothing
    assert MlcEngine(on_the_double(mlc_python="/no/such/python")).version() == {}
