"""How a case ends when something goes wrong: a status, the phase, and never a lost record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import jsonschema
import pytest
import torch
from synthetic_session import Bench, Script

from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.measure.runner import is_cuda_error, is_out_of_memory
from kvsuite.plugin.signals import RunEnded, Signals
from kvsuite.record import Record, schema

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
)


def failing(where: str, error: BaseException) -> Callable[[str], None]:
    def fault(name: str) -> None:
        if name == where:
            raise error

    return fault


def run(where: str, error: BaseException) -> tuple[Record, Bench]:
    bench = Bench(Script(fault=failing(where, error)))
    record = bench.run().record
    row = record.to_dict()
    jsonschema.validate(row, schema("record"))
    json.dumps(row, allow_nan=False)
    return record, bench


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(CPU_MESSAGE),
        RuntimeError("MPS backend out of memory"),
    ],
    ids=["torch", "python", "cpu", "mps"],
)
@pytest.mark.parametrize(
    ("where", "phase"), [("prepare", "load"), ("score", "quality"), ("memory", "memory"), ("generate", "decode")]
)
def test_out_of_memory_names_the_phase(error: BaseException, where: str, phase: str) -> None:
    record, _ = run(where, error)
    assert record.status == "oom"
    assert record.error is not None
    assert record.error["phase"] == phase
    assert record.error["type"] == type(error).__name__
    assert record.error["message"] == str(error)


@pytest.mark.parametrize(("where", "phase"), [("prepare", "load"), ("warm", "memory"), ("generate", "decode")])
def test_another_exception_is_an_error(where: str, phase: str) -> None:
    record, _ = run(where, ZeroDivisionError("boom"))
    assert record.status == "error"
    assert record.error is not None
    assert (record.error["type"], record.error["message"], record.error["phase"]) == (
        "ZeroDivisionError",
        "boom",
        phase,
    )
    assert "fault(name)" in str(record.error["traceback"])
    assert record.case_key.startswith("sha256:")
    assert record.settings_hash.startswith("sha256:")


def test_what_was_measured_before_stays() -> None:
    record, _ = run("generate", RuntimeError("boom"))
    assert record.metrics["perplexity"]["value"] is not None
    assert record.metrics["kv_bytes_exact"]["value"] == 60
    assert "ttft_s" not in record.metrics


def test_skipped_and_invalid_have_a_reason() -> None:
    skipped, _ = run("prepare", CaseSkipped("no such device"))
    assert (skipped.status, skipped.reason, skipped.error) == ("skipped", "no such device", None)
    invalid, _ = run("memory", CaseInvalid("breaks a rule"))
    assert (invalid.status, invalid.reason, invalid.error) == ("invalid", "breaks a rule", None)


def test_bad_input_ends_the_run() -> None:
    bench = Bench(Script(fault=failing("prepare", UserError("--kv-x=1: wrong"))))
    with pytest.raises(UserError, match="--kv-x=1: wrong"):
        bench.run()
    assert bench.session.called("finish")


def test_a_text_too_short_is_bad_input() -> None:
    bench = Bench()
    with pytest.raises(
        UserError, match=r"--kv-max-tokens: text 1 of corpus default has \d+ tokens, 9999999 are needed"
    ):
        bench.run(workload={"max_tokens": 9_999_999})


def test_an_interrupt_is_no_result() -> None:
    bench = Bench(Script(fault=failing("generate", KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert bench.session.called("finish")


@pytest.mark.parametrize("where", ["prepare", "score", "memory", "generate"])
def test_the_session_is_cleaned_whatever_happens(where: str) -> None:
    _, bench = run(where, RuntimeError("boom"))
    assert bench.session.calls[-1] == ("finish",)


def test_a_failing_cleanup_keeps_the_record() -> None:
    record, _ = run("finish", RuntimeError("device is gone"))
    assert record.status == "ok"
    assert record.metrics["ttft_s"]["value"] == 0.75
    assert "cleaning up after the case failed: device is gone" in record.warnings


def test_the_next_case_runs_after_a_failure() -> None:
    def fault(name: str) -> None:
        if name == "generate" and not failed:
            failed.append(name)
            raise torch.OutOfMemoryError("CUDA out of memory")

    failed: list[str] = []
    bench = Bench(Script(fault=fault))
    assert bench.run().record.status == "oom"
    assert bench.run().record.status == "ok"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError(CPU_MESSAGE), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
        (OSError("No space left on device"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, found: bool) -> None:
    assert is_out_of_memory(error) is found


@pytest.mark.parametrize(("where", "phase"), [("prepare", "load"), ("score", "quality"), ("generate", "decode")])
def test_a_case_that_takes_too_long_is_stopped(where: str, phase: str) -> None:
    def fault(name: str) -> None:
        if name == where:
            time.sleep(60)

    bench = Bench(Script(fault=fault), options={"timeout": "1"})
    record = bench.run().record
    row = record.to_dict()
    jsonschema.validate(row, schema("record"))
    assert (record.status, record.reason) == (
        "crashed",
        "timeout: it ran longer than --kv-timeout=1 s and was stopped",
    )
    assert record.error is not None
    assert (record.error["type"], record.error["phase"]) == ("Timeout", phase)
    assert "time.sleep(60)" in record.error["traceback"]
    assert bench.runner.timed_out, "what it left behind is not known"
    assert bench.session.calls[-1] == ("finish",)


def test_a_case_in_time_hears_no_alarm() -> None:
    bench = Bench(options={"timeout": "60"})
    assert bench.run().record.status == "ok"
    assert not bench.runner.timed_out


CUDA_MESSAGE = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"


def test_after_a_cuda_error_no_case_of_the_device_is_measured() -> None:
    errors = [RuntimeError(CUDA_MESSAGE)]

    def fault(name: str) -> None:
        if name == "generate" and errors:
            raise errors.pop()

    bench = Bench(Script(fault=fault))
    first = bench.run(device="cuda:0").record
    assert (first.status, first.error and first.error["type"]) == ("error", "RuntimeError")
    calls = len(bench.session.calls)
    second = bench.run(device="cuda:0").record
    assert second.error is not None
    assert (second.status, second.error["type"], second.metrics) == ("error", "DevicePoisoned", {})
    assert second.error["message"].startswith("not measured: the CUDA error of tests::case left this process no device")
    assert len(bench.session.calls) == calls
    assert bench.run().record.status == "ok", "the CPU is as good as before"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RuntimeError(CUDA_MESSAGE), True),
        (RuntimeError("CUDA driver error: unspecified launch failure"), True),
        (type("AcceleratorError", (RuntimeError,), {})("an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered"), True),
        (RuntimeError("BatchDecode failed with error an illegal memory access was encountered"), True),
        (RuntimeError("device-side assert triggered"), True),
        (RuntimeError("unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA error: no"), False),
    ],
)
def test_which_errors_outlive_their_case(error: BaseException, found: bool) -> None:
    assert is_cuda_error(error) is found


def test_a_real_allocation_that_cannot_be() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("where", ["prepare", "score", "memory", "generate"])
@pytest.mark.parametrize(
    "ends", [pytest.exit.Exception("enough"), KeyboardInterrupt("SIGTERM")], ids=["exit", "signal"]
)
def test_what_ends_the_run_passes_through_a_case(where: str, ends: BaseException) -> None:
    # pytest.exit raises an Exception, and a signal may come at any time
    bench = Bench(Script(fault=failing(where, ends)))
    bench.runner.pass_on = Signals().pass_on
    with pytest.raises(type(ends)):
        bench.run()
    assert bench.session.called("finish")


def test_a_signal_whose_exception_was_lost_is_raised_again() -> None:
    # native code that imports a module clears what its import raises, and fails with an error of its own
    signals = Signals()
    signals.heard = "SIGTERM"
    bench = Bench(Script(fault=failing("score", ImportError("a half of numpy"))))
    bench.runner.pass_on = signals.pass_on
    with pytest.raises(RunEnded, match="SIGTERM"):
        bench.run()


def test_a_policy_that_exits_is_an_error_of_its_case() -> None:
    bench = Bench(Script(fault=failing("score", SystemExit(3))))
    bench.runner.pass_on = Signals().pass_on
    record = bench.run().record
    assert record.error is not None
    assert (record.status, record.error["type"], record.error["message"]) == ("error", "SystemExit", "3")
