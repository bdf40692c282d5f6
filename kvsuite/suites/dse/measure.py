"""A design point, measured: memory and speed of requests that are served together, perplexity through the same limits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvsuite.case import Case
from kvsuite.engines.engine import Session
from kvsuite.engines.results import MemoryPass, Reach, Served, ServeRequest
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.single_request import judge_spread, put_memory, put_timing, put_weight_format
from kvsuite.memory_model.config import architecture_of
from kvsuite.meters.clock import Clock
from kvsuite.meters.timing import RoundTimes
from kvsuite.options.paths import expanded
from kvsuite.quantization.registry import NONE, quantization

from .cases import DSE, PARAMS, CaseVerdict, judge, point_of
from .quality import score_streams


def refuse_point(case: Case) -> None:
    """Refuse a point that breaks a rule whatever the model, or has nothing to measure, before a model is loaded.

    Raises
    ------
    CaseInvalid
        With the rule.
    """
    _require(judge(case).broken)
    if quantization(case.quantization or NONE).quality_only:
        raise CaseInvalid(
            f"--kv-quantization={case.quantization}: quality only, its weights stay dense; the design space is about memory "
            "and speed, name another format"
        )


def measure_point(case: Case, session: Session, run: CaseRun) -> None:
    """Measure one design point: quality, memory, speed.

    Raises
    ------
    CaseInvalid
        If the point breaks a rule, or this engine or model cannot take it.
    CaseSkipped
        If it differs from an earlier point of the run in inert axes only.
    """
    judged = functools.partial(
        judge, trained_length=session.model.get("trained_length"), is_dummy=bool(session.model.get("is_dummy"))
    )
    verdict = judged(case)
    _require(verdict.broken)
    run.found.warnings += verdict.flags
    reach = session.reach(case)
    run.found.inert |= reach.inert
    _skip_a_second_run(run, session, reach, judged)
    length, new_tokens = int(case.workload["prompt_tokens"]), int(case.workload["max_new_tokens"])
    requests = _requests(run, session, length, new_tokens)
    run.phase("quality")
    score_streams(run, session)
    put_weight_format(session, run)
    run.phase("memory")
    _memory(run, session, session.memory(requests.pop()))
    run.phase("decode")
    _speed(run, session, requests)


def _require(broken: Sequence[str]) -> None:
    if broken:
        raise CaseInvalid("; ".join(broken))


def _skip_a_second_run(run: CaseRun, session: Session, reach: Reach, judged: Callable[[Case], CaseVerdict]) -> None:
    """Of points that reach the runtime as the same settings the first of the space is measured, in whatever order they run."""
    for other in run.planned:
        if other == run.case:
            return
        if _but_for_the_point(other) != _but_for_the_point(run.case) or judged(other).broken:
            continue
        if session.reach(other).settings == reach.settings:
            raise CaseSkipped(f"axis inert, same as {other.id}")


def _but_for_the_point(case: Case) -> Case | None:
    if case.suite != DSE:
        return None
    # what is no axis of a point is another case's: the format of keys and values, for one
    params = {name: value for name, value in case.params.items() if name not in PARAMS.values()}
    # prompt and batch of the workload follow from the point
    workload = {name: value for name, value in case.workload.items() if name not in ("prompt_tokens", "batch")}
    return replace(case, name="", params=params, workload=workload)


def _requests(run: CaseRun, session: Session, length: int, new_tokens: int) -> list[list[ServeRequest]]:
    """Requests of every warm-up and round, and of the memory pass: as many as are served together, no two alike."""
    options, batch = run.common, int(run.case.workload["batch"])
    # random tokens: no text is long enough for many different prompts of a large context
    prompts = run.texts.prompts(
        session, {"prompt_tokens": length}, count=(options.num_warmup + options.rounds + 1) * batch, seed=options.seed
    )
    found = [ServeRequest(prompt, new_tokens) for prompt in prompts]
    return [found[at : at + batch] for at in range(0, len(found), batch)]


def _memory(run: CaseRun, session: Session, found: MemoryPass) -> None:
    workload = run.case.workload
    shape = int(workload["prompt_tokens"]), int(workload["max_new_tokens"]), int(workload["batch"])
    planned = session.planned_kv_bytes(*shape)
    put_memory(run, found, planned, session.planned_unknown())
    weights = session.model["weights_bytes"]
    run.found.put("mem_weights_bytes", weights, reason="the engine fetches the weights itself")
    if reason := session.floor_unknown():
        run.found.put("tpot_floor_s", None, reason=reason)
    else:
        read = session.model["step_weight_bytes"] + session.step_kv_bytes(*shape)
        run.found.put("tpot_floor_s", read / session.bandwidth, bandwidth_bytes_s=session.bandwidth, bytes=read)
    run.found.memory["predicted"] = {"kv_bytes": planned} | _predicted(run, session, found)


def _predicted(run: CaseRun, session: Session, found: MemoryPass) -> dict[str, int | None]:
    """Weights, pool, workspace and their sum in bytes, from the model's configuration alone."""
    case, folder = run.case, run.common.cache_dir
    try:
        architecture = architecture_of(case.model, cache_dir=None if folder is None else expanded(folder))
        predictor = session.memory_model(architecture)
        memory = None if predictor is None else predictor.predict(point_of(case))
    except UserError as error:
        run.found.warnings.append(f"memory is predicted from the loaded model: {error}")
        memory = None
    if memory is None:
        weights = (session.model.get("quantization") or {}).get("predicted_weight_bytes")
        return {"weights_bytes": weights} | found.predicted
    parts = {name: memory.part(part) for part, name in session.memory_parts.items()}
    parts |= {"total_bytes": memory.total, "needed_bytes": memory.needed}
    run.found.warnings += [f"memory is predicted in part only: {reason}" for reason in memory.reasons]
    return {name: None if size is None else int(size) for name, size in parts.items()}


