"""When sequences are compressed, where, and who makes room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from kvsuite.compression.base import Policy
from kvsuite.errors import CaseInvalid, UserError

from .block_pool import PoolFullError
from .decode_eviction import Decided, DecodeEviction
from .fences import Fence
from .layer_by_layer import LayerByLayer, parts_of
from .request import Request, Status
from .scheduler import Scheduler
from .stage_streams import Aside, Work


def require_prompt_only(policy: Policy | None) -> None:
    """Refuse to compress beside the steps what is decided between them.

    Raises
    ------
    CaseInvalid
        If the policy acts after every token too.
    """
    if policy is not None and policy.acts == "decode":
        raise CaseInvalid(
            f"policy {policy.name}: it acts after every token too, between two steps, and stage=async compresses beside "
            "them; use stage=sync, or give the policy a factor, by which it acts at the end of the prompt alone"
        )


class CompressionStage:
    """Applies the runtime's policy, and choices made by hand, to the sequences of all layer groups.

    A prompt's tables change when its last chunk was launched; the work on keys and values follows, on the stream of the
    steps or aside. Aside it runs behind all that the steps were given so far. The first step that reads the sequence comes
    behind it (`follow`), and blocks that it still reads or writes are nobody else's before (`fence_of`).

    Parameters
    ----------
    evictions
        One per layer group.
    scheduler
        Preempts others where blocks are lacking.
    end
        Ends a request that the pool cannot hold even alone: with a status and a reason.
    aside
        Where the work is done; on the stream of the steps if left out.
    prompts_aside
        Whether that is so of what is done at the end of a prompt; else only of requests that the decode lane has.
    """

    def __init__(
        self,
        evictions: Sequence[DecodeEviction],
        scheduler: Scheduler,
        end: Callable[[Request, Status, str, Exception], None],
        aside: Aside | None = None,
        *,
        prompts_aside: bool = True,
    ) -> None:
        self._evictions = evictions
        self._scheduler = scheduler
        self._end = end
        self._aside = aside
        self._prompts_aside = prompts_aside
        #: layers that a policy that merges does after each token fed behind a prompt; ``None``: all at its end
        self.layers_per_step: int | None = None
        #: whether work is done aside, where there is such a place
        self.works_aside = True
        #: whether the policy leaves prompts that end now as they are
        self.spares: Callable[[], bool] = lambda: False
        #: work that tells somebody how long it took
        self.timed: Callable[[Work], Work] = lambda work: work
        #: wraps the work for a request, to time it for whoever serves
        self.measured: Callable[[Request, Work], Work] | None = None
        #: called with true and false around everything that the policy does to a sequence
        self.on_interval: Callable[[bool], None] | None = None
        self._policies = [eviction for eviction in evictions if eviction.policy is not None]
        self._prompts = [eviction.prompt for eviction in self._policies]
        self._can_be_steady = bool(self._policies) and all(eviction.can_be_steady for eviction in self._policies)
        # whether anything was ever chosen by hand: it is done again at its time, whatever the policy does
        self._by_hand = False
        # rows for which more may be decided, and what is under way aside
        self._open: set[int] = set()
        self._under_way: dict[int, Fence] = {}
        # prompts that are merged layer by layer, and what still reads them aside: steps need not come behind that
        self._merging: dict[int, LayerByLayer] = {}
        self._reading: dict[int, Fence] = {}
        # whether a prompt is spared and how many tokens behind it it is merged, once it is complete: for good
        self._decided: WeakKeyDictionary[Request, tuple[bool, int]] = WeakKeyDictionary()
        #: whether there is anything to do after a step: a policy, or requests that were compressed by hand
        self.active = bool(self._policies)

    @property
    def evicted(self) -> int:
        """Tokens removed so far, summed over layer groups."""
        return sum(eviction.evicted for eviction in self._evictions)

    def due(self, requests: Iterable[Request]) -> list[Request]:
        """Those of a step's requests for which there is something to do after it."""
        still = self._open
        # one walk, since a decode step has nothing for most
        return [
            request
            for request in requests
            if request.computed == request.prompt_length
            or request.row in still
            or request.row in self._merging
            or request.compressions
        ]

    def after_step(self, requests: Sequence[Request]) -> None:
        """Do what is due of a step's requests, now that ``request.computed`` tokens of each are stored.

        The policy acts first, on all that decode together, then what was once done by hand. What goes wrong costs the request
        that it is about.
        """
        requests = self.due(self._go_on(requests))
        # one walk, since for most of many there is nothing but the policy's part
        decoding, alone = [], []
        for request in requests:
            if request.computed == request.prompt_length or request.compressions or request.row in self._merging:
                alone.append(request)
            if request.row in self._open and request.computed != request.prompt_length and not request.spared:
                decoding.append(request)
        if decoding:
            self._noted(True)
            self._apply_together(decoding)
            self._noted(False)
        for request in alone:
            try:
                self._after_step_of(request)
            except Exception as error:
                self._fail(request, error)

    def _go_on(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Let the policy act on those of whom one token goes, as after the step before; the others."""
        if not self._can_be_steady or self._by_hand:
            return requests
        rows = np.array([request.row for request in requests], dtype=np.int64)
        steady = self._policies[0].steady(rows)
        for eviction in self._policies[1:]:
            steady &= eviction.steady(rows)
        rest: Sequence[Request] = ()
        if not steady.all():
            if not steady.any():
                return requests
            rest = [request for request, goes_on in zip(requests, steady.tolist(), strict=True) if not goes_on]
            requests = [request for request, goes_on in zip(requests, steady.tolist(), strict=True) if goes_on]
            rows = rows[steady]
        seen = np.array([request.computed for request in requests], dtype=np.int64)
        self._noted(True)
        for eviction in self._policies:
            eviction.go_on(rows, seen)
        self._noted(False)
        return rest

    def follow(self, requests: Iterable[Request]) -> None:
        """Let the step that is launched next, with these requests, come behind what is under way for them."""
        if not self._under_way:
            return
        for request in requests:
            fence = self._under_way.pop(request.row, None)
            if fence is not None:
                assert self._aside is not None
                self._aside.follow(fence)

    def join(self) -> None:
        """Let whatever comes next on the stream of the steps, freeing the pool included, come behind all work aside."""
        if self._aside is not None:
            self._aside.join()

    def fence_of(self, row: int) -> Fence | None:
        """What has to pass before the blocks that a row gives back are somebody else's."""
        # work aside comes in order: what changes the sequence behind what reads it
        return self._under_way.get(row, self._reading.get(row))

    def expects_spared(self, request: Request) -> bool:
        """Whether the policy leaves a request's prompt as it is, as far as is known."""
        decided = self._decided.get(request)
        return self.spares() if decided is None else decided[0]

    def merged_after(self, request: Request) -> int:
        """Tokens fed behind a prompt until what is merged of it takes its place: 0 where that is at its end.

        Of a request whose prompt was complete before what was decided then.
        """
        if (decided := self._decided.get(request)) is not None:
            return decided[1]
        images, length = request.image_spans, request.prompt_length
        policies = [eviction.policy for eviction in self._policies]
        if all(policy is None or policy.size_of_prompt(length, images) == length for policy in policies):
            return 0
        return self.steps_of_all_layers

    @property
    def steps_of_all_layers(self) -> int:
        """Tokens behind a prompt after which all of its layers are merged, 0 where that is at its end."""
        return 0 if self.layers_per_step is None else len(parts_of(self._prompts, self.layers_per_step))

    def by_hand(self, request: Request, keep_indices: Sequence[Tensor | None] | Tensor) -> None:
        """See `kvsuite.nanovllm.runtime.Runtime.compress`."""
        if request.row < 0:
            raise UserError(
                f"request {request.id}: status {request.status.value}; only a running one can be compressed"
            )
        if any(eviction.group.window is not None for eviction in self._evictions):
            raise UserError("compress: the blocks of a sliding window are freed by the window; leave it out")
        if self._policies and request.computed < request.prompt_length:
            raise UserError(f"request {request.id}: its prompt is not complete, and the policy has not seen it yet")
        if request.row in self._merging:
            raise UserError(
                f"request {request.id}: its prompt is being merged until {request.merged_after} tokens behind it are fed; "
                "compress it then"
            )
        if (later := max((at for at, _ in request.compressions), default=0)) > request.computed:
            raise UserError(
                f"request {request.id}: it was preempted and is computed again, {request.computed} of the {later} tokens "
                "behind which it was compressed; compress it when it is there"
            )
        groups = len(self._evictions)
        keep: list[Tensor | None] = [keep_indices] * groups if isinstance(keep_indices, Tensor) else list(keep_indices)
        if len(keep) != groups:
            raise UserError(f"keep_indices: {len(keep)} lists of indices for {groups} layer groups; give one for each")
        for eviction, own in zip(self._evictions, keep, strict=True):
            if own is not None:
                eviction.require_indices(request.row, own)
        self._select(request, keep)
        if request.row >= 0:
            request.compressions.append((request.computed, keep))
            self.active = self._by_hand = True

    def fork(self, request: Request, child: Request) -> None:
        """Let a new request have the bookkeeping of another one."""
        row, target = request.row, child.row
        if request in self._decided:
            self._decided[child] = self._decided[request]
        for eviction in self._evictions:
            eviction.fork(row, target)
        if row in self._open:
            self._open.add(target)
        if row in self._under_way:
            self._under_way[target] = self._under_way[row]
        if row in self._merging:
            self._merging[target] = self._merging[row].branch(child)
        if row in self._reading:
            self._reading[target] = self._reading[row]

    def leave(self, row: int) -> None:
        """Forget a sequence whose blocks were given back."""
        self._open.discard(row)
        self._under_way.pop(row, None)
        self._merging.pop(row, None)
        self._reading.pop(row, None)
        for eviction in self._evictions:
            eviction.leave(row)

    def _after_step_of(self, request: Request) -> None:
        """What concerns one request alone: the end of its prompt, and what was done by hand."""
        if self._policies and request.row >= 0 and request.computed == request.prompt_length:
            spared = self.expects_spared(request)
            after = 0 if spared else self.merged_after(request)
            self._decided[request] = spared, after
            self._scheduler.settle(request, spared=spared, merged_after=after)
            request.unmerged = bool(after)
            if after:
                self._merging[request.row] = LayerByLayer(request, parts_of(self._prompts, self._layers_of(after)))
            elif not request.spared:
                self._noted(True)
                self._apply_to_prompt(request)
                self._noted(False)
        elif request.row in self._merging:
            self._noted(True)
            self._merge_on(request, self._merging[request.row])
            self._noted(False)
        for at, keep in request.compressions:
            # compressing one request may have preempted another
            if at == request.computed and request.row >= 0:
                self._select(request, keep)

    def _layers_of(self, after: int) -> int:
        """Layers after each token, so that all of them are done after so many."""
        return self.layers_per_step or -(-sum(len(eviction.group.layers) for eviction in self._policies) // after)

    def _merge_on(self, request: Request, merging: LayerByLayer) -> None:
        """Begin the layers that are due behind a request's last token; behind the last ones, put what was made in the place."""
        fed = request.computed - request.prompt_length
        ends = fed >= request.merged_after
        for work in merging.due(len(merging.parts) if ends else fed):
            self._begin(request, work)
        if not ends:
            return
        for eviction in self._policies:

            def replace(eviction: DecodeEviction = eviction) -> Work:
                return eviction.prompt.replace_prompt(request, merging.of_group(eviction.prompt))

            if not self._work(request, replace):
                return
        request.unmerged = False
        del self._merging[request.row]
        self._reading.pop(request.row, None)
        self._scheduler.reserve_anew(request)

    def _begin(self, request: Request, work: Work) -> None:
        """Do work that only reads a request's keys and values: no step of it has to come behind."""
        work, aside = self._watched(request, work), self._aside_of(request)
        if aside is None:
            self.join()
            work()
            return
        fence = self._reading[request.row] = aside.fence()
        aside.submit(work, fence)

    def _watched(self, request: Request, work: Work) -> Work:
        work = self.timed(work)
        return work if self.measured is None else self.measured(request, work)

    def _aside_of(self, request: Request) -> Aside | None:
        """Where what is done to a request is done; ``None`` for the stream of the step that it follows."""
        return self._aside if self.works_aside and (self._prompts_aside or request.handed_over) else None

    def _noted(self, begins: bool) -> None:
        if self.on_interval is not None:
            self.on_interval(begins)

    def _fail(self, request: Request, error: Exception) -> None:
        self._end(request, Status.FAILED, f"compressing it failed: {type(error).__name__}: {error}", error)

    def _apply_to_prompt(self, request: Request) -> None:
        row, rows = request.row, np.array([request.row])
        for eviction in self._policies:
            assert eviction.policy is not None
            if eviction.policy.acts == "prompt":
                if not self._work(request, partial(eviction.prompt.complete, row, request.image_spans)):
                    return
                continue
            eviction.enter(row)
            for decided in eviction.decide(rows, np.array([request.computed]), prompt=True):
                if not self._change({row: request}, eviction, decided):
                    return
        self._note_open([request])

    def _apply_together(self, requests: Sequence[Request]) -> None:
        """Let the policy act on requests that decode; one by one where it cannot with all of them."""
        by_row = {request.row: request for request in requests}
        rows, seen = np.array(list(by_row)), np.array([request.computed for request in requests])
        try:
            # all decisions before the first change, so that they may be made again
            found = [(eviction, decided) for eviction in self._policies for decided in eviction.decide(rows, seen)]
        except Exception as error:
            if len(requests) == 1:
                self._fail(requests[0], error)
                return
            for request in requests:
                self._apply_together([request])
            return
        for eviction, decided in found:
            self._change(by_row, eviction, decided)
        # all of them were open
        if not all(eviction.follows(rows).all() for eviction in self._policies):
            self._note_open(requests)

    def _change(self, by_row: Mapping[int, Request], eviction: DecodeEviction, decided: Decided) -> bool:
        """Remove what was decided, where it can be; whether it all was. A request that it goes wrong for fails."""
        fits = True
        try:
            left = eviction.apply(decided)
        except Exception as error:
            # a choice that cannot be carried out is found before anything has changed
            if len(decided.rows) == 1:
                self._fail(by_row[int(decided.rows[0])], error)
                return False
            for at in range(len(decided.rows)):
                fits &= self._change(by_row, eviction, decided.one(at))
            return fits
        lacking = {row for row, _ in left}
        for row in decided.rows.tolist():
            request = by_row[row]
            if request.row == row and row not in lacking:
                request.compressed = True
        for row, change in left:
            request = by_row[row]
            # making room for one request may have preempted another
            if request.row != row:
                continue

            def act(request: Request = request, change: Callable[[], None] = change) -> None:
                change()
                request.compressed = True

            try:
                fits &= self._with_room(request, act)
            except Exception as error:
                self._fail(request, error)
                fits = False
        return fits

    def _note_open(self, requests: Sequence[Request]) -> None:
        """Note for which of the requests more may be decided."""
        rows = np.array([request.row for request in requests if request.row >= 0], dtype=np.int64)
        more = np.logical_or.reduce([eviction.follows(rows) for eviction in self._policies])
        self._open.difference_update(rows[~more].tolist())
        self._open.update(rows[more].tolist())

    def _select(self, request: Request, keep: Sequence[Tensor | None]) -> None:
        """Keep some of a request's stored tokens, group by group."""
        for eviction, own in zip(self._evictions, keep, strict=True):
            if own is None:
                continue

            def select(eviction: DecodeEviction = eviction, own: Tensor = own) -> Work:
                return eviction.select(request.row, own)

            if not self._work(request, select):
                return

    def _work(self, request: Request, change: Callable[[], Work | None]) -> bool:
        """Change a request's tables and do the work that comes of it; whether there was room."""
        aside = self._aside_of(request)
        if aside is None:
            # work aside may be at this very sequence, and all work moves tokens through one place of the pool
            self.join()
        fence = None if aside is None else aside.fence()
        found: list[Work] = []

        def act() -> None:
            work = change() if fence is None else self._fenced(request.row, fence, change)
            if work is not None:
                request.compressed = True
                found.append(work)

        fits = self._with_room(request, act)
        for work in [self._watched(request, one) for one in found]:
            if aside is None or fence is None:
                work()
            else:
                aside.submit(work, fence)
        return fits

    def _fenced(self, row: int, fence: Fence, change: Callable[[], Work | None]) -> Work | None:
        """Change a row's tables: blocks that it gives back wait for the fence of the work that comes of it, if any does."""
        before = self._under_way.get(row)
        self._under_way[row] = fence
        work = None
        try:
            work = change()
        finally:
            if work is None:
                del self._under_way[row]
                if before is not None:
                    self._under_way[row] = before
        return work

    def _with_room(self, request: Request, act: Callable[[], None]) -> bool:
        """Run ``act``, preempting others while blocks are lacking; a request that lacks them even alone fails."""
        while True:
            try:
                act()
                return True
            except PoolFullError as error:
                if not self._scheduler.preempt_for(request):
                    self._end(request, Status.FAILED, f"the pool has no room to compress it: {error}", error)
                    return False
