"""Decode steps of vLLM by a plain loop over its own `step()`: what engine `vllm` is compared with (docs/vllm.md).

PYTHONPATH=. /path/of/vllm/bin/python docs/measurements/vllm_steps.py --points 64x3968,1x3968 --kv-cache-dtype auto
PYTHONPATH=. /path/of/vllm/bin/python docs/measurements/vllm_steps.py --points mixed --preset Qwen3-0.6B

Run by the interpreter that has vLLM; of kvsuite it takes the shapes of the preset, and for ``mixed`` the requests of
nano_load.py. Every point is a process of its own, the median is that of steps in which every request got a token.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from statistics import median

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
CONTEXT = 4096


def measure(batch: int, prompt: int, new: int, folder: str, stored: str, chunk: int) -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype=stored,
        max_model_len=CONTEXT, max_num_seqs=batch, max_num_batched_tokens=max(chunk, batch), enable_prefix_caching=False,
        gpu_memory_utilization=0.9,
    ).llm_engine  # fmt: skip
    params = SamplingParams(
        temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    steps = []
    for round_ in range(2):
        for index in range(batch):
            ids = [(7 * at + 13 * index + 101 * round_) % 150_000 for at in range(prompt)]
            engine.add_request(f"{round_}-{index}", {"prompt_token_ids": ids}, params)
        steps, before = [], time.perf_counter()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            if len(outputs) == batch:
                steps.append(now - before)
            before = now
    # the first one may have waited for a prompt
    own = steps[1:]
    print(
        f"plain loop {batch} x {prompt} {stored}: {median(own) * 1e3:.3f} ms, {len(own)} steps of {batch}", flush=True
    )


def measure_mixed(folder: str, stored: str, chunk: int) -> None:
    from nano_load import workload
    from nano_session import Shapes
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    shapes = Shapes()
    engine = LLM(
        model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype=stored,
        max_model_len=2 * shapes.longest, max_num_seqs=shapes.requests, max_num_batched_tokens=chunk,
        enable_prefix_caching=False, gpu_memory_utilization=0.9,
    ).llm_engine  # fmt: skip
    for number, temperature in enumerate((0.0, 0.0, 0.6, 0.6, 0.0)):
        requests = workload(shapes, 150_000, number, temperature)
        began = time.perf_counter()
        for index, request in enumerate(requests):
            params = SamplingParams(
                temperature=temperature, max_tokens=request.sampling.max_new_tokens, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            engine.add_request(f"{number}-{index}", {"prompt_token_ids": list(request.prompt)}, params)
        tokens = 0
        while engine.has_unfinished_requests():
            tokens += sum(len(found.outputs[0].token_ids) for found in engine.step())
        seconds = time.perf_counter() - began
        print(
            f"mixed, round {number}, temperature {temperature}: {tokens / seconds:.0f} tokens/s, {tokens}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", default="64x3968,1x3968")
    parser.add_argument("--new", type=int, default=120)
    parser.add_argument("--chunk", type=int, default=16384)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--preset", default="Qwen3-8B")
    asked = parser.parse_args()
    from kvsuite.engines.vllm.model_folder import model_folder
    from kvsuite.models.resolve import resolve_model

    folder = model_folder(resolve_model(f"dummy:{asked.preset}"), None)
    import vllm  # noqa: F401

    fork = multiprocessing.get_context("fork")
    for point in asked.points.split(","):
        given: tuple[object, ...] = (folder, asked.kv_cache_dtype, asked.chunk)
        if point == "mixed":
            process = fork.Process(target=measure_mixed, args=given)
        else:
            batch, prompt = map(int, point.split("x"))
            process = fork.Process(target=measure, args=(batch, prompt, asked.new, *given))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
