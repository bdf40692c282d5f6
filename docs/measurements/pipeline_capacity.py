"""Capacity on the long rows of a trace in a small pool: the highest rate at which 90 % of the requests meet the SLO.

    python docs/measurements/pipeline_capacity.py --trace AzureLLMInferenceTrace_conv.csv --out OUT
    python docs/measurements/pipeline_capacity.py --trace TRACE --device cpu --tiny
    python docs/measurements/pipeline_capacity.py --trace TRACE --simulate OUT/capacity-*.json.gz

Requests are those of the suite's heavy-trace: ``--requests`` rows with the longest contexts, at the gaps of the trace, scaled
to a rate. An arm is typed with the range of its rates behind ``@``: ``prompts-first/5@11:16``. Every attempt is printed as it
ends. With ``--simulate`` nothing is served: step times are fitted to the steps of earlier attempts (those of chunks to an arm
of chunks), and the scheduler alone says which rate every arm would reach, and what the attempts themselves should have been.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from serving_arms import Arm, opened, random_prompt
from step_fit import FittedStepTime, fitted

from kvsuite.engines.nano.under_load import serve_under_load
from kvsuite.engines.results import ServeRequest, StepServed
from kvsuite.meters.capacity import Attempt, attempt_of, find_capacity
from kvsuite.meters.serving_times import LoadTimes, Slo
from kvsuite.models.load import load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.simulation import Arrival, simulate
from kvsuite.workloads.arrivals import mean_rate, trace_arrivals
from kvsuite.workloads.request_trace import heavy_rows, times_of

LONGEST = 4096


def lengths_of(args: argparse.Namespace) -> tuple[list[tuple[int, int]], list[float]]:
    """Prompt and output tokens of the requests by arrival, and arrivals at one request a second."""
    rows = sorted(heavy_rows(args.trace, args.requests), key=lambda row: times_of([row], args.trace)[0])
    arrivals = trace_arrivals(times_of(rows, args.trace))
    scale = mean_rate(arrivals)
    assert scale is not None
    part = 32 if args.tiny else 1
    lengths = [(min(row.context, LONGEST - row.generated) // part, row.generated // part) for row in rows]
    return lengths, [at * scale for at in arrivals]


def sought(typed: str) -> tuple[Arm, float, float]:
    arm, _, rates = typed.partition("@")
    lowest, highest = map(float, rates.split(":"))
    return Arm.parse(arm), lowest, highest


def say(args: argparse.Namespace, found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)
    if args.out:
        with (Path(args.out) / "pipeline_capacity.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")


def measure(args: argparse.Namespace, typed: str, loaded: Any) -> None:
    (arm, lowest, highest), slo = sought(typed), Slo.parse(args.slo)
    lengths, unit = lengths_of(args)
    vocab = int(loaded.text_config.vocab_size)
    requests = [ServeRequest(random_prompt(prompt, vocab, at), new) for at, (prompt, new) in enumerate(lengths)]
    shape = {"longest": LONGEST, "sequences": 128, "blocks": args.pool // 16}
    began = time.perf_counter()
    with opened(loaded, arm, **shape) as runtime:
        serve_under_load(runtime, requests[:8])
        say(args, {"arm": arm.name, "made_s": round(time.perf_counter() - began, 1)})

        def attempt(rate: float) -> Attempt:
            own = [
                ServeRequest(one.prompt, one.new_tokens, arrival_s=at / rate)
                for one, at in zip(requests, unit, strict=True)
            ]
            served = serve_under_load(runtime, own)
            found = attempt_of(rate, served.requests, slo)
            say(args, {"arm": arm.name} | asdict(found))
            if args.out:
                columns = [
                    list(one) for one in zip(*(asdict(step).values() for step in served.steps or []), strict=True)
                ]
                name = f"capacity-{arm.name.replace('/', '-').replace(':', '_')}-{rate:.3g}.json.gz"
                facts = {
                    "arm": arm.name,
                    "rate": rate,
                    "share": found.share,
                    "overlap": runtime.overlap,
                    "steps": columns,
                }
                with gzip.open(Path(args.out) / name, "wt") as file:
                    json.dump(facts, file)
            return found

        capacity = find_capacity(attempt, lowest, highest, tolerance=args.tolerance, most=args.most)
    say(args, {"arm": arm.name, "capacity_req_s": capacity.rate, "attempts": len(capacity.attempts)})


def simulated(args: argparse.Namespace, arm: Arm, fit: FittedStepTime, rate: float) -> Attempt:
    lengths, unit = lengths_of(args)
    limits = Limits(
        max_model_len=LONGEST, max_num_seqs=128, num_blocks=args.pool // 16, prefix_caching=False,
        max_num_batched_tokens=arm.chunk or 8192, prefill_first=arm.chunk is None,
    )  # fmt: skip
    arrivals = [Arrival(prompt, new, at / rate) for (prompt, new), at in zip(lengths, unit, strict=True)]
    found = simulate(arrivals, limits, fit, policy=arm.policy())
    times = [LoadTimes(one.arrival_s, one.admitted_s, one.token_s) for one in found.requests]
    return attempt_of(rate, times, Slo.parse(args.slo))


def simulate_all(args: argparse.Namespace) -> None:
    """Check the attempts, then every arm that one fit is for."""
    seen: dict[bool, list[list[StepServed]]] = {}
    attempts = []
    for path in args.simulate:
        with gzip.open(path, "rt") as file:
            facts = json.load(file)
        steps = [StepServed(*row) for row in zip(*facts["steps"], strict=True)]
        seen.setdefault(Arm.parse(facts["arm"]).chunk is not None, []).append(steps)
        attempts.append((Arm.parse(facts["arm"]), facts["rate"], facts["share"]))
    fits = {chunked: fitted(runs) for chunked, runs in seen.items()}
    for chunked, fit in fits.items():
        say(args, {"fit": "chunks" if chunked else "prompts first"} | asdict(fit))
    for arm, rate, share in attempts:
        found = simulated(args, arm, fits[arm.chunk is not None], rate)
        say(
            args,
            {
                "arm": arm.name,
                "rate": rate,
                "measured_share": share,
                "simulated_share": found.share,
                "simulated_drains": found.drains,
            },
        )
    for typed in args.arms.split(","):
        arm, lowest, highest = sought(typed)
        if arm.lanes == 2 or (arm.chunk is not None) not in fits:
            say(args, {"arm": arm.name, "skipped": "no steps of its kind were measured"})
            continue
        fit = fits[arm.chunk is not None]
        capacity = find_capacity(
            lambda rate, arm=arm, fit=fit: simulated(args, arm, fit, rate), lowest, highest, tolerance=0.02, most=12
        )  # fmt: skip
        say(args, {"arm": arm.name, "simulated_capacity_req_s": capacity.rate, "words": capacity.words})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dummy:Qwen3-8B")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--trace", required=True)
    parser.add_argument("--arms", default="prompts-first/5@11:16,prompts-first@3.4:5")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--pool", type=int, default=32768)
    parser.add_argument("--slo", default="1s:25ms")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--most", type=int, default=6)
    parser.add_argument("--simulate", nargs="+", metavar="FILE")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.simulate:
        simulate_all(args)
        return
    if args.tiny:
        args.model, args.requests, args.pool, args.slo = "dummy:tiny", 16, 1024, "1s:1s"
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    loaded = load_model(resolve_model(args.model), device=args.device, dtype=dtype)
    for typed in args.arms.split(","):
        try:
            measure(args, typed, loaded)
        except Exception as error:
            # the other arms are worth having
            say(args, {"arm": typed, "error": f"{type(error).__name__}: {error}"[:300]})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
