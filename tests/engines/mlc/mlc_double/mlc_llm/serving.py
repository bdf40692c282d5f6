"""``mlc_llm serve``: the port, the lines and the answers, and a loop that serves requests together as the real engine does."""

import argparse
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULT = os.environ.get("MLC_DOUBLE", "")
STEP_S = 0.004
# requests that come within this time are served together
GATHER_S = 0.05
NAN = """Exception in thread Thread-1:
Traceback (most recent call last):
  File "lib/python3.11/threading.py", line 1045, in _bootstrap_inner
    self.run()
tvm.error.InternalError: Check failed: (!std::isnan(p)) is false: Possibly prob distribution contains NAN."""
NO_MEMORY = """Exception in thread Thread-1:
tvm.error.InternalError: Check failed: (output_res.IsOk()) is false: Insufficient GPU memory error: The available single GPU \
memory is 0.241 MB, which is less than the sum of model weight size (1.440 MB) and temporary buffer size (49.308 MB)."""
COLOUR, PLAIN = "\x1b[31m", "\x1b[0m"


def say(text: str) -> None:
    # a traceback comes line by line, and what matters comes last
    for line in text.splitlines():
        print(line, file=sys.stderr, flush=True)
        time.sleep(0.05 if "Traceback" in text else 0)


