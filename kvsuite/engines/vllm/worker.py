"""The worker of engine `vllm`, run by vLLM's own interpreter: it knows vLLM and nothing of kvsuite.

One JSON object a line comes in over a socket, one goes out for each. vLLM is imported once; every engine is a fork of that
process and ends with it, so that nothing of one engine is left for the next, on a card neither.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import socket
import sys
import time
from contextlib import nullcontext, suppress
from typing import Any

# engine and scheduler in this process, so that step() is the step; and no report to anybody
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class Channel:
    """Lines of JSON over a socket; nothing is read ahead, since a fork may read the next line."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self.descriptor = descriptor
        self._socket = socket.socket(fileno=descriptor)
        self._rest = b""

    def receive(self) -> dict[str, Any] | None:
        """The next message, ``None`` when the other end has closed."""
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            part = self._socket.recv(1 << 20)
            if not part:
                return None
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def send(self, answer: dict[str, Any]) -> None:
        """Answer the last message."""
        self._socket.sendall(json.dumps(answer).encode() + b"\n")


class Steps:
    """What the scheduler puts into every step, and when the step came back."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._schedule = scheduler, scheduler.schedule
        scheduler.schedule = self._scheduled
        self.clear()

    def clear(self) -> None:
        self.plans: list[dict[str, int]] = []
        self.cached: dict[str, int] = {}
        #: of each request: when it was first given blocks, tokens that were fed as its prompt, how often they were taken away
        self.admitted: dict[str, float] = {}
        self.fed: dict[str, int] = {}
        self.taken: dict[str, int] = {}
        self.preempted = self.computed_prompt = self.computed_decode = 0

    def _scheduled(self, *args: Any, **named: Any) -> Any:
        plan = self._schedule(*args, **named)
        known, new = plan.scheduled_cached_reqs, plan.scheduled_new_reqs
        computed = dict(zip(known.req_ids, known.num_computed_tokens, strict=True))
        for one in new:
            computed[one.req_id] = one.num_computed_tokens
            self.cached.setdefault(one.req_id, one.num_computed_tokens)
            self.admitted.setdefault(one.req_id, time.perf_counter())
        prompt = decode = 0
        for name, count in plan.num_scheduled_tokens.items():
            # one token behind the prompt is a decode step; more are a preempted request that is computed again
            if count == 1 and computed[name] >= self._scheduler.requests[name].num_prompt_tokens:
                decode += 1
            else:
                prompt += count
                self.fed[name] = self.fed.get(name, 0) + count
        for name in plan.preempted_req_ids or ():
            self.taken[name] = self.taken.get(name, 0) + 1
        if plan.num_scheduled_tokens:
            pool = self._scheduler.kv_cache_manager.block_pool
            self.computed_prompt += prompt
            self.computed_decode += decode
            self.preempted += len(plan.preempted_req_ids or ())
            self.plans.append(
                {
                    "prompt_tokens": prompt,
                    "decode_tokens": decode,
                    "running": len(self._scheduler.running),
                    "waiting": len(self._scheduler.waiting),
                    # block 0 is nobody's
                    "used_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                }
            )
        return plan

    def counts(self) -> dict[str, int]:
        decoding = [plan["decode_tokens"] for plan in self.plans if not plan["prompt_tokens"]]
        return {
            "computed_prefill_tokens": self.computed_prompt,
            "computed_decode_tokens": self.computed_decode,
            "prefix_hit_tokens": sum(self.cached.values()),
            "preemptions": self.preempted,
            "prefill_steps": len(self.plans) - len(decoding),
            "decode_steps": len(decoding),
            "largest_batch": max((plan["decode_tokens"] for plan in self.plans), default=0),
        }


class VocabularyRows:
    """Log-probabilities of the whole vocabulary behind a prompt, taken where vLLM would make an object of each.

    Parameters
    ----------
    vocabulary
        Of the model.

    Attributes
    ----------
    kept
        Once it has ended, ``[scored tokens, vocabulary]``.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._parts: list[Any] = []

    def __enter__(self) -> None:
        from vllm.v1.engine.logprobs import LogprobsProcessor

        self._processor, self._update = LogprobsProcessor, LogprobsProcessor._update_prompt_logprobs

        def update(processor: Any, tensors: Any) -> None:
            ids, values, *rest = tensors
            self._parts.append(self._by_token(ids[:, 1:].numpy(), values[:, 1:].numpy()))
            # the first one is the token of the prompt, the second the most probable one
            self._update(processor, type(tensors)(ids[:, :2], values[:, :2], *rest))

        LogprobsProcessor._update_prompt_logprobs = update

    def __exit__(self, *_: object) -> None:
        self._processor._update_prompt_logprobs = self._update

    def end(self, first: int, last: dict[int, float]) -> None:
        """Keep what is behind the tokens from ``first`` on, the last one, which was chosen, among them."""
        import numpy

        ids, values = numpy.array([list(last)]), numpy.array([list(last.values())], dtype=numpy.float32)
        self.kept = numpy.concatenate([*self._parts, self._by_token(ids, values)])[first - 1 :]
        self._parts.clear()

    def _by_token(self, ids: Any, values: Any) -> Any:
        import numpy

        if ids.shape[1] != self._vocabulary:
            raise ValueError(f"log-probabilities of {ids.shape[1]} tokens, and the vocabulary has {self._vocabulary}")
        rows = numpy.empty(ids.shape, dtype=numpy.float32)
        numpy.put_along_axis(rows, ids.astype(numpy.int64), values, axis=1)
        return rows


