"""The instrumented pass of the hf engine: bytes and lengths of every layer, meters with reasons, time of compression."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hf_sessions import LAYERS, TOKEN_BYTES, case, random_tokens, session, streaming
from policy_matrix import MATRIX, Line
from requests_served import memory_of
from synthetic_session import ScriptedClock

from kvsuite.engines.hf.cache_store import RingStore
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import IntervalClock

PROMPT = random_tokens(64)


@pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])
@pytest.mark.parametrize("skip", [[], [0, 1]], ids=["all", "skip01"])
def test_defect_03_what_the_memory_pass_counts(line: Line, skip: list[int]) -> None:
    on = session()
    on.prepare(case(policy=line.policy, policy_params=line.parameters | {"skip_layers": skip}))
    found = memory_of(on, PROMPT, 8)
    plans = on._generation.plan(64, 7)
    assert plans is not None
    compressed, full = plans
    assert found.lengths_prefill == [full.prefill if i in skip else compressed.prefill for i in range(LAYERS)]
    assert found.lengths_decode == [full.final if i in skip else compressed.final for i in range(LAYERS)]
    assert compressed.final < full.final == 71
    layer_bytes = TOKEN_BYTES // LAYERS
    assert found.kv_bytes_prefill == sum(found.lengths_prefill) * layer_bytes
    assert found.kv_bytes_decode == sum(found.lengths_decode) * layer_bytes == on.planned_kv_bytes(64, 8)
    assert found.kv_bytes_allocated >= found.kv_bytes_decode
    assert found.warnings == []
    assert found.compress_s is not None
    assert found.evict_s is not None
    assert found.compress_s > 0
    assert found.evict_s >= 0


def test_the_full_cache_in_the_memory_pass() -> None:
    on = session()
    on.prepare(case())
    found = memory_of(on, PROMPT, 8)
    assert found.lengths_decode == [71] * LAYERS
    assert found.kv_bytes_decode == 71 * TOKEN_BYTES == on.full_kv_bytes(71) == on.planned_kv_bytes(64, 8)
    assert found.compress_s is found.evict_s is None
    # off its device a meter says null and why
    assert found.prefill.peak.value is found.decode.peak.value is None
    assert found.prefill.peak.reason == "torch counts no allocations on cpu"
    assert found.driver.reason == "NVML knows no cpu device"
    assert found.resident.value is None or found.resident.value > 50e6


def test_a_cache_that_keeps_more_than_its_tokens_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    on = session()
    on.prepare(streaming(16))
    monkeypatch.setattr(RingStore, "headroom", lambda self, slots: 0)
    found = memory_of(on, PROMPT, 8)
    assert len(found.warnings) == 1
    assert "something is kept alive" in found.warnings[0]


@pytest.mark.parametrize("asked", [0.25, 0.5, 1.0])
def test_a_press_is_measured_by_what_it_left(asked: float) -> None:
    pytest.importorskip("kvpress")
    on = session()
    on.prepare(case(policy="kvpress:Knorm", policy_params={"keep_ratio": asked}))
    found = memory_of(on, PROMPT, 8)
    kept = int(64 * asked)
    assert found.lengths_prefill == [kept] * LAYERS
    assert found.lengths_decode == [kept + 7] * LAYERS
    assert found.kv_bytes_prefill == kept * TOKEN_BYTES
    assert found.kv_bytes_decode == (kept + 7) * TOKEN_BYTES
    assert found.evict_s is None
    assert on.planned_kv_bytes(64, 8) is None


def test_a_press_that_did_nothing_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kvpress")
    from kvsuite.compression.kvpress.session import KvpressSession

    on = session()
    on.prepare(case(policy="kvpress:Knorm", policy_params={"keep_ratio": 0.5}))
    monkeypatch.setattr(KvpressSession, "prefill", lambda self: contextlib.nullcontext())
    with pytest.raises(
        CaseInvalid, match=r"kvpress:Knorm was asked to remove 0\.500 of the prompt's cache and removed 0\.000"
    ):
        memory_of(on, PROMPT, 8)


def test_intervals_add_up() -> None:
    clock = ScriptedClock()
    intervals = IntervalClock(clock)
    assert intervals.total() == 0.0
    for idle, busy in ((5.0, 0.25), (1.0, 0.5), (0.0, 0.125)):
        clock.advance(idle)
        intervals(True)
        clock.advance(busy)
        intervals(False)
    assert intervals.total() == 0.875


@pytest.mark.parametrize("calls", [[False], [True, True], [True, False, False]])
def test_intervals_do_not_nest(calls: list[bool]) -> None:
    intervals: Any = IntervalClock(ScriptedClock())
    *good, wrong = calls
    for begin in good:
        intervals(begin)
    with pytest.raises(RuntimeError, match="must not nest"):
        intervals(wrong)
