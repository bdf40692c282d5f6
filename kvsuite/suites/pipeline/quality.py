"""Quality of what a case serves: the full cache's continuation, forced through the case's own pool, arrivals and policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from kvsuite.engines.capabilities import ScoresOutput, lacking
from kvsuite.engines.engine import Session
from kvsuite.engines.results import ServeRequest
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.served_quality import METRICS, DenseRun, put_served_quality, serve_dense

from .options import PipelineOptions

#: the last dense run of each session, by the hash of its prompts: the variants of a workload all compare with it
_DENSE: WeakKeyDictionary[Session, tuple[str, DenseRun]] = WeakKeyDictionary()


def put_quality(session: Any, run: CaseRun, requests: Sequence[ServeRequest], prompts_hash: str) -> None:
    """Compare what the prepared case serves with the full cache, or say why not."""
    own = run.options.of(PipelineOptions)
    reason = lacking(session, ScoresOutput)
    if not own.served_quality:
        reason = "--kv-served-quality=off"
    elif session.model["is_dummy"]:
        reason = "random weights"
    if reason:
        for name in METRICS:
            run.found.put(name, None, reason=reason)
        return
    run.progress("full cache", 0, 2)
    name = f"{prompts_hash} {[one.new_tokens for one in requests]}"
    held = _DENSE.get(session)
    if held is None or held[0] != name:
        held = _DENSE[session] = name, serve_dense(session, requests)
    run.progress("as served", 1, 2)
    put_served_quality(run.found, session, requests, held[1], concurrency=own.concurrency)