def card_facts(worker: Any) -> dict[str, Any]:
    """What one card holds; runs in the process that drives it."""
    import torch

    runner = worker.model_runner
    layers = runner.vllm_config.compilation_config.static_forward_context
    storages: dict[int, int] = {}
    formats: dict[str, None] = {}
    tensors: dict[str, None] = {}
    backends: dict[str, None] = {}
    for layer in layers.values():
        stored = getattr(layer, "kv_cache", None)
        if stored is None:
            continue
        for tensor in stored if isinstance(stored, (list, tuple)) else [stored]:
            if tensor.numel():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                tensors[str(tensor.dtype).removeprefix("torch.")] = None
        formats[str(getattr(layer, "kv_cache_dtype", "auto"))] = None
        backends[layer.get_attn_backend().get_name()] = None
    weights = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in runner.model.parameters()}
    found = {
        "pool_bytes": sum(storages.values()),
        "weights_bytes": sum(weights.values()),
        "kv_formats": list(formats),
        "kv_tensors": list(tensors),
        "backends": list(backends),
    }
    if torch.device(worker.device).type == "cuda":
        found |= {"name": torch.cuda.get_device_name(worker.device), **card_memory(worker)}
    return found


def card_memory(worker: Any, fresh: bool = False) -> dict[str, int]:
    """Bytes of the allocator of one card; ``fresh`` begins a new peak afterwards."""
    import torch

    if torch.device(worker.device).type != "cuda":
        return {}
    found = {
        "allocated_bytes": torch.cuda.memory_allocated(worker.device),
        "peak_bytes": torch.cuda.max_memory_allocated(worker.device),
        "reserved_bytes": torch.cuda.memory_reserved(worker.device),
    }
    if fresh:
        torch.cuda.reset_peak_memory_stats(worker.device)
    return found


