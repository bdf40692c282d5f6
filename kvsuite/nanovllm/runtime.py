"""The serving loop: requests in, tokens out, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, Literal

from torch import Tensor

from kvsuite.compression.base import Policy
from kvsuite.compression.merging import CacheShape, Merging, unmerged
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.image_reader import ImageReader
from kvsuite.models.images import image_places, image_shape, image_spans
from kvsuite.models.load import LoadedModel

from .admission import model_eos_token_ids, outgrown, problem, settle_ends
from .attention_layers import attention_layers, group_layers
from .block_table import tables_for
from .bound_partition import BoundPartition
from .compression_stage import CompressionStage, require_prompt_only
from .counters import Counters
from .decode_eviction import DecodeEviction
from .delivery import Delivery
from .green_contexts import SmPartition
from .groups import LayerGroup
from .kv_pool import KVPool, blocks_that_fit
from .layer_by_layer import require_layer_by_layer
from .limits import Limits
from .paged_attention import AttentionBackend
from .prompt_lane import LaneStep, LaneStreams, PromptLane, TwoStreams
from .prompt_observer import PromptObserver
from .reference_attention import KeyRotation, ReferenceAttention
from .request import Request, Status
from .runner import ModelRunner, Runner
from .sampling import SamplingParameters
from .scheduler import Scheduler, StepPlan
from .sequence_rotary import passes_switch, recomputing_switch, sequence_rotary
from .stage_streams import aside_of
from .steered import Steered, require_steerable
from .steering import Controller
from .step_inputs import StepInputs
from .step_launcher import OnRows, StepLauncher, still_wanted
from .turns import Turns

BackendFactory = Callable[[Sequence[KVPool]], AttentionBackend]
RunnerFactory = Callable[[LoadedModel, Sequence[KVPool], Limits], Runner]
Stage = Literal["sync", "async"]
OnLogits = Callable[[Sequence[Request], Tensor], None]


class Runtime:
    """Serves requests on one model. From construction to `close` the model belongs to the runtime.

    Parameters
    ----------
    loaded
        The model, with weights in any format that computes.
    limits
        Lengths, sequences, tokens, blocks.
    policy
        What stays in the cache: it acts at the end of a prompt and after every further token.
    rotation
        Re-rotates keys; needed where the policy's positions are ``cache`` (`kvsuite.engines.rotary.Rotary`).
    backend
        Builds the attention over the pools; the exact reference if left out.
    runner
        Builds what runs a step, attention included, in the place of ``backend``: captured decode steps, say.
    overlap
        Whether a step is launched before the host has seen the tokens of the one before, which are then delivered while the
        device computes. The tokens are the same; a request that a stop token ends has one more computed, for nothing.
        Left out: on CUDA.
    stage
        Where prompts are compressed: ``sync``, between two steps, or ``async``, beside them on a stream of its own (on a CPU at
        once, with the same order of books). With two lanes that is the stream of the prompts for both. The tokens are the same.
    lanes
        2: prompts of some requests are computed on a stream of their own beside the decoding of others, and handed over with
        their first token. On a CPU both take turns. The tokens are the same.
    partition
        With two lanes, streams with SMs of their own. It has to outlive the runtime.
    prompt_layers
        With two lanes, layers of a prompt that the host launches between two looks at the decoding; ``None``: a thread
        launches them as the interpreter lets it.
    controller
        Decides at steps with prompts whether and how they are compressed (`kvsuite.nanovllm.steering`); needs a policy and
        ``stage="async"``.
    partitions
        With a controller that parts the SMs, a partition for every share of the prompt lane that it may choose
        (`kvsuite.nanovllm.partition_ladder`). They have to outlive the runtime.
    layers_per_step
        Layers of a prompt that a policy that merges does after each token that follows, FastCache's decode pipeline: the full
        prompt is read until all of them are done. ``None``: all at the end of the prompt. A controller chooses it itself.
    eos_token_ids
        Tokens that end a text; the model's own if left out.

    Raises
    ------
    UserError
        If the pool does not hold a block, or the device has no room for it.
    CaseInvalid
        If the model, or the policy on it, is nothing for paged attention.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limits: Limits,
        *,
        policy: Policy | None = None,
        rotation: KeyRotation | None = None,
        backend: BackendFactory | None = None,
        runner: RunnerFactory | None = None,
        overlap: bool | None = None,
        stage: Stage = "sync",
        lanes: int = 1,
        partition: TwoStreams | None = None,
        prompt_layers: int | None = 4,
        controller: Controller | None = None,
        partitions: Mapping[float, SmPartition] | None = None,
        layers_per_step: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        if stage not in ("sync", "async"):
            raise UserError(f"stage={stage}: unknown; use sync or async")
        if stage == "async":
            require_prompt_only(policy)
        _require_lanes(lanes, partition, prompt_layers, policy)
        require_layer_by_layer(layers_per_step, policy)
        if controller is not None:
            facts: Any = {"has_policy": policy is not None, "is_async": stage == "async", "lanes": lanes}
            require_steerable(controller, **facts, shares=partitions or ())
        self.limits = limits
        self.policy = policy
        self.stage = stage
        self.device = loaded.device
        #: 1, or 2: prompts beside decoding
        self.lanes = lanes
        self._streams = LaneStreams(self.device, partition) if lanes == 2 else None
        layers = attention_layers(loaded.model, loaded.text_config)
        self.groups = group_layers(layers, limits, policy)
        if any(group.places for group in self.groups):
            if rotation is None:
                raise CaseInvalid("positions=cache: the runtime was given nothing to rotate keys with")
            rotation.table(limits.max_model_len + 1)
        _prepare_merging(policy, loaded, self.groups, len(layers), limits)
        blocks = blocks_that_fit(limits, self.groups, self.device, loaded.dtype)
        shape = {"num_blocks": blocks, "block_size": limits.block_size}
        self.pools = [KVPool(group, **shape, device=self.device, dtype=loaded.dtype) for group in self.groups]
        self.tables = [tables_for(group, limits, blocks) for group in self.groups]
        self.rotary = sequence_rotary(loaded.model, limits.max_model_len)
        self._switch = recomputing_switch(loaded.model)
        acted = [group.compressed for group in self.groups]
        scheduled: Any = {"policy": policy, "compressed": acted, "lanes": lanes}
        self.scheduler = Scheduler(limits, self.tables, rotary=self.rotary, **scheduled)
        with self._decoding():
            if runner is None:
                made = ReferenceAttention(self.pools, rotation) if backend is None else backend(self.pools)
                self.runner: Runner = ModelRunner(loaded, made)
            else:
                self.runner = runner(loaded, self.pools, limits)
        self.counters = Counters()
        #: sees the logits ``[R, vocab]`` of every step with the requests they belong to
        self.on_logits: OnLogits | None = None
        #: sees the last hidden states ``[rows, hidden]`` of scored tokens (`Runner.hidden`); a resumed request's come again
        self.on_rows: OnRows | None = None
        #: told about every step of a lane when the host is done with it, with two lanes
        self.on_lane_step: Callable[[LaneStep], None] | None = None
        self.vocab_size = int(loaded.text_config.vocab_size)
        #: what the model makes of an image, or why it can be given none
        self.image_shape = image_shape(loaded.model.config.to_dict())
        self._images = None if isinstance(self.image_shape, str) else ImageReader(loaded.model)
        observer = None
        if policy is not None and policy.needs.prompt:
            if limits.prefix_caching and policy.needs.looks_at_queries:
                self.runner.close()
                raise CaseInvalid(
                    f"policy {policy.name}: it looks at the queries of a prompt, and those of a prefix that is found in the "
                    "cache are not computed again; leave prefix caching off"
                )
            observer = PromptObserver(policy.needs, self.pools, rotation, limits.max_model_len)
        evictions = [
            DecodeEviction(policy, *parts, observer=observer)
            for parts in zip(self.groups, self.tables, self.pools, strict=True)
        ]
        self._launcher = self._launcher_of(self.runner, evictions)
        # with two lanes prompts are compressed on their own lane, and what follows them beside the lane that decodes
        aside = aside_of(self.device) if stage == "async" and (lanes == 1 or isinstance(policy, Merging)) else None
        staged: Any = {"prompts_aside": lanes == 1}
        self.compression = CompressionStage(evictions, self.scheduler, self._end, aside, **staged)
        self.compression.layers_per_step = layers_per_step
        if aside is not None:
            for table in self.tables:
                table.fence_of = self.compression.fence_of
        self.scheduler.on_release = self.compression.leave
        self.scheduler.expects_spared = self.compression.expects_spared
        self.scheduler.expects_merged_after = self.compression.merged_after
        self._eos = frozenset(model_eos_token_ids(loaded) if eos_token_ids is None else eos_token_ids)
        self._ids = count()
        self._requests: dict[str, Request] = {}
        self._ended: list[Request] = []
        self._late: list[Request] = []
        self._delivery = Delivery(self.scheduler, self.counters, self._end)
        self._prompts: PromptLane | None = None
        if self._streams is None:
            self.runner.observer = observer
        else:
            try:
                self._prompts = self._prompt_lane(self._streams, Turns(prompt_layers, self.device), evictions, observer)
            except BaseException:
                self.runner.close()
                raise
        #: decides how prompts are compressed, and logs it
        self.controller = controller
        self._steered: Steered | None = None
        self._partition = BoundPartition(partitions or {}, self._streams, self.runner)
        if controller is not None:
            try:
                self._partition.prepare()
            except BaseException:
                self._close_lanes()
                raise
            self._steer(controller)
        if self.rotary is not None:
            self.rotary.install()
        #: whether a step is launched before the tokens of the one before are here
        self.overlap = self.device.type == "cuda" if overlap is None else overlap

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can own, in every layer group."""
        return self.tables[0].pool.num_blocks

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pools, scratch blocks included."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def waited_s(self) -> float:
        """Seconds that the host waited for tokens so far."""
        return self._delivery.waited_s + (0.0 if self._prompts is None else self._prompts.waited_s)

    @property
    def unfinished(self) -> int:
        """Requests that are not over."""
        return len(self._requests)

    def add(self, request: Request) -> Request:
        """Queue a request. One that cannot be served is over at once: status ``FAILED``, with the reason."""
        if request.id is None:
            request.id = f"request-{next(self._ids)}"
        if request.status is not Status.WAITING or self._requests.get(request.id) is request:
            raise UserError(f"request {request.id}: it was added before; make a new one")
        blocks = self.num_blocks if all(group.window is None for group in self.groups) else None
        if self.lanes == 2 and request.scored:
            raise UserError(f"request {request.id}: tokens are scored on one lane; make the runtime with lanes=1")
        facts: Any = {"vocab_size": self.vocab_size, "taken": self._requests, "has_policy": self.policy is not None}
        facts["images"] = self.image_shape
        reason = problem(request, self.limits, num_blocks=blocks, **facts)
        if reason is None and request.forced is None and not request.scored:
            fed = min(request.sampling.max_new_tokens, self.limits.max_model_len - request.prompt_length)
            reason = passes_switch(self._switch, request.prompt_length, fed)
        if reason is None and request.images:
            request.image_places = image_places(self.image_shape, request.tokens)
            request.image_spans = image_spans(self.image_shape, request.image_places)
            if isinstance(self.policy, Merging):
                reason = self.policy.images_problem(request.prompt_length, request.image_spans)
        if reason:
            self._end(request, Status.FAILED, reason)
            return request
        self._requests[request.id] = request
        settle_ends(request, self.limits, self._eos)
        self.counters.logical_prompt_tokens += request.prompt_length
        self.scheduler.add(request)
        return request

    def run(self, requests: Iterable[Request] = ()) -> list[Request]:
        """Add requests, step until nothing is left to do, and return them."""
        added = [self.add(request) for request in requests]
        while self.unfinished:
            self.step()
        self.refuse_vectors()
        return added

    def refuse_vectors(self) -> None:
        """Refuse what was stored since the last call and has no number in the cache format; waits for the device.

        Raises
        ------
        CaseInvalid
            If a key or a value was not finite, or larger than a scale reaches.
        """
        for pool in self.pools:
            pool.refuse_vectors()

    def cancel(self, request: Request) -> None:
        """End a request now; nothing happens to one that is over. Callbacks may call this."""
        if not request.status.over:
            self._end(request, Status.CANCELLED, "cancelled")

    def fork(self, request: Request, sampling: SamplingParameters | None = None) -> Request:
        """A second request that goes on from where a running one stands, sharing its blocks until one of them writes.

        Raises
        ------
        UserError
            If the request does not run, or ``max_num_seqs`` requests run already.
        """
        self._settle()
        if request.row < 0:
            status = request.status.value
            raise UserError(f"request {request.id}: status {status}; only a running request can be forked")
        if request.pending < 1:
            raise UserError(f"request {request.id}: it is about to get a token; fork it between two steps")
        if len(self.scheduler.running) == self.limits.max_num_seqs:
            raise UserError(f"max_num_seqs={self.limits.max_num_seqs}: no room for a fork; raise it")
        child = request.branch(f"request-{next(self._ids)}", sampling or request.sampling)
        settle_ends(child, self.limits, self._eos)
        self._requests[child.id or ""] = child
        self.scheduler.take_row(child)
        for table in self.tables:
            table.fork(request.row, child.row)
        self.compression.fork(request, child)
        self.counters.logical_prompt_tokens += child.prompt_length
        return child

    def compress(self, request: Request, keep_indices: Sequence[Tensor | None] | Tensor) -> None:
        """Keep only some of a running request's stored tokens; its logical positions go on.

        Parameters
        ----------
        request
            A running request, between two steps.
        keep_indices
            For each layer group which of its stored tokens stay, int64 ``[k]`` or ``[layers, kv_heads, k]`` in time
            order, ``None`` for all; or one list for all groups.

        Raises
        ------
        UserError
            If the request does not run, a group has a sliding window, or an index is out of range.
        """
        self._settle()
        with self._decoding():
            self.compression.by_hand(request, keep_indices)
        self._count()

    def step(self) -> list[Request]:
        """Compute one step and return the requests that it ended.

        Raises
        ------
        Exception
            What the model raised. The requests of that step have failed then, the others can go on.
        """
        self._ended, self._late = self._late, []
        if self._prompts is None:
            plan = self.scheduler.plan()
        else:
            begun = self._prompts.advance()
            self._drop_misfits(begun)
            plan = self.scheduler.plan_decodes()
        self._count()
        self._drop_misfits(plan)
        if plan.requests:
            with self._decoding():
                self._step(plan)
        else:
            self._delivery.land()
            if self._prompts is not None:
                # nobody decodes: nothing is late while the host waits
                self._prompts.settle()
        self._count()
        return self._ended

    def close(self) -> None:
        """End all requests and give the model back."""
        for request in list(self._requests.values()):
            self.cancel(request)
        self._delivery.flight = None
        # the pool's memory is somebody else's afterwards
        self.compression.join()
        self._close_lanes()
        if self.rotary is not None:
            self.rotary.close()

    def _step(self, plan: StepPlan) -> None:
        """Launch a step of the decode lane, or of the only one, and deliver the one before."""
        began = time.perf_counter()
        try:
            if self._steered is not None:
                self._steered.planned(plan)
            self.compression.follow(plan.requests)
            flight, logits = self._launcher.launch(plan, self._delivery.flight, self.on_rows)
            self._launcher.commit(plan)
            while self._prompts is not None and self._prompts.launching and not self._delivery.arrived:
                # the host would wait for tokens
                self._prompts.turn()
            self._delivery.land()
            if flight is not None and self.on_logits:
                self.on_logits(*still_wanted(flight, logits))
        except Exception as error:
            self._delivery.fail(plan.requests, error)
            raise
        self._finish(plan)
        if flight is not None:
            self._delivery.take_off(flight)
        if not self.overlap:
            self._delivery.land()
        if self._prompts is not None:
            self._lane_step(LaneStep("decode", began, time.perf_counter(), 0, sum(plan.counts)))

    def _prompt_lane(
        self, streams: LaneStreams, turns: Turns, evictions: Sequence[DecodeEviction], observer: PromptObserver | None
    ) -> PromptLane:
        try:
            with streams.prompt():
                runner = self.runner.beside(turns)
        except BaseException:
            turns.close()
            raise
        runner.observer = observer
        lane = PromptLane(
            self.scheduler,
            self._launcher_of(runner, evictions, keeps_tables=False),
            Delivery(self.scheduler, self.counters, self._end),
            streams=streams,
            turns=turns,
            budget=self.limits.max_num_batched_tokens,
            finish=self._finish,
            on_logits=lambda requests, logits: self.on_logits(requests, logits) if self.on_logits else None,
            on_step=self._lane_step,
        )
        for table in self.tables:
            table.fence_of = lambda row: lane.fence_of(row) or self.compression.fence_of(row)
        # pools, tables and weights were made on other streams
        streams.join()
        return lane

    def _launcher_of(
        self, runner: Runner, evictions: Sequence[DecodeEviction], *, keeps_tables: bool = True
    ) -> StepLauncher:
        given: Any = {"spans": self.rotary is not None, "keeps_tables": keeps_tables, "images": self._images}
        inputs = StepInputs(self.groups, self.tables, evictions, self.device, **given)
        return StepLauncher(runner, inputs, self.pools, self.tables, self.counters)

    def _decoding(self) -> AbstractContextManager[Any]:
        """What is launched inside belongs to the decode lane."""
        return nullcontext() if self._streams is None else self._streams.decode()

    def _lane_step(self, step: LaneStep) -> None:
        if self.on_lane_step is not None:
            self.on_lane_step(step)

    def _drop_misfits(self, plan: StepPlan | None) -> None:
        for request in plan.misfits if plan is not None else ():
            self._end(request, Status.FAILED, outgrown(request, self.limits, self.num_blocks))

    def restart_controller(self) -> None:
        """Let the controller begin anew, as at the first step: what follows is a run of its own."""
        if self.controller is not None:
            self._partition.bind(None)
            self._steer(self.controller.renewed())

    def _steer(self, controller: Controller) -> None:
        self.controller = controller
        facts: Any = {"lengths": self.tables[0].lengths, "device": self.device, "has_lanes": self.lanes == 2}
        self._steered = Steered(controller, self.compression, bind=self._partition.bind, **facts)
        self._launcher.watch = self._steered
        if self._prompts is not None:
            self._prompts.steer(self._steered)

    def _close_lanes(self) -> None:
        if self._prompts is not None:
            self._prompts.close()
        if self._streams is not None:
            self._streams.join()
        self.runner.close()

    def _settle(self) -> None:
        """Let the books be complete between two steps; requests that this ends are returned by the next step."""
        before, self._ended = self._ended, []
        self._delivery.land()
        if self._prompts is not None:
            self._prompts.settle()
        self._late += self._ended
        self._ended = before

    def _finish(self, plan: StepPlan) -> None:
        """Make full blocks findable and compress, now that the tokens in them are known."""
        size, publishes = self.limits.block_size, self.scheduler.publishes
        for request, fed in zip(plan.requests, plan.counts, strict=True):
            if request.status.over:
                self.counters.discarded_tokens += fed
            elif publishes and request.computed // size > request.published and request.row >= 0:
                self.scheduler.publish(request)
            if request.scored and request.computed == request.prompt_length:
                self._end(request, Status.FINISHED, "scored")
        if self.compression.active:
            self.compression.after_step(plan.requests)

    def _end(self, request: Request, status: Status, reason: str, error: Exception | None = None) -> None:
        if request.status.over:
            return
        if request.in_flight:
            request.tokens.pop()
            request.in_flight = False
        self.scheduler.remove(request)
        request.status, request.reason, request.error = status, reason, error
        request.features = None
        self._ended.append(request)
        # a refused request may bear the name of one that still runs
        if self._requests.get(request.id or "") is request:
            del self._requests[request.id or ""]

    def _count(self) -> None:
        """Take over what scheduler and evictions count themselves."""
        self.counters.preemptions = self.scheduler.preemptions
        self.counters.prefix_hit_tokens = self.scheduler.prefix_hits
        self.counters.resumed_hit_tokens = self.scheduler.resumed_hits
        self.counters.evicted_tokens = self.compression.evicted


def _require_lanes(lanes: int, partition: TwoStreams | None, prompt_layers: int | None, policy: Policy | None) -> None:
    if lanes not in (1, 2):
        raise UserError(f"lanes={lanes}: unknown; use 1, or 2 for prompts beside decoding")
    if prompt_layers is not None and prompt_layers < 1:
        raise UserError(f"prompt_layers={prompt_layers}: at least 1, or None for a thread that is not held up")
    if partition is not None and lanes == 1:
        raise UserError("partition: the SMs are parted between two lanes; use lanes=2")
    if lanes == 2 and policy is not None and policy.acts == "decode":
        raise CaseInvalid(
            f"policy {policy.name}: it acts after every token too, and what it keeps is decided on one lane; use lanes=1, or "
            "give the policy a factor, by which it acts at the end of the prompt alone"
        )


def _prepare_merging(
    policy: Policy | None, loaded: LoadedModel, groups: Sequence[LayerGroup], layers: int, limits: Limits
) -> None:
    if not isinstance(policy, Merging):
        return
    if limits.cache_format is not None:
        raise CaseInvalid(unmerged(f"--kv-cache-dtype={limits.cache_format}", policy))
    policy.prepare(
        CacheShape(
            model=loaded.spec.label,
            revision=loaded.spec.revision,
            layers=layers,
            head_dims=frozenset(group.head_dim for group in groups if group.compressed),
            device=loaded.device,
            dtype=loaded.dtype,
        )
    )
