"""What a policy does to sequences after every token, and the books that it keeps for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvsuite.compression.base import CacheView, Policy
from kvsuite.compression.ranked import NormRule
from kvsuite.errors import UserError

from .block_table import BlockTables, Ints
from .eviction_rules import EvictionRules
from .groups import LayerGroup
from .known_positions import KnownPositions
from .kv_pool import KVPool
from .pages import has_kernels
from .prompt_eviction import PromptEviction
from .prompt_observer import PromptObserver
from .stage_streams import Work
from .token_notes import TokenNotes
from .uploads import upload

if TYPE_CHECKING:
    from .eviction_kernel import EvictionKernel

Bools = NDArray[np.bool_]


class Decided(NamedTuple):
    """What a policy decided for some sequences that store equally many tokens; nothing has changed yet.

    Parameters
    ----------
    rows
        The sequences.
    chosen
        Index of the one token that goes, int64 ``[S]`` or ``[S, layers, kv_heads]``; or of those that stay, with one more
        dimension. ``None`` where the kernel that evicts finds the one by the policy's rule.
    single
        Whether one token goes.
    """

    rows: Ints
    chosen: Tensor | None
    single: bool

    def one(self, at: int) -> Decided:
        """What was decided for the ``at``-th sequence."""
        own = slice(at, at + 1)
        return self._replace(rows=self.rows[own], chosen=None if self.chosen is None else self.chosen[own])


class DecodeEviction:
    """One layer group's sequences under a policy that goes on deciding behind the prompt.

    A sequence has a book as long as something may be decided for it: from `enter` on, until the policy acts the last time or
    the sequence goes (`leave`). What a policy knows of stored tokens lies beside them, by slot (`TokenNotes`), or on the host
    where one decision serves every head (`KnownPositions`), so that all sequences that a step decoded are looked at together
    (`decide`, `apply`). It is written down when somebody asks. A policy that acts at the end of the prompt alone needs none
    of it (`prompt`).

    Mostly one token goes of each sequence after every step, by a rule of the policy (`Policy.oldest_rule`,
    `RankedPolicy.norm_rule`), and lengths come back to what they were. A sequence for which that is so is `steady`: nothing
    is asked, and `go_on` does it for all of them. On CUDA that is one transfer of lengths and blocks, and one kernel.

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
        #: what the policy does at the end of a prompt
        self.prompt = PromptEviction(policy, group, tables, pool, observer)
        self.policy = self.prompt.policy
        self.group = group
        self._tables = tables
        self._pool = pool
        self._device = pool.device
        rows = len(tables.lengths)
        # tokens that are noted of a sequence, -1 where nothing is decided; tokens that it has seen; whether any was removed,
        # and out of time's order
        self._noted: Ints = np.full(rows, -1, dtype=np.int64)
        self._seen: Ints = np.zeros(rows, dtype=np.int64)
        self._done = np.zeros(rows, dtype=np.bool_)
        self._unordered = np.zeros(rows, dtype=np.bool_)
        self._notes: TokenNotes | None = None
        self._known: KnownPositions | None = None
        if self.policy is not None and self.policy.acts == "decode":
            if self.prompt.per_head:
                self._notes = pool.notes = TokenNotes(
                    layers=len(group.layers),
                    heads=group.kv_heads,
                    blocks=pool.num_blocks + 1,
                    block_size=pool.block_size,
                    scored=self.prompt.scores(torch.zeros(1, dtype=torch.int64, device=self._device)) is not None,
                    device=self._device,
                )
            else:
                self._known = KnownPositions(rows, tables.table.shape[1] * pool.block_size)
        # what evicts in the place of torch
        self._kernel: EvictionKernel | None = None
        if self.policy is not None and self.policy.acts == "decode" and has_kernels(pool.device) and not pool.is_packed:
            from .eviction_kernel import EvictionKernel

            by_slot = None if self._notes is None else self._notes.by_slot
            self._kernel = EvictionKernel(pool.keys, pool.values, by_slot, rows=rows, blocks=tables.table.shape[1])
        self._rules: EvictionRules | None = None
        #: whether sequences may be `steady`
        self.can_be_steady = False
        if self.policy is not None:
            rules = {"by_age": self._known is not None, "by_norm": self._kernel is not None}
            self._rules = EvictionRules(self.policy, **rules)
            self.can_be_steady = self._rules.always_due and self.policy.sequences_apart
        # tokens that a sequence stores when the next goes, the same for all that are steady, -1 for others; one row more, which
        # is that of requests without one
        self._length = 0
        self._full: Ints = np.full(rows + 1, -1, dtype=np.int64)
        self._offsets = torch.arange(pool.block_size, device=self._device)
        self._evicted = 0

    @property
    def evicted(self) -> int:
        """Tokens removed so far, at the end of prompts and behind."""
        return self.prompt.evicted + self._evicted

    def follows(self, rows: Ints) -> Bools:
        """Whether more may be decided for each of some sequences."""
        following: Bools = self._noted[rows] >= 0
        return following

    def enter(self, row: int) -> None:
        """Begin the book of a sequence whose first tokens are stored and complete."""
        if self.policy is None:
            return
        self._noted[row], self._done[row], self._unordered[row] = 0, False, False

    def steady(self, rows: Ints) -> Bools:
        """Of which sequences one token goes now, as after the step before; a row of -1 is none."""
        found: Bools = self._full[rows] == self._tables.lengths[rows]
        return found

    def go_on(self, rows: Ints, seen: Ints) -> None:
        """Evict a token of each of some `steady` sequences, which have seen so many tokens each."""
        length = self._length
        rule = self._rule(length)
        if self._known is not None and isinstance(rule, int):
            self._move(rows, length, self._known.turn(rule, rows, length - 1, seen - 1))
        elif self._kernel is not None and isinstance(rule, NormRule):
            self._kernel.evict_by_norm(length, self._blocks(rows, length), seen, rule)
        self._tables.drop_last(rows)
        self._evicted += len(rows)

    def decide(self, rows: Ints, seen: Ints, *, prompt: bool = False) -> list[Decided]:
        """What the policy decides now that the sequences, all different, have seen so many tokens each."""
        policy, rules = self.policy, self._rules
        if policy is None or rules is None:
            return []
        followed = self.follows(rows)
        if not followed.all():
            rows, seen = rows[followed], seen[followed]
        self._seen[rows] = seen
        if not rules.always_due:
            facts = list(zip(seen.tolist(), self._done[rows].tolist(), strict=True))
            due = {fact: policy.due(step=fact[0], done=fact[1], prompt=prompt) for fact in set(facts)}
            rows = rows[np.array([due[fact] for fact in facts], dtype=np.bool_)]
        lengths, found = self._tables.lengths[rows], []
        # those that store equally many tokens are decided for together
        for length in dict.fromkeys(lengths.tolist()):
            size = rules.size_after(length)
            if size == length:
                continue
            alike, single = lengths == length, size == length - 1 and not prompt
            some = rows if alike.all() else rows[alike]
            if single and policy.sequences_apart and (rule := rules.of(length)) is not None:
                found.append(Decided(some, self._oldest(rule, some, length), True))
                continue
            # all of them, or each alone
            for own in [some] if policy.sequences_apart else np.split(some, len(some)):
                if policy.needs.prompt and prompt:
                    [row] = own.tolist()
                    found.append(Decided(own, self.prompt.keep_observed(row)[None], False))
                    continue
                view = self._view(own, length)
                chosen = policy.victim(view) if single else policy.keep(view)
                found.append(Decided(own, chosen if len(own) > 1 else chosen[None], single))
        return found

    def apply(self, decided: Decided) -> list[tuple[int, Callable[[], None]]]:
        """Remove what goes of the sequences whose blocks are theirs alone, if that is one token; it cannot fail.

        Returns
        -------
        list
            The other sequences, and for each what removes its tokens. That raises `PoolFullError` where blocks are lacking,
            and may be done again then.
        """
        # making room in another group may have preempted some
        there = self._noted[decided.rows] >= 0
        rows, chosen, single = decided if there.all() else self._some(decided, there)
        if not single:
            assert chosen is not None
            return [(row, partial(self._cut, row, keep)) for row, keep in zip(rows.tolist(), chosen, strict=True)]
        sole = self._tables.sole[rows]
        if sole.all():
            if len(rows):
                self._evict_one(rows, chosen)
            return []
        if sole.any():
            self._evict_one(*self._some(decided._replace(rows=rows, chosen=chosen), sole)[:2])
        return [
            (int(rows[at]), partial(self._own_and_evict_one, *decided._replace(rows=rows, chosen=chosen).one(at)[:2]))
            for at in np.flatnonzero(~sole).tolist()
        ]

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
        if self.policy is not None and keep.dim() > 1 and self._noted[row] >= 0 and not self.prompt.per_head:
            raise UserError(
                f"keep_indices by head: policy {self.policy.name} goes on deciding for all heads at once; give one list"
            )

    def select(self, row: int, keep: Tensor) -> Work:
        """Keep the stored tokens ``keep``, int64 ``[k]`` or ``[layers, kv_heads, k]``, and free what the others held.

        The kept ones move to blocks that no other sequence holds and that no prefix finds, by the work that is returned.

        Raises
        ------
        PoolFullError
            If there are no such blocks; nothing has changed then.
        """
        kept = int(keep.shape[-1])
        if self._noted[row] >= 0:
            self._catch_up(np.array([row]))
        work = self.prompt.replace(row, kept)(keep)
        if self._noted[row] >= 0:
            if self._known is not None:
                self._known.keep(row, keep.cpu().numpy())
            self._noted[row], self._full[row] = kept, -1
        return work

    def places(self, rows: Ints, coming: Sequence[int]) -> list[Tensor | None]:
        """Rank in time of the stored tokens of each sequence, and of ``coming`` new ones behind them.

        ``None`` where they lie in that order.
        """
        found: list[Tensor | None] = [None] * len(rows)
        self._catch_up(rows[self.follows(rows)])
        alike: dict[tuple[int, int], list[int]] = {}
        for index in np.flatnonzero((self._noted[rows] >= 0) & self._done[rows]).tolist():
            alike.setdefault((int(self._noted[rows[index]]), coming[index]), []).append(index)
        for (length, count), some in alike.items():
            own = rows[some]
            positions, *_ = self._read(own, length)
            ranks = positions.argsort(dim=-1).argsort(dim=-1)
            new = torch.arange(length, length + count, device=self._device)
            places = torch.cat([ranks, new.expand(*ranks.shape[:-1], count)], dim=-1)
            for index, ranked in zip(some, places, strict=True):
                found[index] = ranked
        return found

    def fork(self, row: int, target: int) -> None:
        """Begin the bookkeeping of a sequence that holds what another one does."""
        for book in (self._noted, self._seen, self._done, self._unordered):
            book[target] = book[row]
        if self._known is not None:
            self._known.fork(row, target)
        self._full[row] = self._full[target] = -1

    def leave(self, row: int) -> None:
        """Forget a sequence."""
        self._noted[row] = self._full[row] = -1
        self.prompt.leave(row)

    def _catch_up(self, rows: Ints) -> None:
        """Note the stored tokens of sequences that are not, the last of which was the last that a sequence saw."""
        lengths = self._tables.lengths[rows]
        counts = lengths - self._noted[rows]
        if not counts.any():
            return
        owners, at, positions = rows, lengths - 1, self._seen[rows] - 1
        if (counts != 1).any():
            within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            owners, at = np.repeat(rows, counts), np.repeat(lengths - counts, counts) + within
            positions = np.repeat(self._seen[rows] - counts, counts) + within
        if self._known is not None:
            self._known.write(owners, at, positions)
        elif self._notes is not None:
            slots, noted = upload(self._device, self._tables.slots_at(owners, at), positions)
            self._notes.write(slots, noted, self.prompt.scores(slots) if self._notes.scored else None)
        self._noted[rows] = lengths

    def _read(self, rows: Ints, length: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Positions, scores, and tokens seen ``[S]`` of sequences that store ``length`` tokens, all noted, on the device."""
        seen = self._seen[rows]
        if self._known is not None:
            positions, steps = upload(self._device, self._known.read(rows, length), seen)
            return positions, None, steps
        assert self._notes is not None
        blocks, steps = upload(self._device, self._blocks(rows, length).astype(np.int64), seen)
        return *self._notes.read(blocks, length), steps

    def _rule(self, length: int) -> NormRule | int | None:
        """The rule by which one of ``length`` tokens goes."""
        assert self._rules is not None
        return self._rules.of(length)

    def _oldest(self, rule: NormRule | int, rows: Ints, length: int) -> Tensor | None:
        """What a rule of age evicts, which the host knows; ``None`` for one of norms, which the device finds out."""
        if self._known is None or isinstance(rule, NormRule):
            return None
        self._catch_up(rows)
        return torch.from_numpy(self._known.behind(rule, rows, length))

    def _view(self, rows: Ints, length: int) -> CacheView:
        """What a policy sees of sequences that store ``length`` tokens each: on the host where it has all that there is."""
        self._catch_up(rows)
        layers: Tensor | int = 0
        heads: Tensor | int = 0
        scores = None
        if self._known is not None:
            positions, steps = torch.from_numpy(self._known.read(rows, length)), torch.from_numpy(self._seen[rows])
        else:
            positions, scores, steps = self._read(rows, length)
            layers, heads = self.prompt.layers, self.prompt.heads
        if len(rows) == 1:
            step = int(self._seen[rows[0]])
            own = None if scores is None else scores[0]
            return CacheView(positions[0], step - 1, own, layer=layers, heads=heads, step=step)
        steps = steps.view(-1, *[1] * (positions.dim() - 2))
        return CacheView(positions, steps[..., None] - 1, scores, layer=layers, heads=heads, step=steps)

    def _own_and_evict_one(self, row: Ints, victim: Tensor | None) -> None:
        """`_evict_one` of a sequence whose blocks others may hold or find."""
        if victim is None:
            assert self.policy is not None
            victim = self.policy.victim(self._view(row, int(self._tables.lengths[row[0]])))[None]
        for index in np.unique(victim.cpu().numpy() // self._pool.block_size).tolist():
            self._pool.copy_blocks(self._tables.own(int(row[0]), index))
        self._tables.note_sole(int(row[0]))
        self._evict_one(row, victim)

    def _evict_one(self, rows: Ints, victim: Tensor | None) -> None:
        """Put the last token in the place of the victim, which may be another one for every head, and drop the last slot.

        The sequences store equally many tokens. The victims lie in blocks that may be written.
        """
        length = int(self._tables.lengths[rows[0]])
        if self._known is not None:
            assert victim is not None
            gone = victim.numpy()
            if ((gone < 0) | (gone >= length)).any():
                raise IndexError(f"tokens {gone} of sequences of {length} tokens")
            self._move(rows, length, gone)
            self._known.move(rows, np.full(len(rows), length - 1), gone)
        elif self._kernel is not None:
            if victim is None:
                rule = self._rule(length)
                assert isinstance(rule, NormRule)
                # the kernel notes the last
                if (self._noted[rows] < length - 1).any():
                    self._catch_up(rows)
                self._kernel.evict_by_norm(length, self._blocks(rows, length), self._seen[rows], rule)
            else:
                self._kernel.evict(length, self._blocks(rows, length), victim)
        else:
            assert victim is not None
            blocks, last = upload(
                self._device,
                self._blocks(rows, length).astype(np.int64),
                self._tables.slots_at(rows, np.full(len(rows), length - 1)),
            )
            slots = (blocks[..., None] * self._pool.block_size + self._offsets).flatten(1)
            self._pool.move(slots.gather(1, victim.flatten(1)).view_as(victim), last)
        self._tables.drop_last(rows)
        self._noted[rows] = length - 1
        self._evicted += len(rows)
        self._unordered[rows] = True
        self._settle(rows)
        if self.can_be_steady:
            self._note_steady(rows, length)

    def _note_steady(self, rows: Ints, length: int) -> None:
        """One of ``length`` tokens has gone of each of some sequences: whether it will be so after every step."""
        rule = self._rule(length)
        self._full[rows] = -1
        if rule is None or (length != self._length and (self._full >= 0).any()):
            return
        steady = self._tables.sole[rows] & self.follows(rows)
        if self._known is not None and isinstance(rule, int):
            steady &= self._known.in_ring(rule, rows, length - 1)
        self._length = length
        self._full[rows[steady]] = length

    def _move(self, rows: Ints, length: int, gone: Ints) -> None:
        """Put the last of ``length`` tokens in the place of one that goes of all heads."""
        if self._kernel is not None:
            self._kernel.evict(length, self._blocks(rows, length), gone)
            return
        last = self._tables.slots_at(rows, np.full(len(rows), length - 1))
        self._pool.move(*upload(self._device, self._tables.slots_at(rows, gone), last))

    def _blocks(self, rows: Ints, length: int) -> NDArray[np.int32]:
        """Blocks ``[S, width]`` of the first ``length`` tokens."""
        found: NDArray[np.int32] = self._tables.table[:, : -(-length // self._pool.block_size)][rows]
        return found

    def _cut(self, row: int, keep: Tensor) -> None:
        """Keep some of a sequence's tokens, in time order."""
        self.select(row, keep)()
        self._unordered[row] = False
        self._settle(np.array([row]))

    def _settle(self, rows: Ints) -> None:
        """The policy has acted; end the books of sequences for which nothing more is decided."""
        assert self.policy is not None
        self._done[rows] = True
        if self.policy.settled(done=True):
            over = ~self._unordered[rows] if self.group.places else np.ones(len(rows), dtype=np.bool_)
            self._noted[rows[over]] = -1

    def _some(self, decided: Decided, which: Bools) -> Decided:
        """Of what was decided for some sequences, what was for those marked."""
        rows, chosen, single = decided
        if chosen is not None:
            index = np.flatnonzero(which)
            chosen = chosen[torch.from_numpy(index) if chosen.device.type == "cpu" else upload(self._device, index)[0]]
        return Decided(rows[which], chosen, single)