def _speed(run: CaseRun, session: Session, requests: list[list[ServeRequest]]) -> None:
    """Warm-ups and timed rounds: each serves prompts of its own."""
    options, workload = run.common, run.case.workload
    new_tokens, batch, caches = int(workload["max_new_tokens"]), int(workload["batch"]), workload["prefix_caching"]
    clock = session.clock(run.clock(session.device))
    warmups, waiting = requests[: options.num_warmup], iter(requests[options.num_warmup :])
    # the memory pass was the first
    for index, warmup in enumerate(warmups[1:]):
        run.progress("warm-up", index + 2, options.num_warmup)
        session.serve(warmup, clock)
    rounds: list[RoundTimes] = []
    served: list[Served] = []
    again: list[Served] = []

    def one_round() -> None:
        own = next(waiting)
        served.append(_served(session, own, clock))
        if caches:
            again.append(_served(session, own, clock))
        rounds.append(RoundTimes(served[-1].times, clock.name))
        run.progress("timed rounds", len(rounds), options.rounds)

    run.rounds(one_round, options.rounds)
    put_timing(run, rounds, [_row(one) for one in rounds])
    judge_spread(run, ("ttft_s", "decode_step_s"))
    _cached(run, clock, again)
    counts = served[0].counts
    run.found.put("prefill_steps", counts.get("prefill_steps"), reason="the engine does not count them")
    run.found.put("decode_batch", counts.get("largest_batch"), reason="the engine does not count them")
    _engine_view(run, session, served)
    prompt = int(workload["prompt_tokens"]) * batch
    computed = sum(times.prefill_computed for times in served[0].times)
    run.found.tokens |= {
        "prompt": prompt,
        "prefill_computed": computed,
        "generated": new_tokens * batch,
        "requested": new_tokens * batch,
        "requests": batch,
    }
    session.effective["served"] = counts
    _warn(run, counts, prompt, batch)
    # the original's unit of output
    if all(one.texts is not None for one in served):
        run.found.samples["approx_chars"] = [sum(map(len, one.texts or ())) for one in served]
    elif session.tokenizer is not None:
        decode = session.tokenizer.decode
        run.found.samples["approx_chars"] = [sum(len(decode(output)) for output in one.outputs) for one in served]


def _engine_view(run: CaseRun, session: Session, served: Sequence[Served]) -> None:
    """What a server says itself of the timed rounds: its times beside ours, its counters by its own names."""
    times = [{} if one.engine is None else one.engine.times for one in served]
    for name in ("engine_ttft_s", "engine_tpot_s"):
        found = [each[name] for each in times if name in each]
        if len(found) == len(served):
            run.found.put(name, found, clock="engine")
    if counters := session.engine_metrics(served):
        run.found.samples["engine_metrics"] = counters


def _served(session: Session, requests: Sequence[ServeRequest], clock: Clock) -> Served:
    found = session.serve(requests, clock)
    for times, request in zip(found.times, requests, strict=True):
        if times.generated != request.new_tokens:
            raise CaseInvalid(
                f"generated {times.generated} tokens instead of {request.new_tokens}: no timing is comparable"
            )
    return found


def _row(one: RoundTimes) -> dict[str, float | None]:
    """Timing metrics of a round: prompts share steps, so the prefill is that of all of them."""
    row = one.metrics()
    names = ("prefill_s", "prefill_tok_s_computed", "prefill_tok_s_logical")
    row |= dict(zip(names, one.prefill_phase() or (None,) * len(names), strict=True))
    together = one.full_batch()
    return row | dict(zip(("decode_step_s", "decode_tok_s_batch"), together or (None, None), strict=True))


def _cached(run: CaseRun, clock: Clock, again: Sequence[Served]) -> None:
    reason = "prefixes are not cached; give --kv-prefix-caching"
    times = [
        RoundTimes(one.times, clock.name).metrics()["ttft_s"] for one in again if one.counts.get("prefix_hit_tokens")
    ]
    if again:
        reason = "no block of a prompt was found again: the pool had to give them away, or a prompt fills none"
        if "prefix_hit_tokens" in again[0].counts:
            run.found.tokens["prefix_hits"] = again[0].counts["prefix_hit_tokens"]
        # the meter cannot tell the two apart
        run.found.put(
            "energy_output_token_j", None, reason="every prompt of a round is served twice, once from the cache"
        )
    run.found.put("ttft_cached_s", [x for x in times if x is not None] or None, clock=clock.name, reason=reason)


def _warn(run: CaseRun, counts: dict[str, int], prompt: int, batch: int) -> None:
    warnings = run.found.warnings
    if counts.get("computed_prefill_tokens", prompt) != prompt:
        warnings.append(
            f"{counts['computed_prefill_tokens']} prompt tokens were computed for prompts of {prompt}: prefill numbers are "
            "not those of the prompts"
        )
    if counts.get("preemptions"):
        warnings.append(
            f"{counts['preemptions']} preemptions: the pool was too small for all requests at the same time"
        )
    if counts.get("largest_batch", batch) < batch:
        warnings.append(f"no more than {counts['largest_batch']} of {batch} requests decoded at the same time")
