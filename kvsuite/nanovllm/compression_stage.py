"""When sequences are compressed, and who makes room for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kvsuite.errors import UserError

from .block_pool import PoolFullError
from .eviction import Eviction
from .request import Request, Status
from .scheduler import Scheduler


class CompressionStage:
    """Applies the runtime's policy, and choices made by hand, to the sequences of all layer groups.

    Parameters
    ----------
    evictions
        One per layer group.
    scheduler
        Preempts others where blocks are lacking.
    end
        Ends a request that the pool cannot hold even alone: with a status and a reason.
    """

    def __init__(
        self,
        evictions: Sequence[Eviction],
        scheduler: Scheduler,
        end: Callable[[Request, Status, str, Exception], None],
    ) -> None:
        self._evictions = evictions
        self._scheduler = scheduler
        self._end = end
        #: called with true and false around everything that the policy does to a sequence
        self.on_interval: Callable[[bool], None] | None = None
        self._has_policy = any(eviction.policy is not None for eviction in evictions)
        #: whether there is anything to do after a step: a policy, or requests that were compressed by hand
        self.active = self._has_policy

    @property
    def evicted(self) -> int:
        """Tokens removed so far, summed over layer groups."""
        return sum(eviction.evicted for eviction in self._evictions)

    def after_step(self, request: Request) -> None:
        """Do what is due now that ``request.computed`` tokens are stored: the policy, then what was once done by hand."""
        if self._has_policy and request.row >= 0 and request.computed >= request.prompt_length:
            if self.on_interval is not None:
                self.on_interval(True)
            self._apply_policy(request)
            if self.on_interval is not None:
                self.on_interval(False)
        for at, keep in request.compressions:
            # compressing one request may have preempted another
            if at == request.computed and request.row >= 0:
                self._select(request, keep)

    def by_hand(self, request: Request, keep_indices: Sequence[Tensor | None] | Tensor) -> None:
        """See `kvsuite.nanovllm.runtime.Runtime.compress`."""
        if request.row < 0:
            raise UserError(
                f"request {request.id}: status {request.status.value}; only a running one can be compressed"
            )
        if any(eviction.group.window is not None for eviction in self._evictions):
            raise UserError("compress: the blocks of a sliding window are freed by the window; leave it out")
        if self._has_policy and request.computed < request.prompt_length:
            raise UserError(f"request {request.id}: its prompt is not complete, and the policy has not seen it yet")
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
            self.active = True

    def fork(self, row: int, target: int) -> None:
        """Let a new sequence have the bookkeeping of another one."""
        for eviction in self._evictions:
            eviction.fork(row, target)

    def leave(self, row: int) -> None:
        """Forget a sequence whose blocks were given back."""
        for eviction in self._evictions:
            eviction.leave(row)

    def _apply_policy(self, request: Request) -> None:
        seen = request.computed
        prompt = seen == request.prompt_length
        for eviction in self._evictions:
            if eviction.policy is None:
                continue
            if prompt:
                eviction.enter(request.row)
            else:
                eviction.append(request.row, seen - 1)

            def act(eviction: Eviction = eviction) -> None:
                # before anything moves: `publish` must not see a request that is half compressed
                request.compressed |= eviction.act(request.row, seen, prompt=prompt)

            if not self._with_room(request, act):
                return

    def _select(self, request: Request, keep: Sequence[Tensor | None]) -> None:
        """Keep some of a request's stored tokens, group by group."""
        for eviction, own in zip(self._evictions, keep, strict=True):
            if own is None:
                continue

            def select(eviction: Eviction = eviction, own: Tensor = own) -> None:
                eviction.select(request.row, own)
                request.compressed = True

            if not self._with_room(request, select):
                return

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
