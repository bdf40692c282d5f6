"""Bytes of the weights, and of one context's cache: the memory pass of the suite."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.engines.engine import Session
from kvsuite.engines.results import ServeRequest
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.single_request import put_memory, put_weight_format

#: tokens behind the context in the memory pass: a question and an answer
FED_TOKENS = 16


def put_weights(session: Session, run: CaseRun) -> None:
    """Format and bytes of the weights."""
    put_weight_format(session, run)
    run.found.put("mem_weights_bytes", session.model["weights_bytes"], reason="the engine does not tell them")


def measure_context_memory(session: Session, run: CaseRun, context: Sequence[int]) -> ServeRequest:
    """Bytes and times of one context's compression; the request that was measured."""
    run.phase("memory")
    request = ServeRequest(list(context), FED_TOKENS)
    found = session.memory([request])
    for name, seconds in (("compress_s", found.compress_s), ("evict_s", found.evict_s)):
        run.found.put(name, seconds, clock=run.clock(session.device).name, reason="nothing is compressed then")
    put_memory(run, found, session.planned_kv_bytes(len(context), request.new_tokens), session.planned_unknown())
    return request
