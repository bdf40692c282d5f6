#!/usr/bin/env python3
"""A stand-in for the Python interpreter that has vLLM: it answers as vLLM's worker did in a real run.

Given as ``--kv-vllm-python``. Answers are looked up by what is asked, in the file that ``VLLM_DOUBLE_RECORDING`` names. With
``VLLM_DOUBLE_REAL=/path/of/vllm/bin/python`` what is not there yet is asked of the real worker, and written down.
``VLLM_DOUBLE`` chooses a fault. ``VLLM_DOUBLE_CARDS=4`` makes it a vLLM for CUDA that parts the model between so many cards:
the answers of one device, with what `kvsuite.engines.vllm.worker` tells of every card.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

RECORDING = Path(os.environ.get("VLLM_DOUBLE_RECORDING", Path(__file__).parents[2] / "data" / "vllm" / "worker.jsonl"))
CARDS = int(os.environ.get("VLLM_DOUBLE_CARDS", "1"))
REAL, FAULT = os.environ.get("VLLM_DOUBLE_REAL"), os.environ.get("VLLM_DOUBLE", "")
MARK = "kvsuite-vllm:"


def known() -> dict[str, Any]:
    if not RECORDING.exists():
        return {}
    return {one["asked"]: one["answer"] for one in map(json.loads, RECORDING.read_text().splitlines())}


def write(asked: str, what: str, answer: Any) -> None:
    RECORDING.parent.mkdir(parents=True, exist_ok=True)
    with RECORDING.open("a") as stream:
        stream.write(json.dumps({"asked": asked, "what": what, "answer": answer}, separators=(",", ":")) + "\n")


def name_of(message: Any, engine: str, times: int) -> str:
    """What is asked, and of which engine; for the how manieth time matters where prefixes are cached."""
    text = json.dumps(message, sort_keys=True)
    again = f" {times}" if times > 1 and '"enable_prefix_caching": true' in engine else ""
    return hashlib.sha256(f"{engine} {text}{again}".encode()).hexdigest()[:16]


def probe(arguments: list[str]) -> None:
    answer = known().get("probe")
    if answer is None:
        assert REAL is not None
        printed = subprocess.run([REAL, *arguments], capture_output=True, text=True, check=True).stdout
        [line] = [line for line in printed.splitlines() if line.startswith(MARK)]
        answer = json.loads(line.removeprefix(MARK))
        write("probe", "probe", answer)
    if CARDS > 1:
        answer |= {"package": "vllm", "torch": "2.13.0"}
    if FAULT == "old":
        answer |= {"vllm": "0.11.2"}
    if FAULT == "none":
        answer |= {"vllm": None}
    print(f"\n{MARK}{json.dumps(answer)}")


class Lines:
    def __init__(self, channel: socket.socket) -> None:
        self._file = channel.makefile("rwb")

    def receive(self) -> Any:
        line = self._file.readline()
        return json.loads(line) if line else None

    def send(self, message: Any) -> None:
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()


class RealWorker:
    """The worker that is recorded."""

    def __init__(self, arguments: list[str]) -> None:
        ours, theirs = socket.socketpair()
        assert REAL is not None
        subprocess.Popen([REAL, *arguments[:-1], str(theirs.fileno())], pass_fds=(theirs.fileno(),))
        theirs.close()
        self.lines = Lines(ours)


def on_one(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings under which one device holds what the cards hold together."""
    assert settings["tensor_parallel_size"] == CARDS
    return settings | {"tensor_parallel_size": 1, "kv_cache_memory_bytes": settings["kv_cache_memory_bytes"] * CARDS}


def of_cards(do: str, answer: Any) -> Any:
    """The answer of one device as so many cards give it: parts of pool and weights, and allocators of their own."""

    def allocator(card: int, part: int) -> dict[str, int]:
        return {"allocated_bytes": 10_000, "peak_bytes": 11_000 + 1000 * part + card, "reserved_bytes": 20_000}

    if do == "start":
        [one] = answer["cards"]
        parts = {"pool_bytes": one["pool_bytes"] // CARDS, "weights_bytes": one["weights_bytes"] // CARDS}
        cards = [one | parts | {"name": "a card"} | allocator(card, 0) for card in range(CARDS)]
        return answer | {"cards": cards, "tensor_parallel_size": CARDS}
    if do == "memory":
        parts = ("before", "prefill", "decode")
        return answer | {part: [allocator(card, at) for card in range(CARDS)] for at, part in enumerate(parts)}
    return answer


def work(arguments: list[str]) -> None:
    lines = Lines(socket.socket(fileno=int(arguments[-1])))
    answers, engine, asked = known(), "", Counter[str]()
    real = RealWorker(arguments) if REAL is not None else None
    message: Any = None
    hello = real.lines.receive() if real is not None else answers["hello"]
    if "hello" not in answers:
        write("hello", "hello", hello)
    if FAULT == "silent":
        time.sleep(600)
    lines.send(hello)
    while (message := lines.receive()) is not None:
        settings = {name: value for name, value in message.get("settings", {}).items() if name != "model"}
        if settings and CARDS > 1:
            settings = on_one(settings)
        shown = message | ({"settings": settings} if settings else {})
        if message["do"] == "start":
            engine = json.dumps(settings, sort_keys=True)
        asked[json.dumps(shown)] += 1
        name = name_of(shown, engine, asked[json.dumps(shown)])
        if f"hang {message['do']}" == FAULT:
            time.sleep(600)
        if f"die {message['do']}" == FAULT:
            print("Fatal Python error: Segmentation fault", file=sys.stderr, flush=True)
            os.abort()
        if real is not None:
            real.lines._file.write(json.dumps(message).encode() + b"\n")
            real.lines._file.flush()
            answer = real.lines.receive()
            if name not in answers:
                answers[name] = answer
                write(name, message["do"], answer)
        elif name not in answers:
            raise SystemExit(f"nothing was recorded for {json.dumps(shown)[:2000]} of {engine}")
        answer = answers[name]
        if CARDS > 1:
            answer = of_cards(message["do"], answer)
        if FAULT == "format" and message["do"] == "start":
            answer["cards"][0]["kv_formats"] = ["auto"]
        lines.send(answer)


if __name__ == "__main__":
    (probe if "-c" in sys.argv else work)(sys.argv[1:])
