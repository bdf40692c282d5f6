"""Does stamping every token change what is measured? TPOT with the meters on and off, interleaved in one process.

    python docs/measurements/meter_overhead.py [model] [device] [prompt tokens] [new tokens] [rounds a side]

Off: only the request's start, the first token and the last one are stamped, which is the least that gives a TPOT.
On: what every benchmark run does, a stamp after the prefill and after every token.
"""

from __future__ import annotations

import sys
from statistics import median

from kvsuite.engines.registry import SessionPool
from kvsuite.engines.results import ServeRequest
from kvsuite.meters.clock import Clock, clock_for
from kvsuite.options.resolve import default_options
from kvsuite.suites.compression.cases import compression_cases


class Sparse(Clock):
    """Passes on the marks that a TPOT needs and drops the others."""

    def __init__(self, inner: Clock, new_tokens: int) -> None:
        self._inner, self._last, self._seen = inner, new_tokens + 1, 0

    def start(self) -> None:
        self._seen = 0
        self._inner.start()

    def mark(self) -> None:
        self._seen += 1
        # prefill end, first token, ..., last token
        if self._seen in (1, 2, self._last):
            self._inner.mark()

    def seconds(self) -> list[float]:
        prefill, first, last = self._inner.seconds()
        return [prefill, first, *([last] * (self._last - 2))]


def main(
    model: str = "smollm2", device: str = "auto", prompt: str = "192", new: str = "64", rounds: str = "15"
) -> None:
    options = default_options(model=model, device=device, prompt_tokens=prompt, max_new_tokens=new)
    case = compression_cases(options)[0]
    session = SessionPool(seed=0, threads=None).get(case)
    session.prepare(case)
    tokens = [(7 * i + 3) % session.vocab_size for i in range(int(prompt))]
    session.serve([ServeRequest(tokens, int(new))])
    session.capture([ServeRequest(tokens, int(new))])
    dense = clock_for(session.device)
    clocks = {"on": dense, "off": Sparse(clock_for(session.device), int(new))}
    samples: dict[str, list[float]] = {"on": [], "off": []}
    for index in range(int(rounds) + 1):
        for arm in ("on", "off") if index % 2 else ("off", "on"):
            tpot = session.serve([ServeRequest(tokens, int(new))], clocks[arm]).times[0].tpot_s
            if index and tpot is not None:
                samples[arm].append(tpot)
    on, off = median(samples["on"]), median(samples["off"])
    ratios = sorted(a / b - 1 for a, b in zip(samples["on"], samples["off"], strict=True))
    steps = session.effective["decode_step"]
    print(f"{model} on {session.device}, {steps} steps, prompt {prompt}, {new} tokens, {rounds} pairs")
    print(f"TPOT on {on * 1e3:.4f} ms, off {off * 1e3:.4f} ms, ratio of medians {on / off - 1:+.3%}")
    low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
    print(f"paired difference: median {median(ratios):+.3%}, quartiles {low:+.3%} {high:+.3%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
