"""Rows of the pipeline suite of a run that never was: a scheduler of one lane or two under made-up step times."""

from __future__ import annotations

from typing import Any

from kvsuite import __version__
from kvsuite.case import Case
from kvsuite.engines.results import RequestServed, Served, StepServed
from kvsuite.engines.serving_plan import ServingPlan
from kvsuite.measure.served import request_rows, step_columns
from kvsuite.metrics.registry import percentile
from kvsuite.record import RUN_SCHEMA, Record

PROMPT, NEW = 160, 48
RUN: dict[str, Any] = {"schema": RUN_SCHEMA, "run_id": "20261130T000000Z-pipe", "kvsuite_version": __version__}


def simulated(
    *,
    requests: int = 8,
    together: int = 2,
    prompt_s: float = 0.2,
    step_s: float = 0.02,
    gap_s: float = 0.0,
    lanes: int = 1,
) -> Served:
    """Prompts first, ``together`` requests at a time; with two lanes prompts do not hold decoding up."""
    now, prompt_free = 0.0, 0.0
    waiting, running = list(range(requests)), {}
    arrivals = [gap_s * index for index in range(requests)]
    admitted, tokens = [0.0] * requests, [[] for _ in range(requests)]  # type: ignore[var-annotated]
    steps: list[StepServed] = []

    def step(lane: Any, start: float, stop: float, prompts: int, decodes: int) -> None:
        steps.append(StepServed(lane, start, stop, prompts, decodes, len(running), len(waiting), 13 * len(running)))

    while waiting or running:
        due = [index for index in waiting if arrivals[index] <= now]
        if due and len(running) < together:
            index = due[0]
            waiting.remove(index)
            start = max(now, prompt_free)
            running[index] = NEW - 1
            admitted[index], prompt_free = start, start + prompt_s
            tokens[index].append(prompt_free)
            step("prompt" if lanes == 2 else "both", start, prompt_free, PROMPT, 0)
            now = now if lanes == 2 else prompt_free
            continue
        ready = [index for index in running if tokens[index][0] <= now]
        if not ready:
            now = min([tokens[index][0] for index in running] or [arrivals[waiting[0]]])
            continue
        stop = now + step_s
        for index in ready:
            tokens[index].append(stop)
            running[index] -= 1
            if not running[index]:
                del running[index]
        step("decode" if lanes == 2 else "both", now, stop, 0, len(ready))
        now = stop
    found = [
        RequestServed(arrivals[index], admitted[index], tokens[index], PROMPT, 0, PROMPT, int(index == 3), 208.0, 0.0)
        for index in range(requests)
    ]
    return Served([], [[0] * NEW] * requests, requests=found, steps=steps)


def pipeline_row(
    arm: str = "baseline",
    *,
    variant: str | None = None,
    served: Served | None = None,
    factor: float | None = None,
    policy: str = "streaming_llm",
    chunk: int | None = None,
    partition: tuple[int, int] | None = None,
    kl: float | None = 0.0,
    workload: str = "synthetic-long",
    status: str = "ok",
    drop: tuple[str, ...] = (),
    decisions: list[dict[str, Any]] | None = None,
    **record: Any,
) -> dict[str, Any]:
    """One row, its numbers those of what was served; metrics in ``drop`` have no value."""
    variant = variant or arm
    served = served or simulated()
    requests = len(served.requests)
    plan = ServingPlan(
        pool_blocks=26, max_model_len=208, max_num_seqs=8, step_tokens=chunk or 8192, prompts_first=chunk is None,
        stage="none" if factor is None else "async", lanes=2 if partition or variant == "streams-only" else 1,
    )  # fmt: skip
    case = Case(
        suite="pipeline",
        engine="nano",
        model="smollm2",
        name=f"{workload}-bs{requests:02d}-{arm}",
        device="cpu",
        dtype="float32",
        policy=None if factor is None else policy,
        policy_params={} if factor is None else {"factor": factor},
        workload={
            "protocol": "load", "workload": workload, "name": workload, "arrivals": "closed", "arrival_rate": None,
            "batch": requests, "num_batches": 1, "requests": requests, "prompt_tokens": PROMPT, "max_new_tokens": NEW,
        },
        params={"variant": variant, "factor": factor, "chunk": chunk, "slo": "1s:25ms", "serving": plan.to_dict()},
        partition=None if partition is None else {"decode_sms": partition[0], "prompt_sms": partition[1]},
    )  # fmt: skip
    metrics = _metrics(served, kl) if status == "ok" else {}
    metrics = {
        name: {"value": None, "reason": "not measured here"} if name in drop else entry
        for name, entry in metrics.items()
    }
    realised = None
    if partition is not None and status == "ok":
        realised = {
            "decode_sms": partition[0],
            "prompt_sms": partition[1],
            "device_sms": 132,
            "provider": "cuda driver",
        }
    samples: dict[str, Any] = {}
    if status == "ok" and "samples" not in drop:
        samples = {"requests": request_rows(served), "steps": step_columns(served), "decisions": decisions or []}
    return Record(
        case=case,
        id=f"benchmarks/test_pipeline.py::test_pipeline[nano-{case.name}]",
        status=status,  # type: ignore[arg-type]
        metrics=metrics,
        samples=samples,
        model={"label": "SmolLM2-135M-Instruct", "kind": "real"},
        partition={"requested": case.partition, "realised": realised},
        rounds=2,
        **record,
    ).to_dict()


