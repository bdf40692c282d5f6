"""A server that speaks OpenAI's protocol over real HTTP: what it sends and when is known, and every fault can be asked for.

It cannot show what a real server answers; test_llamacpp_server.py asks one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-double-0123456789"
FIRST_S, GAP_S = 0.03, 0.01
#: a stream of so many tokens is the engine's question what the server takes
PROBE_TOKENS = 2
#: fields of an event with values that no protocol has
ODD: dict[str, tuple[str, Any]] = {
    "ids of words": ("token_ids", ["a", "b"]),
    "ids without end": ("token_ids", [float("inf")]),
    "no list of ids": ("token_ids", 7),
    "models": ("model", ["tiny"]),
    "usage": ("usage", "none"),
    "timings": ("timings", 3),
}
#: losses of a text of token ids, with whether each token was the most likely one: for every token but the first
Losses = Callable[[list[int]], list[tuple[float, bool]]]


@dataclass
class Double:
    """How the server behaves; a test changes it while it runs.

    Parameters
    ----------
    model
        Its name on the list of models, and in answers.
    takes_ids, extends, tells_ids
        Whether it takes token ids as a prompt, and fields that are no part of the protocol; whether it sends token ids.
    scores
        ``prompt_logprobs``, ``echo`` or nothing.
    fault
        What goes wrong with the first stream of more tokens than the probe's: ``die``, ``hang``, ``ping`` (comments alone),
        ``half``, ``cut`` (no end), ``500``, ``400``, ``error`` (an event), ``endless``, ``key`` (a 500 that repeats the key),
        ``model`` (an answer for another one), or a key of `ODD`.
    merged
        Tokens of an event.
    needs_key
        Whether it answers nobody without `KEY`.
    cached
        Tokens of each prompt that it says it found in its cache.
    told_prompt
        Tokens of each prompt that it says it took; ``None`` for those that it did.
    page
        Text that it answers with, in place of its list of models, before the key that it was sent.
    bodies, most_together
        What it was sent, and how many streams it sent at the same time.
    """

    losses: Losses
    encode: Callable[[str], list[int]]
    model: str = "tiny"
    takes_ids: bool = True
    extends: bool = True
    tells_ids: bool = True
    scores: str | None = None
    fault: str | None = None
    merged: int = 1
    needs_key: bool = False
    cached: int | None = 0
    told_prompt: int | None = None
    page: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    together: int = 0
    most_together: int = 0
    counted: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def served(self) -> list[dict[str, Any]]:
        """Bodies of streamed completions but for the probe's."""
        return [body for body in self.bodies if body.get("stream") and body["max_tokens"] != PROBE_TOKENS]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: Double
    gone = False

    def log_message(self, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        double = self.double
        if self._is_locked():
            return
        if self.path == "/v1/models" and double.page is not None:
            self._send(200, f"{double.page}{self.headers.get('Authorization')}".encode(), "text/html")
        elif self.path == "/v1/models":
            self._json({"data": [{"id": double.model, "object": "model", "owned_by": "double"}]})
        elif self.path == "/version":
            self._json({"version": "1.2"})
        elif self.path == "/metrics":
            self._send(200, _metrics(double).encode(), "text/plain")
        else:
            self._json({"error": {"message": "File Not Found"}}, 404)

    def do_POST(self) -> None:
        double = self.double
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_locked():
            return
        if self.path != "/v1/completions":
            self._json({"error": {"message": "File Not Found"}}, 404)
            return
        with double.lock:
            double.bodies.append(body)
            fault = None
            if body.get("stream") and body["max_tokens"] != PROBE_TOKENS:
                fault, double.fault = double.fault, None
        refusal = None
        if isinstance(body["prompt"], list) and not double.takes_ids:
            refusal = "prompt must be a string"
        elif "ignore_eos" in body and not double.extends:
            refusal = "unknown field ignore_eos"
        if refusal is not None:
            self._json({"error": {"message": refusal}}, 400)
        elif body.get("stream"):
            self._stream(body, fault)
        else:
            self._score(body)

    def _is_locked(self) -> bool:
        if self.double.needs_key and self.headers.get("Authorization") != f"Bearer {KEY}":
            self._json({"error": {"message": "no such key"}}, 401)
            return True
        return False

    def _stream(self, body: dict[str, Any], fault: str | None) -> None:
        double = self.double
        if fault in ("500", "400", "key"):
            said = f"broken for {self.headers.get('Authorization')}" if fault == "key" else "broken"
            self._json({"error": {"message": said}}, 400 if fault == "400" else 500)
            return
        if fault == "die":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if fault == "hang":
            double.over.wait()
            return
        while fault == "ping" and not double.over.wait(0.05) and not self.gone:
            self._write(": ping\n\n")
        prompt = body["prompt"] if isinstance(body["prompt"], list) else double.encode(body["prompt"])
        with double.lock:
            double.together += 1
            double.most_together = max(double.most_together, double.together)
        wanted = int(body["max_tokens"])
        time.sleep(FIRST_S)
        for first in range(0, wanted, double.merged):
            ids = list(range(first, min(first + double.merged, wanted)))
            choice: dict[str, Any] = {"index": 0, "text": "ab" * len(ids), "finish_reason": None}
            if body.get("return_token_ids") and double.tells_ids:
                choice["token_ids"] = ids
            event: dict[str, Any] = {"choices": [choice]}
            if fault in ODD:
                at, value = ODD[fault]
                (choice if at == "token_ids" else event)[at] = value
            self._event(event, "other" if fault == "model" else None)
            if fault == "half" and first:
                self._write('data: {"choices": [{"te')
                return
            if fault == "cut" and first:
                return
            if fault == "error" and first:
                self._event({"error": {"message": "out of blocks"}})
                return
            time.sleep(GAP_S)
        while fault == "endless" and not self.gone:
            self._event({"choices": [{"index": 0, "text": "more", "finish_reason": None}]})
        with double.lock:
            double.together -= 1
            double.counted += 1
        self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage: dict[str, Any] = {"prompt_tokens": double.told_prompt or len(prompt), "completion_tokens": wanted}
        if double.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": double.cached}
        self._event({"choices": [], "usage": usage})
        self._write("data: [DONE]\n\n")

    def _score(self, body: dict[str, Any]) -> None:
        double, tokens = self.double, body["prompt"]
        choice: dict[str, Any] = {"index": 0, "text": "a", "finish_reason": "length"}
        found = double.losses(tokens)
        if double.scores == "prompt_logprobs" and "prompt_logprobs" in body:
            told = [
                {str(token): {"logprob": -loss, "rank": 1 if hit else 2, "decoded_token": "x"}}
                for token, (loss, hit) in zip(tokens[1:], found, strict=True)
            ]
            choice["prompt_logprobs"] = [None, *told]
        if double.scores == "echo" and body.get("echo"):
            own = [None, *(-loss for loss, _ in found), -1.0]
            best = [None, *({"y": -loss if hit else -loss + 0.5} for loss, hit in found), {"y": -1.0}]
            choice["logprobs"] = {"tokens": ["x"] * len(own), "token_logprobs": own, "top_logprobs": best}
        self._json({"model": double.model, "choices": [choice]})

    def _event(self, event: dict[str, Any], model: str | None = None) -> None:
        self._write(f"data: {json.dumps({'model': model or self.double.model} | event)}\n\n")

    def _write(self, text: str) -> None:
        try:
            self.wfile.write(text.encode())
            self.wfile.flush()
        except OSError:
            # the client has gone
            self.gone = True

    def _json(self, answer: Any, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _metrics(double: Double) -> str:
    count = double.counted
    return (
        "# HELP vllm:time_to_first_token_seconds x\n# TYPE vllm:time_to_first_token_seconds histogram\n"
        f'vllm:time_to_first_token_seconds_bucket{{le="1.0",model_name="tiny"}} {count}\n'
        f'vllm:time_to_first_token_seconds_count{{engine="0",model_name="tiny"}} {count}\n'
        f'vllm:time_to_first_token_seconds_sum{{engine="0",model_name="tiny"}} {0.125 * count}\n'
        "# TYPE vllm:num_preemptions counter\n"
        f'vllm:num_preemptions_total{{engine="0",model_name="tiny"}} {2.0 * count}\n'
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3\n"
        "# TYPE vllm:request_success counter\n"
        f'vllm:request_success_total{{finished_reason="length",model_name="tiny"}} {count}\n'
    )


@contextmanager
def serving(losses: Losses, encode: Callable[[str], list[int]]) -> Iterator[Double]:
    """A server that runs while the block does."""
    double = Double(losses, encode)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"double": double}))
    server.daemon_threads = True
    double.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        double.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
