"""A session of the `server` engine: one model on one server, seen by a client."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from kvsuite.case import Case
from kvsuite.engines.capabilities import (
    AppliesPolicy,
    ScoresOutput,
    ScoresThroughCache,
    ScoresWindows,
    refuse_images,
)
from kvsuite.engines.engine import EngineSettings, Session
from kvsuite.engines.results import EngineView, MemoryPass, Reach, Served, ServeRequest, WindowProgress, WindowScores
from kvsuite.engines.serving_plan import ServingPlan
from kvsuite.errors import CaseInvalid
from kvsuite.memory_model.config import architecture_of
from kvsuite.meters.clock import ClientClock, Clock
from kvsuite.meters.quality import TokenScores
from kvsuite.models.resolve import ModelSpec
from kvsuite.workloads.windows import Window, merge_windows, target_positions, window_inputs

from .counters import between, engine_times, preemptions, read_counters
from .dialect import Dialect, prompt_losses
from .endpoint import Endpoint
from .failure import Refused, ServerFailed
from .served_model import ServedModel, find_model, software
from .serving import counts_of, output_ids, own_times, request_served, request_times
from .streams import ServerReply, Streams

_UNSEEN = "a client sees nothing of a server's memory"
_STARTED = "the server has its own, from the command that started it"
#: axes of a design point that are the server's own
_POINT = ("prefill_chunk", "window", "sink")


class ServerSession(Session):
    """A model on a server.

    Parameters
    ----------
    spec
        The model that was asked for.
    settings
        Of these none reaches a server; those that were asked for are named as inert.
    endpoint
        Where the server is; closed with the session.
    model
        What it serves.
    named
        What it is told to call the model, ``None`` for a name of ``spec``.
    dialect
        How it is spoken to.
    tokenizer
        The model's, ``None`` if it has none here.
    tokenizer_said
        What the comparison of the two tokenizers gave.
    """

    lacks: ClassVar[Mapping[type, str]] = {
        AppliesPolicy: "a server keeps its own cache: no policy reaches it",
        ScoresOutput: "a server takes no forced output and returns no losses of it",
        ScoresThroughCache: "a server returns no losses of a text token by token through its cache",
        ScoresWindows: "this server returns no log-probabilities of a prompt (neither prompt_logprobs nor echo with logprobs)",
    }

    def __init__(
        self,
        spec: ModelSpec,
        settings: EngineSettings,
        endpoint: Endpoint,
        model: ServedModel,
        named: str | None,
        dialect: Dialect,
        tokenizer: Any,
        tokenizer_said: str,
    ) -> None:
        super().__init__()
        self._spec, self._endpoint, self._served, self._named = spec, endpoint, model, named
        self._dialect, self._tokenizer = dialect, tokenizer
        self._architecture = architecture_of(spec.request, cache_dir=settings.cache_dir)
        self._caches = False
        meta = model.facts.get("meta") or {}
        self.model |= {
            "label": spec.label,
            "kind": spec.kind,
            "revision": spec.revision,
            "notes": ["the weights are the server's: that they are those of this model is known by its name alone"],
            "weights_bytes": meta.get("size") if isinstance(meta, Mapping) else None,
            "trained_length": self._architecture.trained_length,
            "served_as": endpoint.shown(model.id),
            "is_dummy": spec.is_dummy,
        }
        self._facts = {
            "endpoint": endpoint.url,
            "software": software(endpoint, model),
            "served_as": endpoint.shown(model.id),
            "prompt": dialect.prompt,
            "extensions": dialect.extends,
            "prompt_losses": dialect.scores,
            "tokenizer": tokenizer_said,
        }
        asked = {
            "threads": settings.threads is not None,
            "attention": settings.attention != "auto",
            "decode_step": settings.decode_step != "auto",
            "impl": settings.implementation != "ring",
        }
        self._own_inert = {name: _STARTED for name, given in asked.items() if given} | {"dtype": _STARTED}

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu")

    @property
    def dtype_name(self) -> str:
        return "unknown"

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self._architecture.vocabulary

    def prepare(self, case: Case) -> None:
        # whatever is behind the address now: it may have been started again since the last case
        self._served = find_model(self._endpoint, self._spec, self._named)
        plan, own = ServingPlan.of(case), dict(self._own_inert)
        caches = bool(case.workload.get("prefix_caching")) if plan is None else plan.prefix_caching
        self._caches = caches
        if plan is not None:
            own |= dict.fromkeys(("pool_blocks" if plan.pool_bytes is None else "pool_bytes",), _STARTED)
            own |= dict.fromkeys(("max_num_seqs", "step_tokens"), _STARTED)
        self.inert = own
        self.effective = dict(self._facts) | {"prefix_caching": None if caches or not self._dialect.extends else False}

    def clock(self, usual: Clock) -> Clock:
        return ClientClock()

    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        if any(one.arrival_s or one.scored for one in requests):
            raise ValueError(
                "serve() serves all requests at once; use serve_under_load() for arrivals, and no server scores output"
            )
        stamps = clock or ClientClock()
        before, replies, after = self._complete(requests, stamps, None)
        seconds = stamps.seconds()
        times = [
            request_times(reply, one, seconds, self._dialect) for reply, one in zip(replies, requests, strict=True)
        ]
        counts = counts_of(replies, sum(one.prompt_tokens for one in times))
        return self._result(replies, counts, before, after, times=[] if clock is None else times)

    def serve_under_load(self, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served:
        if any(one.scored for one in requests):
            raise CaseInvalid(self.lacks[ScoresOutput])
        stamps = ClientClock()
        before, replies, after = self._complete(requests, stamps, concurrency)
        seconds = stamps.seconds()
        served = [
            request_served(reply, one, seconds, self._dialect) for reply, one in zip(replies, requests, strict=True)
        ]
        counts = counts_of(replies, sum(one.prompt_tokens for one in served))
        return self._result(replies, counts, before, after, requests=served)

    def engine_metrics(self, served: Sequence[Served]) -> dict[str, float]:
        views = [one.engine for one in served if one.engine is not None]
        return between(views[0].before, views[-1].after) | dict(views[-1].times)

    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        self.serve(requests)
        return MemoryPass.unmeasured(_UNSEEN)

    def reach(self, case: Case) -> Reach:
        settings = {name: value for name, value in case.params.items() if name not in _POINT}
        asked = {"window": int(case.params["window"]) > 0, "sink": int(case.params["sink"]) > 0}
        return Reach(settings, {axis: _STARTED for axis in _POINT if asked.get(axis, True)})

    def full_kv_bytes(self, tokens: int) -> int:
        raise CaseInvalid(
            "the bytes of a token in the server's cache are not known to a client; leave --kv-pool-bytes out: the pool is the "
            "server's own"
        )

    def planned_unknown(self) -> str:
        return "the format in which the server stores keys and values is not known to a client"

    def close(self) -> None:
        self._endpoint.close()

    def _complete(
        self, requests: Sequence[ServeRequest], clock: Clock, concurrency: int | None
    ) -> tuple[dict[str, float], list[ServerReply], dict[str, float]]:
        """Counters before, replies, counters after."""
        refuse_images(requests, "server")
        bodies = [
            self._dialect.body(
                self._served, one.prompt, one.new_tokens, self._tokenizer,
                # of each request: rounds, rates and runs send equal prompts, which would be found again
                salt=None if self._caches else secrets.token_hex(16),
            )
            for one in requests
        ]  # fmt: skip
        before = self._counters()
        try:
            streams = Streams(self._endpoint, self._served.names, clock)
            replies = streams.complete(bodies, [one.arrival_s for one in requests], concurrency)
        except Refused as refused:
            raise CaseInvalid(f"the server at {self._endpoint.url} refuses the request: {refused}") from None
        return before, replies, self._counters()

    def _counters(self) -> dict[str, float]:
        with contextlib.suppress(Refused, ServerFailed):
            return read_counters(self._endpoint.get_text("/metrics"))
        return {}

    def _result(
        self,
        replies: Sequence[ServerReply],
        counts: dict[str, int],
        before: Mapping[str, float],
        after: Mapping[str, float],
        **found: Any,
    ) -> Served:
        counted = between(before, after)
        preempted = preemptions(counted)
        if preempted is not None:
            counts["preemptions"] = preempted
        view = EngineView(engine_times(counted, len(replies)) | own_times(replies), before, after)
        return Served(
            found.get("times", []), output_ids(replies), counts, texts=[reply.text for reply in replies], engine=view,
            requests=found.get("requests", []),
        )  # fmt: skip


class ScoringServerSession(ServerSession):
    """A model on a server that gives log-probabilities of a prompt."""

    def score_windows(
        self,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> WindowScores:
        how = self._dialect.scores
        assert how is not None  # of which the engine makes this session
        nll: list[float] = []
        hits: list[bool] = []
        fed = forwards = 0
        positions = target_positions(windows)
        # windows that begin together are one request: of each the last targets are taken
        for window in merge_windows(windows):
            ids = window_inputs(tokens, window, prefix=prefix, prefix_token=prefix_token)
            try:
                found = prompt_losses(self._endpoint, self._served, how, [*ids, tokens[window.end - 1]])
            except Refused as refused:
                raise CaseInvalid(
                    f"the server at {self._endpoint.url} refuses to score {len(ids) + 1} tokens: {refused}"
                ) from None
            scored = found[-window.targets :]
            nll += [loss for loss, _ in scored]
            hits += [hit for _, hit in scored]
            fed, forwards = fed + len(ids), forwards + 1
            if progress is not None:
                progress(len(nll), len(positions), sum(nll) / len(nll))
        targets = [int(tokens[position]) for position in positions]
        effective = {"head": how, "batch_windows": 1, "batch_tokens": None, "logit_rows": None}
        return WindowScores(TokenScores(targets, positions, nll, hits), fed, forwards, effective)
