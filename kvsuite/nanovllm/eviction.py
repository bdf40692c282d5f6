"""Applies a policy to the blocks of sequences: at the end of the prompt, and after every further token if it acts then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kvsuite.compression.base import CacheView, ImageSpans, Policy
from kvsuite.compression.merging import Merging
from kvsuite.compression.prompt_view import PromptObservation, PromptView
from kvsuite.errors import UserError

from .block_table import BlockTables, Ints
from .groups import LayerGroup
from .kv_pool import KVPool
from .prompt_observer import PromptObserver
from .stage_streams import Work

# what a policy looks at of several layers at once, in bytes of float32
_LOOK_BYTES = 1 << 28


@dataclass
class Stored:
    """What is known of a sequence's stored tokens in one group, in the order of its table.

    Parameters
    ----------
    positions
        Logical positions, int64 ``[n]``, or ``[layers, kv_heads, n]`` where heads keep different tokens.
    scores
        What the policy's `token_score` gave, ``[layers, kv_heads, n]``; ``None`` for a policy without.
    done
        Whether anything was removed yet.
    ordered
        Whether the table still has the order of time.
    """

    positions: Tensor
    scores: Tensor | None = None
    done: bool = False
    ordered: bool = True


@dataclass(frozen=True, kw_only=True)
class _PooledPrompt(PromptView):
    """A prompt whose values are copied from the pool when a policy asks for them."""

    values: Tensor = field(init=False)
    gather_values: Callable[[], Tensor]

    def __getattr__(self, name: str) -> Tensor:
        if name != "values":
            raise AttributeError(name)
        values = self.gather_values()
        object.__setattr__(self, "values", values)
        return values


class Eviction:
    """One layer group's tokens under a policy.

    A sequence has a book as long as something may be decided for it: from `enter` on, until `act` decides the last time or
    the sequence goes (`leave`). A policy that acts at the end of the prompt alone needs none (`complete`).

    Work on keys and values is separate from the tables: what changes them gives the `Work` to be done then, on whatever
    stream, before anybody reads the sequence. On CUDA it does not wait for the device.

    Parameters
    ----------
    policy
        ``None`` for groups that are only compressed by hand.
    group, tables, pool
        The group, its block tables, its keys and values.
    observer
        Has the queries of prompts, for a policy that looks at a prompt.
    """

    def __init__(
        self,
        policy: Policy | None,
        group: LayerGroup,
        tables: BlockTables,
        pool: KVPool,
        observer: PromptObserver | None = None,
    ) -> None:
        self.policy = policy if group.compressed else None
        self.group = group
        self._tables = tables
        self._pool = pool
        self._observer = observer
        self._device = pool.device
        self._per_head = self.policy is not None and not self.policy.shared_across_heads
        self._layers = torch.tensor(group.layers, device=self._device)[:, None]
        self._heads = torch.arange(group.kv_heads, device=self._device)
        self._books: dict[int, Stored] = {}
        self.evicted = 0

    def follows(self, row: int) -> bool:
        """Whether more may be decided for a sequence."""
        return row in self._books

    def complete(self, row: int, images: ImageSpans = ()) -> Work | None:
        """Let a policy that acts at the end of the prompt alone act on a complete one; ``None`` if everything stays.

        ``images`` says where its image tokens stand.

        Raises
        ------
        PoolFullError
            If the kept tokens have no room; nothing has changed then.
        """
        assert self.policy is not None
        policy, length = self.policy, int(self._tables.lengths[row])
        due = policy.due(step=length, done=False, prompt=True)
        size = policy.size_of_prompt(length, images) if due else length
        if size == length:
            self._observations(row)
            return None
        if isinstance(policy, Merging):
            return self._merge(policy, row, size, images)
        if not (policy.needs.prompt or self._per_head):
            # positions alone decide, here and now
            chosen = policy.keep(CacheView(torch.arange(length), length - 1, step=length))
            return self._replace(row, size)(chosen)
        take = self._replace(row, size)
        observed = self._observations(row)

        def keep(slots: Tensor) -> Tensor:
            return self._keep_of_prompt(slots, observed) if policy.needs.prompt else self._keep_by_score(slots)

        return take(keep)

    def enter(self, row: int) -> None:
        """Begin the book of a sequence whose first tokens are stored and complete."""
        length = int(self._tables.lengths[row])
        if self.policy is None:
            return
        if not self._per_head:
            self._books[row] = Stored(torch.arange(length))
            return
        positions = torch.arange(length, device=self._device)
        self._books[row] = Stored(
            positions.expand(len(self.group.layers), self.group.kv_heads, length).clone(),
            self._scores(self._slots(row)),
        )

    def append(self, row: int, position: int) -> None:
        """Note the tokens up to ``position``, which is the last in the table: several where known output was fed at once."""
        stored = self._books.get(row)
        if stored is None:
            return
        count = int(self._tables.lengths[row]) - stored.positions.shape[-1]
        new = torch.arange(position - count + 1, position + 1, device=stored.positions.device)
        stored.positions = torch.cat([stored.positions, new.expand(*stored.positions.shape[:-1], count)], dim=-1)
        if stored.scores is not None:
            score = self._scores(self._slots(row)[-count:])
            assert score is not None
            stored.scores = torch.cat([stored.scores, score], dim=-1)

    def act(self, row: int, seen: int, *, prompt: bool) -> bool:
        """Let the policy act after ``seen`` tokens; return whether it removed any.

        Raises
        ------
        PoolFullError
            If a shared block has to be copied and none is free. Acting again later gives what it would have given.
        """
        stored = self._books.get(row)
        if stored is None or self.policy is None:
            return False
        length = int(self._tables.lengths[row])
        due = self.policy.due(step=seen, done=stored.done, prompt=prompt)
        size = self.policy.size_after(length) if due else length
        if size == length:
            return False
        if self.policy.needs.prompt and prompt:
            observed = self._observer_of_prompts.observations(row, self.group.layers)
            keep = self._keep_of_prompt(self._slots(row), observed)
            self.select(row, keep)()
        else:
            view = CacheView(
                stored.positions,
                seen - 1,
                stored.scores,
                layer=self._layers if self._per_head else 0,
                heads=self._heads if self._per_head else 0,
                step=seen,
            )
            if size == length - 1 and not prompt:
                self._evict_one(row, stored, self.policy.victim(view))
            else:
                self.select(row, self.policy.keep(view))()
                stored.ordered = True
        stored.done = True
        if self.policy.settled(done=True) and (stored.ordered or not self.group.places):
            del self._books[row]
        return True

    def require_indices(self, row: int, keep: Tensor) -> None:
        """Check what a caller wants to keep.

        Raises
        ------
        UserError
            If an index is not that of a stored token, or there is none.
        """
        length, kept = int(self._tables.lengths[row]), int(keep.shape[-1])
        if kept < 1 or bool((keep < 0).any()) or bool((keep >= length).any()):
            raise UserError(f"keep_indices of {kept} tokens: at least one of the tokens 0 to {length - 1} has to stay")

    def select(self, row: int, keep: Tensor) -> Work:
        """Keep the stored tokens ``keep``, int64 ``[k]`` or ``[layers, kv_heads, k]``, and free what the others held.

        The kept ones move to blocks that no other sequence holds and that no prefix finds, by the work that is returned.

        Raises
        ------
        PoolFullError
            If there are no such blocks; nothing has changed then.
        """
        kept = int(keep.shape[-1])
        work = self._replace(row, kept)(keep)
        stored = self._books.get(row)
        if stored is not None:
            own = keep.to(stored.positions.device)
            stored.positions = stored.positions.gather(-1, own.expand(*stored.positions.shape[:-1], kept))
            if stored.scores is not None:
                stored.scores = stored.scores.gather(-1, own.expand(*stored.scores.shape[:-1], kept))
        return work

    def ranks(self, row: int, coming: int) -> Tensor | None:
        """Rank in time of the stored tokens and ``coming`` new ones behind them; ``None`` where they lie in that order."""
        stored = self._books.get(row)
        if stored is None or not stored.done:
            return None
        positions, length = stored.positions.to(self._device), stored.positions.shape[-1]
        ranks = positions.argsort(dim=-1).argsort(dim=-1)
        new = torch.arange(length, length + coming, device=self._device)
        return torch.cat([ranks, new.expand(*ranks.shape[:-1], coming)], dim=-1)

    def positions(self, row: int) -> Tensor | None:
        """Logical positions of the stored tokens in the order of the table; ``None`` where nothing is kept of them."""
        stored = self._books.get(row)
        return None if stored is None else stored.positions

    def fork(self, row: int, target: int) -> None:
        """Begin the bookkeeping of a sequence that holds what another one does."""
        stored = self._books.get(row)
        if stored is not None:
            # tensors are replaced or cloned before they are written, so both may refer to the same ones
            self._books[target] = replace(stored)

    def leave(self, row: int) -> None:
        """Forget a sequence."""
        self._books.pop(row, None)
        if self._observer is not None:
            self._observer.leave(row)

    def _replace(self, row: int, size: int) -> Callable[[Tensor | Callable[[Tensor], Tensor]], Work]:
        """Give a sequence blocks for ``size`` of its tokens; what comes back turns a choice into the work of moving them.

        The choice is an index, or gives one from the slots ``[n]`` of all tokens once it is asked: then, not before.
        """
        before = self._tables.stored_slots(row)
        self._tables.replace(row, size)
        after = self._tables.stored_slots(row)
        self.evicted += len(before) - size

        def take(choice: Tensor | Callable[[Tensor], Tensor]) -> Work:
            def work() -> None:
                if isinstance(choice, Tensor) and choice.dim() == 1 and choice.device.type == "cpu":
                    source = self._upload(before[choice.numpy()])
                else:
                    slots = self._upload(before)
                    keep = choice.to(self._device) if isinstance(choice, Tensor) else choice(slots)
                    source = slots[keep]
                self._pool.keep(source, self._upload(after))

            return work

        return take

    def _merge(self, policy: Merging, row: int, size: int, images: ImageSpans) -> Work:
        """Give a sequence blocks for what a policy makes of its prompt; the work makes it."""
        before = self._tables.stored_slots(row)
        self._tables.replace(row, size)
        after = self._tables.stored_slots(row)
        self.evicted += len(before) - size

        def work() -> None:
            source, target = self._upload(before), self._upload(after)
            # a layer's vectors are all read before any is written: blocks may be the same
            for part in self._parts(len(before), together=True):
                own = self._pool.keys_of(source, part), self._pool.values_of(source, part)
                self._pool.put(target, part, *policy.merge(*own, self.group.layers[part], images))

        return work

    def _keep_of_prompt(self, slots: Tensor, observed: Sequence[PromptObservation]) -> Tensor:
        """What a policy that looks at a prompt keeps of one in ``slots``, ``[layers, kv_heads, k]``."""
        assert self.policy is not None
        observer, layers = self._observer_of_prompts, self.group.layers
        positions = torch.arange(slots.shape[0], device=self._device)
        kept = []
        asked = 0 if observed[0].last is None else self.policy.needs.queries * observed[0].last.shape[0]
        together = self.policy.heads_apart and len({one.scale for one in observed}) == 1
        for part in self._parts(slots.shape[0], asked, together=together):
            own = self._pool.keys_of(slots, part).flatten(0, 1)
            if self.group.places:
                own = observer.rotate(own[None], positions)[0]

            def values(part: slice = part) -> Tensor:
                return self._pool.values_of(slots, part).flatten(0, 1)

            view = _PooledPrompt(
                positions.expand(own.shape[:2]), own.shape[1] - 1, keys=own, gather_values=values,
                observed=PromptObservation.side_by_side(observed[part]), layer=layers[part.start], layers=observer.layers,
                rotate=observer.turn(layers[part.start]),
            )  # fmt: skip
            found = self.policy.keep(view)
            kept.append(found.expand(own.shape[0], -1).reshape(-1, self.group.kv_heads, found.shape[-1]))
        return torch.cat(kept)

    def _keep_by_score(self, slots: Tensor) -> Tensor:
        """What a policy that ranks by `Policy.token_score` keeps of a complete prompt, ``[layers, kv_heads, k]``."""
        assert self.policy is not None
        length = slots.shape[0]
        positions = torch.arange(length, device=self._device).expand(
            len(self.group.layers), self.group.kv_heads, length
        )
        scores = self._scores(slots)
        return self.policy.keep(
            CacheView(positions, length - 1, scores, layer=self._layers, heads=self._heads, step=length)
        )

    def _scores(self, slots: Tensor) -> Tensor | None:
        """`Policy.token_score` of the tokens in ``slots``, ``[layers, kv_heads, n]``, from keys alone."""
        assert self.policy is not None
        found = []
        for part in self._parts(slots.shape[0], together=True):
            score = self.policy.token_score(self._pool.keys_of(slots, part))
            if score is None:
                return None
            found.append(score)
        return torch.cat(found)

    def _parts(self, tokens: int, asked: int = 0, *, together: bool) -> list[slice]:
        """The group's layers: as many at once as `_LOOK_BYTES` allow, or one by one.

        Parameters
        ----------
        tokens
            Of a sequence.
        asked
            What is computed for each of them in a layer beside its keys, in numbers.
        together
            Whether several layers may be looked at together.
        """
        layers = len(self.group.layers)
        each = 4 * tokens * (self.group.kv_heads * self.group.head_dim + asked)
        step = max(1, _LOOK_BYTES // each) if together else 1
        return [slice(first, min(first + step, layers)) for first in range(0, layers, step)]

    @property
    def _observer_of_prompts(self) -> PromptObserver:
        assert self._observer is not None
        return self._observer

    def _observations(self, row: int) -> list[PromptObservation]:
        """What was gathered of a sequence's prompt in the layers of the group, which nobody asks for again."""
        return [] if self._observer is None else self._observer.take(row, self.group.layers)

    def _evict_one(self, row: int, stored: Stored, victim: Tensor) -> None:
        """Put the last token in the place of the victim, which may be another one for every head, and drop the last slot."""
        last, size = int(self._tables.lengths[row]) - 1, self._pool.block_size
        for index in np.unique(victim.cpu().numpy() // size).tolist():
            self._pool.copy_blocks(self._tables.own(row, index))
        slots = self._slots(row)
        self._pool.move(slots.to(victim.device)[victim], int(slots[last]))
        for name in ("positions", "scores"):
            book = getattr(stored, name)
            if book is not None:
                moved = book.scatter(-1, victim[..., None].to(book.device), book[..., last:])
                setattr(stored, name, moved[..., :last])
        stored.ordered = False
        self._tables.shrink(row, last)
        self.evicted += 1

    def _slots(self, row: int) -> Tensor:
        return self._upload(self._tables.stored_slots(row))

    def _upload(self, slots: Ints) -> Tensor:
        """Slots on the device. From pinned memory, which the host need not wait for."""
        found = torch.from_numpy(slots)
        return found.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else found
