"""TTFT and TPOT of one request over HTTP against the same engine in this process: medians of rounds in turns.

usage: python docs/measurements/server_overhead.py --rounds 15 --threads 1
       python docs/measurements/server_overhead.py --engine vllm --vllm-python PYTHON --dtype bfloat16 \\
           --url http://localhost:8000 --served-as smollm2

What a server says of its own times in the same requests stands beside: the difference is what HTTP and the client add, without
the scatter of two engines on one machine. Without --url llama.cpp's own server is started, from the wheel xllamacpp, with as
many threads as the engine in process has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, quantiles

from kvsuite.case import Case
from kvsuite.engines.engine import Session
from kvsuite.engines.registry import SessionPool
from kvsuite.engines.results import ServeRequest
from kvsuite.meters.clock import clock_for
from kvsuite.meters.timing import RoundTimes
from kvsuite.models.smollm2 import find_gguf
from kvsuite.options.resolve import default_options
from kvsuite.workloads.texts import TextSource

SERVER = """
import sys, xllamacpp
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.n_parallel = sys.argv[1], int(sys.argv[2]), 1
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = int(sys.argv[3])
given.port, given.endpoint_metrics = 0, True
server = xllamacpp.Server(given)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="llamacpp")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--url")
    parser.add_argument("--served-as", default="")
    parser.add_argument("--vllm-python", default="")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    with at(asked) as url:
        measure(asked, url)


def measure(asked: argparse.Namespace, url: str) -> None:
    sessions, clocks = {}, {}
    for engine in (asked.engine, "server"):
        served = {"server_url": url, "server_model": asked.served_as}
        own = served if engine == "server" else {"vllm_python": asked.vllm_python}
        options = default_options(threads=str(asked.threads), **{name: text for name, text in own.items() if text})
        case = Case(
            suite="parity", engine=engine, model=asked.model, name="overhead", device="cpu", dtype=asked.dtype,
            workload={
                "protocol": "prefix-continuation", "prompt_tokens": asked.prompt_tokens, "max_tokens": 2,
                "max_new_tokens": asked.new_tokens, "batch": 1, "corpus": "default", "num_samples": 1,
            },
        )  # fmt: skip
        session = sessions[engine] = SessionPool(options).beside(case)
        session.prepare(case)
        clocks[engine] = session.clock(clock_for(session.device))
    prompts = TextSource().prompts(sessions["server"], case.workload, count=asked.rounds + 2, seed=0)
    found: dict[str, list[tuple[float, float]]] = {engine: [] for engine in sessions}
    added: list[tuple[float, float]] = []
    for number, prompt in enumerate(prompts):
        # in turns, each first in every second round
        for engine in list(sessions)[:: 1 if number % 2 else -1]:
            times, said = one(sessions[engine], clocks[engine], ServeRequest(prompt, asked.new_tokens))
            if number >= 2:
                found[engine].append(times)
                if said is not None:
                    added.append((times[0] - said[0], times[1] - said[1]))
    print(
        f"{asked.model}, {asked.prompt_tokens} + {asked.new_tokens} tokens, {asked.threads} thread(s), "
        f"{asked.rounds} rounds in turns"
    )
    for place, name in enumerate(("TTFT", "TPOT")):
        for engine, rows in found.items():
            values = [1e3 * row[place] for row in rows]
            low, _, high = quantiles(values, n=4)
            print(f"{name} {engine}: median {median(values):.3f} ms, middle half {low:.3f} to {high:.3f}")
        ratios = [
            over[place] / inside[place] for over, inside in zip(found["server"], found[asked.engine], strict=True)
        ]
        print(f"{name}: over HTTP / in process, median of the rounds' ratios {median(ratios):.4f}")
        if added:
            more = [1e3 * row[place] for row in added]
            low, _, high = quantiles(more, n=4)
            print(
                f"{name}: the client's less the server's own of the same request: median {median(more):.3f} ms, "
                f"middle half {low:.3f} to {high:.3f}"
            )
    for session in sessions.values():
        session.close()


def one(
    session: Session, clock: object, request: ServeRequest
) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """TTFT and TPOT of a request, seconds, and what a server says of its own."""
    served = session.serve([request], clock)  # type: ignore[arg-type]
    row = RoundTimes(served.times, "any").metrics()
    assert row["ttft_s"] is not None
    assert row["tpot_s"] is not None
    said = served.engine.times if served.engine is not None else {}
    own = None
    if "timings.prompt_ms" in said:
        own = said["timings.prompt_ms"] / 1e3, said["timings.predicted_per_token_ms"] / 1e3
    elif "engine_ttft_s" in said and "engine_tpot_s" in said:
        own = said["engine_ttft_s"], said["engine_tpot_s"]
    return (row["ttft_s"], row["tpot_s"]), own


@contextmanager
def at(asked: argparse.Namespace) -> Iterator[str]:
    """The server's address."""
    if asked.url:
        yield asked.url
        return
    room = asked.prompt_tokens + asked.new_tokens + 64
    command = [sys.executable, "-c", SERVER, str(find_gguf()), str(room), str(asked.threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            lines = iter(process.stdout.readline, "")
            yield next(line.split()[1] for line in lines if line.startswith("at "))
        finally:
            process.kill()


if __name__ == "__main__":
    main()
