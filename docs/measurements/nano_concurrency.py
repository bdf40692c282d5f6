"""What does compression buy where the pool is small, and what does it cost? Concurrency and divergence on the CPU.

    python docs/measurements/nano_concurrency.py                         # SmolLM2, some minutes of one core
    python docs/measurements/nano_concurrency.py --policies 'snapkv(window=16);knorm' --factors 2,5

Eight requests of 320 tokens of different parts of articles and their next 64, which are fed whatever the model would choose,
in a pool of 69 blocks (2.9 whole requests); prompts go first, and each is compressed once, at its end. Counts are exact.
Times are processor seconds of one thread. Divergence is that of the served rows from those of the run without a policy, in
nats a token (mean), top-1 the share of rows with the same most likely token, PPL the perplexity of the fed tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvsuite.compression import find_policy, get_policy
from kvsuite.compression.method_text import MethodText, parameter_types
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.workloads.corpus import load_corpus

REQUESTS, PROMPT, OUTPUT, BLOCKS = 8, 320, 64, 69


def texts(loaded: LoadedModel, requests: int) -> list[list[int]]:
    """Tokens of as many articles, or of as many parts of fewer."""
    length, found = PROMPT + OUTPUT, []
    for article in load_corpus("default", num_texts=3).texts:
        ids = loaded.tokenizer(article, verbose=False)["input_ids"]
        found += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    assert len(found) >= requests
    return found[:requests]


def served(loaded: LoadedModel, given: Sequence[list[int]], policy: Any) -> dict[str, Any]:
    limits = Limits(
        max_model_len=PROMPT + OUTPUT, max_num_seqs=len(given), max_num_batched_tokens=2048, num_blocks=BLOCKS,
        prefix_caching=False, prefill_first=True,
    )  # fmt: skip
    runtime = Runtime(loaded, limits, policy=policy, overlap=False, eos_token_ids=())
    rows: dict[Request, list[Tensor]] = {}

    def see(requests: Sequence[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits.float().log_softmax(dim=-1), strict=True):
            rows.setdefault(request, []).append(row)

    runtime.on_logits = see
    sampling = SamplingParameters(max_new_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    requests = [
        runtime.add(Request(ids[:PROMPT], sampling, forced=ids[PROMPT : PROMPT + OUTPUT])) for ids in given
    ]  # fmt: skip
    started = time.process_time()
    while runtime.unfinished:
        runtime.step()
    spent = time.process_time() - started
    counters = runtime.counters
    runtime.close()
    assert [request.reason for request in requests] == ["length"] * len(requests)
    # a preempted request's rows come once, whatever is computed again
    logs = torch.stack([torch.stack(rows[request][-OUTPUT:]) for request in requests])
    wanted = torch.tensor([ids[PROMPT : PROMPT + OUTPUT] for ids in given])
    return {
        "logs": logs, "steps": counters.steps, "preemptions": counters.preemptions,
        "prefill": counters.computed_prefill_tokens, "running": counters.computed_decode_tokens / counters.decode_steps,
        "tok_s": len(given) * OUTPUT / spent,
        "ppl": math.exp(-float(logs.gather(-1, wanted[..., None]).mean())),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    # of the 64 tokens that stay of 320 a window of 64 would leave nothing for attention to choose
    parser.add_argument("--policies", default="streaming_llm;snapkv(window=16);h2o;l2_compress;uniform_stride")
    parser.add_argument("--factors", default="5")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(resolve_model(options.model), device="cpu", dtype="float32")
    given = texts(loaded, options.requests)
    print(
        "| case | steps | preemptions | prompt tokens computed | rows a decode step | tok / CPU s | PPL | KL | top-1 |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    cases = [("dense", None)] + [
        (f"{method.typed}, factor {factor}", get_policy(method.name, factor=float(factor), **own))
        for factor in options.factors.split(",")
        for method in map(MethodText.parse, options.policies.split(";"))
        for own in method.variants(parameter_types(find_policy(method.name)))
    ]
    dense: Tensor | None = None
    for name, policy in cases:
        found = served(loaded, given, policy)
        logs = found["logs"]
        dense = logs if dense is None else dense
        divergence = float((dense.exp() * (dense - logs)).sum(dim=-1).mean())
        same = float((dense.argmax(dim=-1) == logs.argmax(dim=-1)).float().mean())
        print(
            f"| {name} | {found['steps']} | {found['preemptions']} | {found['prefill']:,} | {found['running']:.1f} | "
            f"{found['tok_s']:.1f} | {found['ppl']:.2f} | {divergence:.3f} | {same:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
