"""Memory and speed of a case: warm-up, the instrumented pass, the timed rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvsuite.engines.capabilities import AppliesPolicy
from kvsuite.engines.engine import Session
from kvsuite.engines.results import MemoryPass, ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import Clock
from kvsuite.meters.timing import RoundTimes

from .case_run import CaseRun

# coefficient of variation above which times are shown and not judged
_MAX_CV = 0.10
_NO_PREFILL_END = "the server does not tell when a prompt is computed; engine_ttft_s is what it says itself"


def measure_single_request(session: Session, run: CaseRun, score: Callable[[bool], None]) -> None:
    """Quality, memory and speed of a case that serves one request at a time.

    Parameters
    ----------
    session
        Prepared for the case.
    run
        The case's.
    score
        The quality pass; it is told whether times are asked for as well.
    """
    # what only rounds weights computes at the speed and in the memory of the dense model
    quality_only = bool((session.model.get("quantization") or {}).get("quality_only"))
    count = run.common.num_warmup + run.common.rounds + 1
    # a prompt that the corpus cannot give must not be found out after minutes of scoring
    prompts = [] if quality_only else run.texts.prompts(session, run.case.workload, count=count, seed=run.common.seed)
    run.phase("quality")
    score(not quality_only)
    if quality_only:
        run.found.inert["speed"] = f"{run.case.quantization} is rounded and kept dense: quality only"
        return
    put_weight_format(session, run)
    _measure_speed(run, session, prompts)


def put_weight_format(session: Session, run: CaseRun) -> None:
    """Keep what the weight format predicts and takes."""
    facts = session.model.get("quantization")
    if facts is None:
        return
    run.found.put("mem_predicted_weights_bytes", facts["predicted_weight_bytes"])
    run.found.put("bits_per_weight", facts["bits_per_weight"])
    run.found.put("bits_per_weight_without_embeddings", facts["bits_per_weight_without_embeddings"])


def _measure_speed(run: CaseRun, session: Session, prompts: Sequence[Sequence[int]]) -> None:
    """Memory pass and timed rounds of one request; ``prompts`` are one for each warm-up and round, and one more."""
    options, workload, found = run.common, run.case.workload, run.found
    run.phase("memory")
    length, new_tokens = int(workload["prompt_tokens"]), int(workload["max_new_tokens"])
    for index in range(max(options.num_warmup - 1, 0)):
        run.progress("warm-up", index + 1, options.num_warmup)
        session.serve([ServeRequest(prompts[index], new_tokens)])
    _memory(run, session, session.memory([ServeRequest(prompts[-1], new_tokens)]), length, new_tokens)
    run.phase("decode")
    session.capture([ServeRequest(prompts[0], new_tokens)])
    clock = session.clock(run.clock(session.device))
    if options.num_warmup and session.effective.get("decode_step") == "cuda_graph":
        session.serve([ServeRequest(prompts[-1], new_tokens)], clock)
    rounds: list[RoundTimes] = []
    waiting = iter(prompts[options.num_warmup :])

    def one_round() -> None:
        [times] = session.serve([ServeRequest(next(waiting), new_tokens)], clock).times
        if times.generated != new_tokens:
            raise CaseInvalid(f"generated {times.generated} tokens instead of {new_tokens}: no timing is comparable")
        rounds.append(RoundTimes([times], clock.name))
        run.progress("timed rounds", len(rounds), options.rounds)

    reason = session.effective.get("decode_step_reason")
    if reason and options.decode_step == "auto":
        found.warnings.append(f"decode steps ran uncaptured: {reason}")
    run.rounds(one_round, options.rounds)
    put_timing(run, rounds, [one.metrics() for one in rounds])
    judge_spread(run)
    _first_step(run, session, prompts[0][:1], clock)
    found.tokens |= {"prompt": length, "prefill_computed": length, "generated": new_tokens, "requested": new_tokens}
    if length + new_tokens > (session.model.get("trained_length") or length + new_tokens):
        found.warnings.append(
            f"{length + new_tokens} positions are more than the trained length {session.model['trained_length']}"
        )


def judge_spread(run: CaseRun, names: Sequence[str] = ("ttft_s", "tpot_s")) -> None:
    """Warn where times cannot be compared: too few rounds, or a spread of one of ``names`` above `_MAX_CV`."""
    metrics, warnings = run.found.metrics, run.found.warnings
    if run.common.rounds < 2:
        warnings.append("one timed round: no spread, so no difference in speed can be judged; raise --kv-rounds")
    for name in names:
        cv = metrics[name].get("cv")
        if cv is not None and cv > _MAX_CV:
            warnings.append(
                f"unstable: {name} varies by {cv:.0%} between rounds (bound {_MAX_CV:.0%}), so its differences mean "
                "nothing; is the machine busy?"
            )


def _first_step(run: CaseRun, session: Session, prompt: Sequence[int], clock: Clock) -> None:
    try:
        served = [session.serve([ServeRequest(prompt, 1)], clock) for _ in range(run.common.rounds)]
    except CaseInvalid as invalid:
        run.found.put("first_step_s", None, reason=f"a prompt of one token: {invalid}")
        return
    run.found.put("first_step_s", [one.times[0].ttft_s for one in served], clock=clock.name)


def put_timing(run: CaseRun, rounds: Sequence[RoundTimes], rows: Sequence[Mapping[str, float | None]]) -> None:
    """Write timing metrics: ``rows`` are those of ``rounds`` by name, ``None`` where one is not defined."""
    clock = rounds[0].clock
    for name in rows[0]:
        values = [row[name] for row in rows]
        known = [value for value in values if value is not None]
        reason = _NO_PREFILL_END if name.startswith("prefill_") else "needs at least two output tokens"
        run.found.put(name, known or None, clock=clock, reason=reason)
    gaps = [gap for one in rounds for request in one.requests for gap in request.itl_s]
    run.found.put("itl_s", gaps or None, clock=clock, pooled="pooled_tokens", reason="needs at least two output tokens")
    run.found.samples["rounds"] = [
        dict(row) | {"itl_s": [gap for request in one.requests for gap in request.itl_s]}
        for row, one in zip(rows, rounds, strict=True)
    ]


def _memory(run: CaseRun, session: Session, found: MemoryPass, length: int, new_tokens: int) -> None:
    if run.case.policy and found.kv_bytes_decode == session.full_kv_bytes(length + new_tokens - 1):
        run.found.warnings.append("nothing was removed in the speed pass: the cache never outgrew the method's size")
    planned = session.planned_kv_bytes(length, new_tokens)
    put_memory(run, found, planned, session.planned_unknown())
    asked = session.ratio_requested if isinstance(session, AppliesPolicy) else None
    run.found.put("ratio_requested", asked, reason="the method is given by sizes, not by a ratio")
    weights = session.model["weights_bytes"]
    run.found.put("mem_weights_bytes", weights, reason="the engine fetches the weights itself")
    for name, seconds in (("compress_s", found.compress_s), ("evict_s", found.evict_s)):
        run.found.put(name, seconds, clock=run.clock(session.device).name, reason="nothing is compressed then")
    before, after = found.kv_bytes_prefill, found.kv_bytes_decode
    unknown = session.floor_unknown() or found.unseen
    if before is None or after is None or unknown:
        run.found.put("ratio_effective", None, reason=unknown or "the engine does not tell what its cache holds")
        run.found.put("tpot_floor_s", None, reason=unknown or "the engine does not tell what its cache holds")
    else:
        run.found.put("ratio_effective", 1 - before / session.full_kv_bytes(length))
        floor = (session.model["step_weight_bytes"] + (before + after) / 2) / session.bandwidth
        run.found.put("tpot_floor_s", floor, bandwidth_bytes_s=session.bandwidth)
    run.found.memory["predicted"] = {
        "kv_bytes": planned,
        "weights_bytes": weights,
    } | found.predicted


def put_memory(run: CaseRun, found: MemoryPass, planned: int | None, unknown: str) -> None:
    """Write what a memory pass found: bytes and tokens of the cache, peaks, what the engine reported.

    Parameters
    ----------
    run
        The case's.
    found
        The pass.
    planned
        Predicted cache bytes at the end of decode, ``None`` where they are not known.
    unknown
        Why they are not.
    """
    run.found.warnings += found.warnings
    peaks = [found.prefill.peak.value, found.decode.peak.value]
    known = None if None in peaks else max(p for p in peaks if p is not None)
    before = found.prefill.before.value
    reason = found.prefill.peak.reason
    lengths = found.lengths_decode
    for name, value, why in (
        ("kv_bytes_exact", found.kv_bytes_decode, found.unseen),
        ("kv_bytes_exact_prefill", found.kv_bytes_prefill, found.unseen),
        ("mem_predicted_kv_bytes", planned, unknown),
        ("cache_tokens_mean", sum(lengths) / len(lengths) if lengths else None, found.unseen),
        ("cache_tokens_min", min(lengths, default=None), found.unseen),
        ("cache_tokens_max", max(lengths, default=None), found.unseen),
        ("mem_measured_before_bytes", before, reason),
        ("mem_measured_prefill_peak_bytes", peaks[0], reason),
        ("mem_measured_decode_peak_bytes", peaks[1], reason),
        ("mem_measured_peak_bytes", known, reason),
        ("mem_measured_dynamic_bytes", None if known is None or before is None else known - before, reason),
        ("mem_measured_reserved_bytes", found.decode.reserved.value, reason),
        ("mem_measured_driver_bytes", found.driver.value, found.driver.reason),
        ("mem_measured_rss_peak_bytes", found.resident.value, found.resident.reason),
    ):
        run.found.put(name, value, **({"reason": why} if value is None else {}))
    run.found.metrics["mem_measured_driver_bytes"] |= found.driver.facts
    if found.reported:
        run.found.memory["reported"] = dict(found.reported)
    if found.unseen:
        run.found.memory["measured"] = {
            "driver_bytes": found.driver.value,
            "rss_peak_bytes": found.resident.value,
        }
        return
    run.found.memory["measured"] = {
        "kv_bytes_allocated": found.kv_bytes_allocated,
        "cache_tokens_per_layer": found.lengths_decode,
        "cache_tokens_per_layer_prefill": found.lengths_prefill,
    }
