"""Decode steps beside prompts on a CUDA device: one lane with chunks, two streams, two streams with SMs of their own.

``python docs/measurements/nano_lanes.py [--model dummy:Qwen3-8B] [--seconds 4] [--arms chunk256,streams,32:96,64:64]``

``--rows`` requests decode at a context of ``--context`` tokens, without end, while prompts of ``--prompt`` tokens arrive one
behind the other, each for one token. For every arm: the time between two decode steps (p50, p99 of what a user of a decoding
request sees), the time of a prompt from its arrival to its token, and prompts a second. About ten seconds an arm and half a
minute for the model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kvsuite.models.load import load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.cuda_runner import cuda_runner
from kvsuite.nanovllm.green_contexts import open_partition
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.sm_split import PartitionRequest


@contextmanager
def _parted(arm: str, device: torch.device) -> Iterator[Any]:
    if ":" not in arm:
        yield None
        return
    decode, prompt = (int(part) for part in arm.split(":"))
    partition = open_partition(PartitionRequest(decode, prompt), device)
    try:
        yield partition
    finally:
        partition.close()


def _measured(loaded: Any, arm: str, args: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(loaded.text_config.vocab_size)
    longest = max(args.context + 4096, args.prompt + 1)
    blocks = (args.rows * longest + 3 * args.prompt) // 16 + args.rows

    def prompt(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    chunked = arm.startswith("chunk")
    limits = Limits(
        max_model_len=longest,
        max_num_seqs=args.rows + 2,
        max_num_batched_tokens=args.rows + int(arm.removeprefix("chunk")) if chunked else 8192,
        num_blocks=blocks,
        prefix_caching=False,
        admission="optimistic",
    )
    with _parted(arm, loaded.device) as partition:
        lanes: dict[str, Any] = (
            {} if chunked else {"lanes": 2, "partition": partition, "prompt_layers": args.layers or None}
        )
        runtime = Runtime(loaded, limits, runner=cuda_runner(sizes=[args.rows], tune=False), eos_token_ids=(), **lanes)
        endless = SamplingParameters(max_new_tokens=4000, ignore_eos=True)
        rows = [runtime.add(Request(prompt(args.context), endless)) for _ in range(args.rows)]
        while not all(row.output_length > 2 for row in rows):
            runtime.step()
        alone = rows[0].output_length
        for _ in range(40):
            runtime.step()
        quiet = np.diff(rows[0].times[alone:])
        begin = len(rows[0].times)
        firsts: list[float] = []
        started = added = time.perf_counter()
        one = SamplingParameters(max_new_tokens=1, ignore_eos=True)
        waiting = runtime.add(Request(prompt(args.prompt), one))
        while time.perf_counter() - started < args.seconds and not rows[0].status.over:
            runtime.step()
            if waiting.status.over:
                firsts.append(waiting.times[0] - added)
                added = time.perf_counter()
                waiting = runtime.add(Request(prompt(args.prompt), one))
        gaps = np.diff(rows[0].times[begin:])
        found = {
            "arm": arm,
            "alone_ms": round(1e3 * float(np.median(quiet)), 2),
            "gap_p50_ms": round(1e3 * float(np.percentile(gaps, 50)), 2),
            "gap_p99_ms": round(1e3 * float(np.percentile(gaps, 99)), 2),
            "gaps": len(gaps),
            "prompt_p50_ms": round(1e3 * float(np.median(firsts)), 1) if firsts else None,
            "prompts": len(firsts),
            "partition": partition.to_dict() if partition is not None else None,
        }
        runtime.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dummy:Qwen3-8B")
    parser.add_argument("--arms", default="chunk256,streams,32:96,64:64")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument(
        "--layers",
        type=int,
        default=4,
        help="of a prompt between two looks at the decoding; 0: on a thread that runs free",
    )
    args = parser.parse_args()
    loaded = load_model(resolve_model(args.model), device="cuda:0", dtype="bfloat16")
    for arm in args.arms.split(","):
        try:
            print(json.dumps(_measured(loaded, arm, args)), flush=True)
        except Exception as error:
            # the other arms are worth having
            print(json.dumps({"arm": arm, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
