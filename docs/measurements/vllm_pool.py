"""The load of pipeline_pool.py through vLLM 0.26, in a process of its own: output tokens a second in the same pool.

    PYTHONPATH=SITE:. VLLM_ENABLE_V1_MULTIPROCESSING=0 python docs/measurements/vllm_pool.py --out OUT

vLLM's own scheduler: prompts in chunks beside decoding, steps of ``--step-tokens`` at most, prefix caching off, random weights.
The pool is given in bytes (``kv_cache_memory_bytes``), and what came of it in tokens is in the result. The engine runs in this
process, and every token is stamped when the step that brought it returns.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvsuite.models.presets import build_config

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def engine_of(args: argparse.Namespace, folder: str) -> Any:
    from vllm import LLM

    config = build_config(args.model)
    config.architectures = ["Qwen3ForCausalLM"]
    config.torch_dtype = "bfloat16"
    config.save_pretrained(folder)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return LLM(
        model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0, block_size=16,
        max_model_len=args.prompt + args.output, max_num_seqs=args.sequences, max_num_batched_tokens=args.step_tokens,
        kv_cache_memory_bytes=args.pool * token, enable_prefix_caching=False, gpu_memory_utilization=0.9,
    )  # fmt: skip


def served(engine: Any, prompts: list[list[int]], output: int, name: str) -> dict[str, list[float]]:
    """Times of every request's tokens from the start."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    times: dict[str, list[float]] = {f"{name}-{index}": [] for index in range(len(prompts))}
    started = time.perf_counter()
    for request, prompt in zip(times, prompts, strict=True):
        engine.add_request(request, {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        for found in engine.step():
            now = time.perf_counter() - started
            own = times[found.request_id]
            own.extend([now] * (len(found.outputs[0].token_ids) - len(own)))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-8B", help="a preset of dummy:")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=3584)
    parser.add_argument("--output", type=int, default=512)
    parser.add_argument("--pool", type=int, default=65536)
    parser.add_argument("--sequences", type=int, default=80)
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--out")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        llm = engine_of(args, folder)
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    made = time.perf_counter() - began
    drawn = np.random.default_rng(0)

    def prompts(count: int) -> list[list[int]]:
        found: list[list[int]] = drawn.integers(3, 150000, (count, args.prompt)).tolist()
        return found

    served(engine, prompts(3), 8, "warm")
    given = prompts(args.requests)
    started = time.perf_counter()
    times = served(engine, given, args.output, "timed")
    seconds = time.perf_counter() - started
    tokens = sum(map(len, times.values()))
    firsts = [own[0] for own in times.values()]
    each = [(own[-1] - own[0]) / (len(own) - 1) for own in times.values()]
    found = {
        "arm": "vllm", "requests": args.requests, "made_s": round(made, 1), "seconds": round(seconds, 2),
        "output_tok_s": round(tokens / seconds, 1), "output_tokens": tokens,
        "pool_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "ttft_ms": [round(1e3 * float(np.percentile(firsts, q)), 1) for q in (50, 90, 99)],
        "tpot_ms": [round(1e3 * float(np.percentile(each, q)), 2) for q in (50, 90, 99)],
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        with (Path(args.out) / "pipeline_pool.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