class StepwiseEngine:
    """One `LLM`, driven step by step.

    Parameters
    ----------
    settings
        Arguments of `LLM`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        begin = time.perf_counter()
        self.engine = LLM(**settings).llm_engine
        self.start_s = time.perf_counter() - begin
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.steps = Steps(self.scheduler)
        self._rows: VocabularyRows | None = None
        #: what the scheduler calls requests, by our names
        self._inside: dict[str, str] = {}

    def facts(self) -> dict[str, Any]:
        """What was really set."""
        import torch

        config = self.engine.vllm_config
        cache, schedule, compilation = config.cache_config, config.scheduler_config, config.compilation_config
        mode = compilation.cudagraph_mode
        return {
            "start_s": self.start_s,
            "compile_s": float(compilation.compilation_time),
            "compilation": getattr(compilation.mode, "name", str(compilation.mode)),
            "captured": getattr(mode, "name", str(mode)),
            "capture_sizes": list(compilation.cudagraph_capture_sizes or ()),
            "eager": bool(config.model_config.enforce_eager),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": schedule.max_num_seqs,
            "max_num_batched_tokens": schedule.max_num_batched_tokens,
            "chunked_prefill": bool(schedule.enable_chunked_prefill),
            "async_scheduling": bool(schedule.async_scheduling),
            "prefix_caching": bool(cache.enable_prefix_caching),
            "kv_cache_dtype": cache.cache_dtype,
            "block_size": cache.block_size,
            "num_blocks": cache.num_gpu_blocks,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "threads": torch.get_num_threads(),
            "vocabulary": config.model_config.get_vocab_size(),
            "cards": self.engine.collective_rpc(card_facts),
        }

    def serve(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Serve all requests at once, greedily and to exactly the tokens that each wants."""
        self.steps.clear()
        begin = time.perf_counter()
        names = [self._add(one["prompt"], one["new_tokens"]) for one in requests]
        place = {name: index for index, name in enumerate(names)}
        tokens: list[list[int]] = [[] for _ in names]
        chunks: list[list[list[int]]] = [[] for _ in names]
        own: list[dict[str, float]] = [{} for _ in names]
        ends = []
        step, now = self.engine.step, time.perf_counter
        while self.engine.has_unfinished_requests():
            outputs = step()
            ends.append(now() - begin)
            for output in outputs:
                index = place[output.request_id]
                new = output.outputs[0].token_ids
                if new:
                    tokens[index] += new
                    chunks[index].append([len(ends) - 1, len(new)])
                if output.finished:
                    own[index] = own_times(output.metrics)
        hits = [self.steps.cached[self._inside[name]] for name in names]
        return {
            "step_ends": ends,
            "requests": [
                {"tokens": tokens[index], "chunks": chunks[index], "own": own[index], "cached_tokens": hits[index]}
                for index in range(len(names))
            ],
            "counts": self.steps.counts(),
            "plans": {name: [plan[name] for plan in self.steps.plans] for name in (self.steps.plans or [{}])[0]},
        }

    def load(self, requests: list[dict[str, Any]], concurrency: int | None) -> dict[str, Any]:
        """Serve requests by their arrivals, in seconds after the start, or so many at a time, each as another is over.

        A request enters between two steps as soon as its time has come; all times count from the start.
        """
        self.steps.clear()
        order = sorted(range(len(requests)), key=lambda index: requests[index]["arrival_s"])
        arrivals = [one["arrival_s"] for one in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        stamps: list[list[float]] = [[] for _ in requests]
        names, place = [""] * len(requests), {}
        rows: list[list[float]] = []
        entered = over = 0
        now, step, begin = time.perf_counter, self.engine.step, time.perf_counter()
        while over < len(requests):
            while entered < len(requests):
                index, at = order[entered], now() - begin
                if arrivals[index] > at if concurrency is None else entered - over >= concurrency:
                    break
                if concurrency is not None:
                    arrivals[index] = at
                names[index] = self._add(requests[index]["prompt"], requests[index]["new_tokens"])
                place[names[index]] = index
                entered += 1
            if entered == over:
                time.sleep(max(arrivals[order[entered]] - (now() - begin), 0.0))
                continue
            planned, start = len(self.steps.plans), now() - begin
            outputs = step()
            end = now() - begin
            for output in outputs:
                index, new = place[output.request_id], output.outputs[0].token_ids
                tokens[index] += new
                stamps[index] += [end] * len(new)
                over += bool(output.finished)
            for plan in self.steps.plans[planned:]:
                kinds = ("prompt_tokens", "decode_tokens", "running", "waiting", "used_blocks")
                rows.append([start, end, *(plan[kind] for kind in kinds)])
        own = [self._inside[name] for name in names]
        return {
            "requests": [
                {
                    "arrival_s": arrivals[index],
                    "admitted_s": self.steps.admitted[name] - begin,
                    "token_s": stamps[index],
                    "tokens": tokens[index],
                    "cached_tokens": self.steps.cached[name],
                    "computed_prompt_tokens": self.steps.fed.get(name, 0),
                    "preemptions": self.steps.taken.get(name, 0),
                }
                for index, name in enumerate(own)
            ],
            "steps": rows,
            "counts": self.steps.counts(),
        }

    def memory(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Serve the shape once and read, at each request's first and last token, what it holds."""
        self.steps.clear()
        before = self.engine.collective_rpc(card_memory, args=(True,))
        # one token more: blocks are read while a request still runs
        names = [self._add(one["prompt"], one["new_tokens"] + 1) for one in requests]
        first: dict[int, dict[str, int]] = {}
        last: dict[int, dict[str, int]] = {}
        place = {name: index for index, name in enumerate(names)}
        counted = [0] * len(names)
        prefill = None
        while len(last) < len(names):
            for output in self.engine.step():
                index = place[output.request_id]
                counted[index] += len(output.outputs[0].token_ids)
                if counted[index] and index not in first:
                    first[index] = self._held(names[index])
                if counted[index] >= requests[index]["new_tokens"] and index not in last:
                    last[index] = self._held(names[index])
            if prefill is None and len(first) == len(names):
                prefill = self.engine.collective_rpc(card_memory, args=(True,))
        decode = self.engine.collective_rpc(card_memory)
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {
            "first": [first[index] for index in range(len(names))],
            "last": [last[index] for index in range(len(names))],
            "before": before,
            "prefill": prefill,
            "decode": decode,
        }

    def score(self, sequences: list[dict[str, Any]], rows: bool = False) -> dict[str, Any]:
        """Losses of the tokens from ``first`` on of each sequence, and whether each was the most probable one.

        All but the last token are the prompt; the last one is forced, so that a sequence may be as long as the engine takes.
        ``rows`` keeps the log-probabilities of the whole vocabulary behind them, of one sequence, for `rows`.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # the most probable token is asked for, because a rank counts all that are as probable: in bfloat16 two often are, and
        # an argmax, which other engines take, is one of them
        place, wanted = {}, -1 if rows else 1
        self._rows = VocabularyRows(self.engine.vllm_config.model_config.get_vocab_size()) if rows else None
        for index, one in enumerate(sequences):
            params = SamplingParams(
                temperature=0.0, max_tokens=1, prompt_logprobs=wanted, logprobs=wanted, allowed_token_ids=[one["tokens"][-1]],
                detokenize=False, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            place[self._add_with(one["tokens"][:-1], params)] = index
        found: list[dict[str, Any]] = [{} for _ in sequences]
        while self.engine.has_unfinished_requests():
            with self._rows or nullcontext():
                outputs = self.engine.step()
            for output in outputs:
                index = place[output.request_id]
                tokens, first = sequences[index]["tokens"], sequences[index]["first"]
                behind = [*output.prompt_logprobs, *output.outputs[0].logprobs][first:]
                own = [row[token] for row, token in zip(behind, tokens[first:], strict=True)]
                if self._rows is not None:
                    self._rows.end(first, {token: one.logprob for token, one in behind[-1].items()})
                found[index] = {"nll": [-one.logprob for one in own], "top1": [one.rank == 1 for one in own]}
        return {"scores": found}

    def rows(self, first: int, count: int) -> dict[str, Any]:
        """Rows ``first`` to ``first + count`` of what `score` kept: float32, little end first, in base 64."""
        assert self._rows is not None
        return {"rows": base64.b64encode(self._rows.kept[first : first + count].astype("<f4").tobytes()).decode()}

    def _add(self, prompt: list[int], new_tokens: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return self._add_with(
            prompt,
            SamplingParams(
                temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            ),
        )  # fmt: skip

    def _add_with(self, prompt: list[int], params: Any) -> str:
        name = str(len(self._inside))
        self._inside[name] = self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _held(self, name: str) -> dict[str, int]:
        request = self.scheduler.requests[self._inside[name]]
        blocks = self.scheduler.kv_cache_manager.get_block_ids(self._inside[name])
        # a token that is under way is counted already where steps overlap
        tokens = request.num_computed_tokens - request.num_output_placeholders
        return {"tokens": tokens, "blocks": sum(map(len, blocks))}


def own_times(metrics: Any) -> dict[str, float]:
    """vLLM's own stamps of a request, in seconds after it was queued."""
    if metrics is None or not metrics.queued_ts:
        return {}
    return {
        "scheduled_s": metrics.scheduled_ts - metrics.queued_ts,
        "first_token_s": metrics.first_token_ts - metrics.queued_ts,
        "last_token_s": metrics.last_token_ts - metrics.queued_ts,
    }


def run_engine(channel: Channel, settings: dict[str, Any]) -> None:
    """Start an engine and answer for it until it is to stop."""
    try:
        engine = StepwiseEngine(settings)
        channel.send(engine.facts())
    except BaseException as error:
        channel.send(told(error))
        return
    while (message := channel.receive()) is not None and message["do"] != "stop":
        try:
            channel.send(getattr(engine, message.pop("do"))(**message))
        except BaseException as error:
            # whatever is under way cannot be taken back
            channel.send(told(error))
            return
    if message is not None:
        channel.send({"stopped": True})


def told(error: BaseException) -> dict[str, Any]:
    """An error and what it came from as an answer."""
    chain: list[str] = []
    while error is not None and len(chain) < 5:
        chain.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return {"error": chain[0], "causes": chain[1:]}


def may_fork() -> bool:
    """Whether forks of this process can use CUDA: not if importing has opened the driver. Tried in a fork of its own."""
    child = os.fork()
    if child == 0:
        code = 0
        with suppress(OSError):
            code = int(ctypes.CDLL("libcuda.so.1").cuInit(0) != 0)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(descriptor: int, first: str | None) -> None:
    channel = Channel(descriptor)
    begin = time.perf_counter()
    import torch
    import vllm
    from vllm import LLM  # noqa: F401
    from vllm.config.cache import CacheDType
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if first is not None:
        try:
            run_engine(channel, json.loads(first))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # everything is answered: a crash on the way out would be told as the answer to the next question
            os._exit(0)
    forks = may_fork()
    channel.send(
        {
            "import_s": time.perf_counter() - begin,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "forks": forks,
            "formats": list(CacheDType.__args__),
            "backends": [one.name for one in AttentionBackendEnum],
        }
    )
    while (message := channel.receive()) is not None:
        child = os.fork()
        if child == 0:
            if not forks:
                os.set_inheritable(descriptor, True)
                here = [sys.executable, "-P", os.path.abspath(__file__), str(descriptor)]
                os.execv(sys.executable, [*here, json.dumps(message["settings"])])
            try:
                run_engine(channel, message["settings"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status):
            channel.send({"error": f"vLLM ended with {os.waitstatus_to_exitcode(status)}", "causes": []})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