class Engine:
    """Requests in, steps over all that run, counters as MLC counts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.arrived = threading.Event()
        self.waiting: list[dict] = []
        self.sums = dict.fromkeys(
            ("engine_prefill_time_sum", "engine_decode_time_sum", "engine_jump_forward_time_sum", "prompt_tokens_sum",
             "completion_tokens_sum", "prefill_tokens_sum", "decode_tokens_sum", "jump_forward_tokens_sum"), 0,
        )  # fmt: skip
        self.by_batch: dict[int, list[float]] = {}
        self.last: dict = {}
        self.prefixes: set[tuple[int, ...]] = set()
        self.caches = True
        threading.Thread(target=self.loop, daemon=True).start()

    def add(self, prompt: list[int], tokens: int) -> dict:
        request = {"prompt": prompt, "left": tokens, "tokens": tokens, "chunks": [], "start": time.monotonic()}
        request["more"] = threading.Condition(self.lock)
        with self.lock:
            self.waiting.append(request)
        self.arrived.set()
        return request

    def loop(self) -> None:
        while True:
            self.arrived.wait()
            time.sleep(GATHER_S)
            self.arrived.clear()
            with self.lock:
                batch, self.waiting = self.waiting, []
            for request in batch:
                self.prefill(request)
            while running := [request for request in batch if request["left"]]:
                time.sleep(STEP_S)
                with self.lock:
                    for request in running:
                        self.token(request)
                    times = self.by_batch.setdefault(len(running), [])
                    times.append(STEP_S)
                    self.sums["decode_tokens_sum"] += len(running)
                    self.sums["engine_decode_time_sum"] += STEP_S

    def prefill(self, request: dict) -> None:
        time.sleep(STEP_S)
        length, key = len(request["prompt"]), tuple(request["prompt"])
        computed = 1 if self.caches and key in self.prefixes else length
        self.prefixes.add(key)
        if FAULT == "preempted":
            computed += 599
        request["prefill"] = computed
        request["ttft"] = time.monotonic() - request["start"]
        with self.lock:
            self.sums["prefill_tokens_sum"] += computed
            self.sums["prompt_tokens_sum"] += length
            self.sums["engine_prefill_time_sum"] += STEP_S
            self.token(request)

    def token(self, request: dict) -> None:
        request["left"] -= 1
        done = request["tokens"] - request["left"]
        # the text of every fifth token is no whole UTF-8 and waits for the next one
        if request["left"] and done % 5 == 0:
            return
        request["chunks"].append("é " if done % 5 == 1 and done > 1 else "a ")
        if not request["left"]:
            self.finish(request)
        request["more"].notify_all()

    def finish(self, request: dict) -> None:
        seconds = time.monotonic() - request["start"]
        tokens = request["tokens"]
        self.sums["completion_tokens_sum"] += tokens
        self.last = {
            "prompt_tokens": len(request["prompt"]), "completion_tokens": tokens, "prefill_tokens": request["prefill"],
            "decode_tokens": tokens - 1, "jump_forward_tokens": 0,
            "prefill_tokens_per_s": request["prefill"] / request["ttft"], "end_to_end_latency_s": seconds,
            "ttft_s": request["ttft"], "inter_token_latency_s": seconds / tokens,
        }  # fmt: skip
        if tokens > 1:
            self.last["decode_tokens_per_s"] = (tokens - 1) / (seconds - request["ttft"])
        request["extra"] = self.last

    def metrics(self) -> dict:
        with self.lock:
            found = dict(self.sums)
            for rate, seconds in (("prefill", "engine_prefill_time_sum"), ("decode", "engine_decode_time_sum")):
                if found[seconds]:
                    found[f"{rate}_tokens_per_s"] = found[f"{rate}_tokens_sum"] / found[seconds]
            by_batch = {}
            # the first step of a size is thrown away
            for size, times in self.by_batch.items():
                if len(times) > 1:
                    by_batch[f"mean{{batch_size={size}}}"] = sum(times[1:]) / (len(times) - 1)
                    by_batch[f"count{{batch_size={size}}}"] = len(times) - 1
            return found | {
                "last_finished_request": self.last, "decode_time_by_batch_size": by_batch,
                "draft_time_by_batch_size": {}, "verify_time_by_batch_size": {},
            }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine
    model: str

    def log_message(self, text: str, *values: object) -> None:
        say(f'INFO:     127.0.0.1 - "{text % values}"')

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer({"data": [{"id": self.model, "object": "model"}], "object": "list"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/debug/dump_engine_metrics":
            self.answer({"metrics": self.engine.metrics()})
            return
        if FAULT == "bad_request":
            message = "Request prompt has 1298 tokens in total, larger than the model input length limit 256."
            self.answer({"object": "error", "message": message, "code": 400}, 400)
            return
        if FAULT == "crash_request":
            say("Fatal: the driver went away")
            os._exit(134)
        if FAULT == "nan_request":
            say(COLOUR + NAN + PLAIN)
        if FAULT in ("nan_request", "hang_request"):
            time.sleep(600)
        assert body["stream"]
        assert body["stream_options"] == {"include_usage": True}
        assert body["debug_config"] == {"ignore_eos": True}
        assert body["temperature"] == 0.0
        self.stream(self.engine.add(body["prompt"], body["max_tokens"]))

    def stream(self, request: dict) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        while sent < len(request["chunks"]) or request["left"]:
            with request["more"]:
                while sent == len(request["chunks"]):
                    request["more"].wait()
                texts = request["chunks"][sent:]
            for text in texts:
                sent += 1
                last = sent == len(request["chunks"]) and not request["left"]
                self.event({"choices": [{"text": text, "finish_reason": "length" if last else None, "index": 0}]})
        if FAULT != "no_usage":
            usage = {
                "prompt_tokens": len(request["prompt"]),
                "completion_tokens": request["tokens"],
                "extra": request["extra"],
            }
            self.event({"choices": [], "usage": usage})
        self.send_chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, content: dict) -> None:
        self.send_chunk(f"data: {json.dumps({'id': 'cmpl-1', 'usage': None} | content)}\n\n")

    def send_chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def serve(given: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("device", "mode", "prefix-cache-mode", "overrides", "host", "model-lib"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--enable-debug", action="store_true")
    asked = parser.parse_args(given)
    limits = dict(part.split("=") for part in asked.overrides.split(";"))
    if FAULT == "hang_start":
        say('[18:12:47] .../cpp/serve/config.cc:804: Under mode "local", max batch size 2 is specified by user')
        time.sleep(600)
    if FAULT == "crash_start":
        say("ValueError: Device is not found on your local environment: vulkan")
        sys.exit(1)
    if FAULT == "oom_start":
        # as observed: the thread dies, the constructor waits for ever
        say(NO_MEMORY)
        time.sleep(600)
    say(
        f'[18:12:47] .../cpp/serve/config.cc:885: The actual engine mode is "{asked.mode}". So max batch size is '
        f"{limits['max_num_sequence']}, max KV cache token capacity is {limits['max_total_seq_length']}, prefill chunk size is "
        f"{limits['prefill_chunk_size']}."
    )
    if FAULT != "no_memory_line":
        say(
            "[17:47:18] .../cpp/serve/config.cc:890: Estimated total single GPU memory usage: 50.988 MB (Parameters: 1.440 MB. "
            "KVCache: 48.349 MB. Temporary buffer: 1.198 MB). The actual usage might be slightly larger than the estimated "
            "number."
        )
    Handler.engine, Handler.model = Engine(), asked.model
    Handler.engine.caches = asked.prefix_cache_mode != "disable"
    server = ThreadingHTTPServer((asked.host, asked.port), Handler)
    say(f"INFO:     Uvicorn running on http://{asked.host}:{asked.port} (Press CTRL+C to quit)")
    server.serve_forever()
