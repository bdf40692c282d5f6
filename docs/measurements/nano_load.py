"""Requests of mixed length, served here and by transformers' continuous batching: parts of nano_serving.py."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from statistics import median
from typing import Any

from nano_session import BLOCK, Session, Shapes, release, serving

from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters


def workload(shapes: Shapes, vocabulary: int, seed: int, temperature: float = 0.0) -> list[Request]:
    """Lengths are the same for every seed."""
    lengths, content = random.Random(0), random.Random(seed)
    found = []
    for index in range(shapes.requests):
        prompt = [content.randrange(vocabulary) for _ in range(lengths.randint(shapes.shortest, shapes.longest))]
        chosen = SamplingParameters(
            max_new_tokens=lengths.randint(shapes.shortest, shapes.longest),
            temperature=temperature,
            seed=index,
            ignore_eos=True,
        )
        found.append(Request(prompt, chosen))
    return found


def serve(session: Session, runtime: Runtime, requests: list[Request], part: str, **about: Any) -> float:
    """Serve, report, and return output tokens a second."""
    before, waited = runtime.counters.to_dict(), runtime.waited_s
    session.synchronize()
    started = time.perf_counter()
    runtime.run(requests)
    session.synchronize()
    seconds = time.perf_counter() - started
    wrong = [request for request in requests if request.status is not Status.FINISHED]
    if wrong:
        raise RuntimeError(f"{len(wrong)} requests were not served, the first {wrong[0].status}: {wrong[0].reason}")
    done = {name: value - before[name] for name, value in runtime.counters.to_dict().items()}
    tokens = sum(request.output_length for request in requests)
    waited = runtime.waited_s - waited
    session.say(
        part, **about, output_tok_s=tokens / seconds, seconds=seconds, output_tokens=tokens, steps=done["steps"],
        decode_steps=done["decode_steps"], preemptions=done["preemptions"],
        host_ms_a_step=1e3 * (seconds - waited) / done["steps"], waited_s=waited,
        first_token_s=median(request.times[0] - started for request in requests),
    )  # fmt: skip
    return tokens / seconds


def mixed_limits(shapes: Shapes) -> dict[str, Any]:
    longest = 2 * shapes.longest
    return {
        "max_model_len": longest, "max_num_seqs": shapes.requests,
        "max_num_batched_tokens": max(shapes.budget, shapes.requests),
        "num_blocks": shapes.requests * -(-longest // BLOCK),
    }  # fmt: skip


def mixed(session: Session) -> None:
    shapes = session.shapes
    vocabulary = session.model(shapes.small).text_config.vocab_size
    with serving(session, shapes.small, **mixed_limits(shapes)) as runtime:
        serve(session, runtime, workload(shapes, vocabulary, 1), "mixed", round="first")
        serve(session, runtime, workload(shapes, vocabulary, 2), "mixed", round="warm")
        serve(session, runtime, workload(shapes, vocabulary, 5, 0.6), "mixed", round="warm, temperature 0.6, its first")
        serve(session, runtime, workload(shapes, vocabulary, 6, 0.6), "mixed", round="warm, temperature 0.6")
        serve(session, runtime, workload(shapes, vocabulary, 3), "mixed", round="warm again")
        runtime.overlap = False
        serve(session, runtime, workload(shapes, vocabulary, 4), "mixed", round="warm, no overlap")
    # its pool goes before the next one comes
    del runtime
    release()
    with serving(session, shapes.small, prefill_first=True, **mixed_limits(shapes)) as runtime:
        serve(session, runtime, workload(shapes, vocabulary, 6), "mixed", round="prefill first, warm")


def mixed_drawn(session: Session) -> None:
    """The first round of a process with everything compiled at the start, at temperature 0.6, and a second one."""
    shapes = session.shapes
    vocabulary = session.model(shapes.small).text_config.vocab_size
    with serving(session, shapes.small, warm_up=True, **mixed_limits(shapes)) as runtime:
        serve(session, runtime, workload(shapes, vocabulary, 7, 0.6), "mixed", round="first, temperature 0.6, warm_up")
        serve(session, runtime, workload(shapes, vocabulary, 8, 0.6), "mixed", round="second, temperature 0.6, warm_up")
        serve(session, runtime, workload(shapes, vocabulary, 9), "mixed", round="greedy after it, warm_up")


def batching(session: Session) -> None:
    """The first requests of the mixed load with a quarter of their output, here and by transformers' manager."""
    shapes = session.shapes
    loaded = session.model(shapes.small)

    def requests(seed: int) -> list[Request]:
        return [
            Request(list(r.prompt), replace(r.sampling, max_new_tokens=-(-r.sampling.max_new_tokens // 4)))
            for r in workload(shapes, loaded.text_config.vocab_size, seed)[: shapes.shared]
        ]

    with serving(session, shapes.small, **mixed_limits(shapes)) as runtime:
        serve(session, runtime, requests(1), "batching", by="nano", round="first")
        ours = serve(session, runtime, requests(2), "batching", by="nano", round="warm")
    del runtime
    release()
    theirs = continuous_batching(session, loaded, [requests(3), requests(4)])
    session.say("batching", by="ratio", nano_over_transformers=ours / theirs)


def continuous_batching(session: Session, loaded: LoadedModel, rounds: list[list[Request]]) -> float:
    """Output tokens a second of transformers' own manager; of what it did within 30 s if a round takes longer."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = loaded.model
    attention = model.config._attn_implementation
    # flash attention would be fetched from the hub; what is in torch is there
    model.set_attn_implementation("paged|sdpa")
    most = max(request.sampling.max_new_tokens for request in rounds[0])
    # room for all requests at once, and no more: its attention works on the whole of it
    blocks = sum(-(-(r.prompt_length + r.sampling.max_new_tokens) // 256) for r in rounds[0]) + 16
    sizes = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=min(4096, 16 * session.shapes.longest))
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=most)
    speed = 0.0
    try:
        began = time.perf_counter()
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=sizes, block=True, timeout=5
        ) as manager:
            for turn, requests in enumerate(rounds):
                session.synchronize()
                started = time.perf_counter()
                for r in requests:
                    manager.add_request(list(r.prompt), max_new_tokens=r.sampling.max_new_tokens, eos_token_id=-1)
                done: dict[str, Any] = {}
                while len(done) < len(requests) and manager.is_running() and time.perf_counter() - started < 30:
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        done[result.request_id] = result
                seconds = time.perf_counter() - started
                failed = [str(result.error)[:200] for result in done.values() if result.error]
                tokens = sum(len(result.generated_tokens) for result in done.values())
                speed = tokens / seconds
                session.say(
                    "batching", by="transformers", round=("first", "warm")[turn], output_tok_s=speed, seconds=seconds,
                    output_tokens=tokens, finished=len(done), of=len(requests), failed=len(failed), error=failed[:1],
                    start_s=started - began, attention="paged|sdpa",
                )  # fmt: skip
                if len(done) < len(requests):
                    break
    finally:
        model.set_attn_implementation(attention)
        release()
    return speed