def _metrics(served: Served, kl: float | None) -> dict[str, Any]:
    ttft = [one.token_s[0] - one.arrival_s for one in served.requests]
    tpot = [(one.token_s[-1] - one.token_s[0]) / (len(one.token_s) - 1) for one in served.requests]
    itl = [b - a for one in served.requests for a, b in zip(one.token_s, one.token_s[1:], strict=False)]
    wall = max(one.token_s[-1] for one in served.requests)
    numbers: dict[str, float | None] = {
        "output_tok_s": sum(len(one.token_s) for one in served.requests) / wall,
        "goodput_req_s": sum(t <= 1 and p <= 0.025 for t, p in zip(ttft, tpot, strict=True)) / wall,
        "served_kld": kl,
    }
    for name, samples in (("ttft", ttft), ("tpot", tpot), ("itl", itl)):
        for which, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            numbers[f"{name}_{which}_s"] = percentile(samples, q)
    return {
        name: {"value": number} | ({} if number is not None else {"reason": "fewer samples than it needs"})
        for name, number in numbers.items()
    }


def a_run() -> list[dict[str, Any]]:
    """Every variant, partitions and factors among them, and a case that failed."""

    def arm(name: str, variant: str, together: int, prompt_s: float, step_s: float, **more: Any) -> dict[str, Any]:
        lanes = 2 if more.get("partition") or variant in ("streams-only", "triad") else 1
        served = simulated(requests=12, together=together, prompt_s=prompt_s, step_s=step_s, lanes=lanes)
        return pipeline_row(name, variant=variant, served=served, **more)

    moved = [
        {"time_s": 0.0, "inputs": {}, "decision": {"pipeline": "prefill", "sm_compress_ratio": 0.25}},
        {"time_s": 1.1, "inputs": {}, "decision": {"pipeline": "prefill", "sm_compress_ratio": 0.4}},
    ]
    return [
        arm("baseline", "baseline", 2, 0.2, 0.02),
        arm("compression-only-f2", "compression-only", 4, 0.22, 0.024, factor=2.0, kl=0.136),
        arm("compression-only-f5", "compression-only", 7, 0.22, 0.03, factor=5.0, kl=0.277),
        arm("chunked-c64", "chunked", 2, 0.25, 0.021, chunk=64),
        arm("chunked-c128", "chunked", 2, 0.23, 0.023, chunk=128),
        arm("chunked-c64-f5", "chunked", 7, 0.25, 0.026, chunk=64, factor=5.0, kl=0.28),
        arm("streams-only", "streams-only", 7, 0.25, 0.05, factor=5.0, kl=0.277),
        arm("greenctx-only-sm32_96", "greenctx-only", 7, 0.3, 0.036, partition=(32, 96), factor=5.0, kl=0.277),
        arm("greenctx-only-sm64_64", "greenctx-only", 7, 0.4, 0.025, partition=(64, 64), factor=5.0, kl=0.277),
        arm("triad", "triad", 7, 0.35, 0.03, factor=5.0, kl=0.277, decisions=moved),
        pipeline_row(
            "greenctx-only-sm7_7", variant="greenctx-only", served=simulated(requests=12), status="skipped",
            reason="--kv-greenctx-sms=7:7: no legal split of 132 SMs",
        ),
    ]  # fmt: skip
