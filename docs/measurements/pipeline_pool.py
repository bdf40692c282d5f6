"""Output tokens a second of equal requests in a pool that holds few of them: prompts first, chunks, compressed prompts.

    python docs/measurements/pipeline_pool.py --out OUT                  # dummy:Qwen3-8B on a GPU, about 80 s an arm
    python docs/measurements/pipeline_pool.py --device cpu --tiny        # the same code on small shapes

Requests come all at once; a pool of ``--pool`` tokens, ``--requests`` unique prompts of ``--prompt`` tokens with ``--output``
further ones. Beside each arm stand the roofline of `kvsuite.nanovllm.roofline` (with the bandwidth and the prompt rate that
were measured here, and with those that the design began with), and what the scheduler gives in a simulation under the step
times of the same run. OUT/pipeline_pool.jsonl has a line an arm, OUT/steps-ARM.json.gz every step.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_arms import Arm, opened, random_prompt
from step_fit import fitted

from kvsuite.engines.nano.under_load import serve_under_load
from kvsuite.engines.results import Served, ServeRequest
from kvsuite.meters.bandwidth import copy_bandwidth
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.roofline import Roofline
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.simulation import Arrival, StepWork, simulate

#: an H200's, as the design assumed them
DESIGN = {"bandwidth": 3.5e12, "prompt_rate": 40500.0}


def percentiles(values: list[float]) -> list[float]:
    """p50, p90, p99 in ms."""
    return [round(1e3 * float(np.percentile(values, q)), 2) for q in (50, 90, 99)] if values else []


def requests_of(args: argparse.Namespace, vocab_size: int, first_seed: int) -> list[ServeRequest]:
    return [
        ServeRequest(random_prompt(args.prompt, vocab_size, first_seed + index), args.output)
        for index in range(args.requests)
    ]


def roofline(runtime: Runtime, args: argparse.Namespace, arm: Arm, bandwidth: float, prompt_rate: float) -> float:
    """Output tokens a second of the roofline model."""
    model = runtime.runner.model  # type: ignore[attr-defined]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # a step looks up one row of the embedding for each sequence
    weights -= model.get_input_embeddings().weight.nbytes
    policy = arm.policy()
    token = sum(group.token_bytes(runtime.pools[0].keys.element_size()) for group in runtime.groups)
    return Roofline(weights, token, bandwidth, prompt_rate).output_tokens_s(
        prompt=args.prompt,
        new_tokens=args.output,
        pool_tokens=args.pool,
        kept=None if policy is None else policy.size_after(args.prompt),
        max_num_seqs=args.sequences,
    )


def found_of(served: Served, seconds: float) -> dict[str, Any]:
    requests, steps = served.requests, served.steps
    assert steps is not None
    tokens = sum(len(request.token_s) for request in requests)
    spent = sum(step.end_s - step.start_s for step in steps)
    computed = sum(request.computed_prompt_tokens for request in requests)
    return {
        "output_tok_s": round(tokens / seconds, 1),
        "seconds": round(seconds, 2),
        "output_tokens": tokens,
        "computed_prompt_tokens": computed,
        "again": round(computed / sum(request.prompt_tokens for request in requests) - 1, 4),
        "preemptions": sum(request.preemptions for request in requests),
        "running": round(sum(step.running * (step.end_s - step.start_s) for step in steps) / spent, 2),
        "peak_blocks": max(step.used_blocks for step in steps),
        "steps": len(steps),
        "ttft_ms": percentiles([request.token_s[0] - request.arrival_s for request in requests]),
        "tpot_ms": percentiles(
            [(one.token_s[-1] - one.token_s[0]) / (len(one.token_s) - 1) for one in requests if len(one.token_s) > 1]
        ),
        "itl_ms": percentiles([gap for one in requests for gap in np.diff(one.token_s).tolist()]),
        "compress_ms": percentiles([one.compress_s for one in requests if one.compress_s is not None]),
        "waited_s": round(served.waited_s or 0.0, 2),
    }  # fmt: skip


def measured(loaded: LoadedModel, arm: Arm, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    began = time.perf_counter()
    vocab = int(loaded.text_config.vocab_size)
    shape = {"longest": args.prompt + args.output, "sequences": args.sequences, "blocks": args.pool // 16}
    with opened(loaded, arm, **shape) as runtime:
        # kernels are compiled, and both lengths of a step were seen
        serve_under_load(runtime, [ServeRequest(random_prompt(args.prompt, vocab, -1 - i), 8) for i in range(3)])
        made = time.perf_counter() - began
        requests = requests_of(args, vocab, args.seed)
        if loaded.device.type == "cuda":
            torch.cuda.synchronize(loaded.device)
        started = time.perf_counter()
        served = serve_under_load(runtime, requests)
        seconds = time.perf_counter() - started
        fit = fitted([served.steps or []])
        facts = {"arm": arm.name, "made_s": round(made, 1)} | found_of(served, seconds)
        design = roofline(runtime, args, arm, DESIGN["bandwidth"], DESIGN["prompt_rate"])
        own = roofline(runtime, args, arm, bandwidth, args.prompt / fit(StepWork("both", args.prompt, 0, 0)))
        facts |= {"roofline_design": round(design, 1), "roofline_here": round(own, 1)}
        if arm.lanes == 1:
            arrivals = [Arrival(args.prompt, args.output)] * args.requests
            facts["simulated"] = round(simulate(arrivals, runtime.limits, fit, policy=arm.policy()).output_tokens_s, 1)
        facts |= {
            "fit": {name: asdict(part) for name, part in (("prompts", fit.prompts), ("decodes", fit.decodes))},
        }
        if args.out:
            columns = [
                list(column) for column in zip(*(asdict(step).values() for step in served.steps or []), strict=True)
            ]
            name = arm.name.replace("/", "-").replace(":", "_")
            with gzip.open(Path(args.out) / f"steps-{name}.json.gz", "wt") as file:
                json.dump(columns, file)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dummy:Qwen3-8B")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--arms", default="prompts-first/5,prompts-first,prompts-first/5/snapkv,chunk512")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=3584)
    parser.add_argument("--output", type=int, default=512)
    parser.add_argument("--pool", type=int, default=65536)
    parser.add_argument("--sequences", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.requests, args.prompt, args.output, args.pool = "dummy:tiny", 8, 112, 16, 512
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    loaded = load_model(resolve_model(args.model), device=args.device, dtype=dtype)
    bandwidth = copy_bandwidth(loaded.device, size_bytes=1 << 24 if args.tiny else None)
    for typed in args.arms.split(","):
        try:
            found = measured(loaded, Arm.parse(typed), args, bandwidth) | {"bandwidth_tb_s": round(bandwidth / 1e12, 3)}
        except Exception as error:
            # the other arms are worth having
            found = {"arm": typed, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found), flush=True)
        if args.out:
            with (Path(args.out) / "pipeline_pool.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
