"""Decode steps beside prompts on a CUDA device: one lane with chunks, two streams, two streams with SMs of their own.

    python docs/measurements/nano_lanes.py                               # dummy:Qwen3-8B, 52 s an arm
    python docs/measurements/nano_lanes.py --device cpu --tiny           # the same code on small shapes

``--rows`` requests decode without end, held at a context of ``--context`` tokens, while prompts of ``--prompt`` tokens arrive
in a Poisson process (the same one for every arm), each for one token. For every arm: the time to a prompt's token from its
scheduled arrival, and the gaps between tokens of the decoding requests, pooled, from the first arrival to the last token.
Contexts are cut back by hand between two prompts, and the gap in which that is done is left out. With ``/5`` behind an arm
(`serving_arms`) all prompts are compressed, those of the decoding requests too, which then are held at what is left of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_arms import Arm, opened, random_prompt

from kvsuite.models.load import load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.workloads.arrivals import poisson_arrivals

#: decode steps after which contexts are cut back to where they were
_HOLD = 256
_ENDLESS = 30000


def _cut(runtime: Runtime, rows: list[Request], held: int) -> None:
    """Let the decoding requests hold what they held at first."""
    for row in rows:
        runtime.compress(row, torch.arange(held))
        # nobody is preempted here, and what was done is not replayed
        row.compressions.clear()


def _summary(values: np.ndarray) -> dict[str, float]:
    return {f"p{q}": round(1e3 * float(np.percentile(values, q)), 2) for q in (50, 90, 99)}


def _measured(loaded: Any, arm: Arm, args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    vocab = int(loaded.text_config.vocab_size)
    endless = SamplingParameters(max_new_tokens=args.context + _ENDLESS, ignore_eos=True)
    one = SamplingParameters(max_new_tokens=1, ignore_eos=True)
    policy = arm.policy()
    held = args.context if policy is None else policy.size_after(args.context)
    prompts_at_once = 12
    # a context grows while it is not cut, and those of the decoding requests are not compressed at once
    blocks = (args.rows * (args.context + 4096) + prompts_at_once * args.prompt) // 16 + args.rows
    with opened(
        loaded, arm, longest=max(args.context + _ENDLESS, args.prompt + 1), sequences=args.rows + prompts_at_once,
        blocks=blocks, sizes=[args.rows], prompt_layers=args.layers or None, admission="optimistic",
    ) as runtime:  # fmt: skip
        rows = [runtime.add(Request(random_prompt(args.context, vocab, -1 - i), endless)) for i in range(args.rows)]
        runtime.add(Request(random_prompt(args.prompt, vocab, -1000), one))
        while runtime.unfinished > args.rows or not all(row.output_length > 2 for row in rows):
            runtime.step()
        _cut(runtime, rows, held)
        first = rows[0].output_length
        for _ in range(60):
            runtime.step()
        alone = np.diff(rows[0].times[first + 2 :])
        arrivals = poisson_arrivals(args.prompts, rate=args.rate, seed=args.seed)
        # made before, so that the loop has nothing else to do
        prompts = [Request(random_prompt(args.prompt, vocab, args.seed + i), one) for i in range(args.prompts)]
        begin, cuts, added, most = len(rows[0].times), set[int](), 0, 0
        origin = time.perf_counter()
        while added < len(prompts) or runtime.unfinished > len(rows):
            while added < len(prompts) and arrivals[added] <= time.perf_counter() - origin:
                runtime.add(prompts[added])
                added += 1
            stored = int(runtime.tables[0].lengths[rows[0].row])
            most = max(most, stored)
            if stored >= held + _HOLD and runtime.unfinished == len(rows):
                _cut(runtime, rows, held)
                cuts.add(len(rows[0].times) - begin)
            runtime.step()
        seconds = time.perf_counter() - origin
        wrong = [request.reason for request in prompts if len(request.times) != 1]
        if wrong or any(row.status.over for row in rows) or runtime.counters.preemptions:
            raise RuntimeError(f"not served as asked: {wrong[:1]}, {rows[0].reason}, {runtime.counters.preemptions}")
        firsts = np.array([request.times[0] - origin for request in prompts]) - arrivals
        # all rows get a token a step; some had their first one earlier
        tokens = len(rows[0].times) - begin
        gaps = [
            row.times[index - tokens] - row.times[index - tokens - 1]
            for row in rows
            for index in range(1, tokens)
            if index not in cuts
        ]
        facts: dict[str, Any] = {
            "arm": arm.name, "made_s": round(origin - began, 1), "seconds": round(seconds, 1), "held": held,
            "longest_held": most, "prompts": len(prompts), "ttft_ms": _summary(firsts), "gaps": len(gaps),
            "itl_ms": _summary(np.array(gaps)), "alone_ms": round(1e3 * float(np.median(alone)), 2),
            "decode_tok_s": round(len(gaps) / seconds, 1),
        }  # fmt: skip
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dummy:Qwen3-8B")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--arms",
        default="chunk256/5,32:96/5,64:64/5,streams/5,chunk512/5,chunk256,64:64,32:96,streams,chunk512",
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2.0, help="prompts a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--layers",
        type=int,
        default=4,
        help="of a prompt between two looks at the decoding; 0: on a thread that runs free",
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", help="folder for nano_lanes.jsonl")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.rows, args.context, args.prompt, args.prompts, args.rate = "dummy:tiny", 3, 40, 90, 12, 4.0
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    loaded = load_model(resolve_model(args.model), device=args.device, dtype=dtype)
    for typed in args.arms.split(","):
        try:
            found = _measured(loaded, Arm.parse(typed), args)
        except Exception as error:
            # the other arms are worth having
            found = {"arm": typed, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found), flush=True)
        if args.out:
            with (Path(args.out) / "nano_lanes.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
