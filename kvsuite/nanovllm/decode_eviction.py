"""What a policy does to sequences after every token, and the books that it keeps for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvsuite.compression.base import CacheView, Policy
from kvsuite.compression.ranked import ROUNDING, NormRule, RankedPolicy
from kvsuite.errors import UserError

from .block_table import BlockTables, Ints
from .groups import LayerGroup
from .kv_pool import KVPool
from .pages import has_kernels
from .prompt_eviction import PromptEviction, scores_norms
from .prompt_observer import PromptObserver
from .stage_streams import Work
from .token_notes import TokenNotes
from .uploads import upload

Bools = NDArray[np.bool_]


class Decided(NamedTuple):
    """What a policy decided for some sequences that store equally many tokens; nothing has changed yet.

    Parameters
    ----------
    rows
        The sequences.
    chosen
        Index of the one token that goes, int64 ``[S]`` or ``[S, layers, kv_heads]``; or of those that stay, with one more
        dimension.
    single
        Whether one token goes.
    places
        Blocks ``[S, width]`` of the sequences, and slots ``[S]`` of their last tokens, int64, where the device has them.
    """

    rows: Ints
    chosen: Tensor
    single: bool
    places: tuple[Tensor, Tensor] | None = None


class _Uploaded(NamedTuple):
    """What the device has of some sequences: blocks ``[S, width]``, tokens seen ``[S]``, last slots ``[S]``."""

    blocks: Tensor
    seen: Tensor
    last: Tensor


class DecodeEviction:
    """One layer group's sequences under a policy that goes on deciding behind the prompt.

    A sequence has a book as long as something may be decided for it: from `enter` on, until the policy acts the last time or
    the sequence goes (`leave`). What a policy knows of stored tokens lies beside them, by slot (`TokenNotes`), so that all
    sequences that a step decoded are looked at together (`decide`, `apply`). A policy that acts at the end of the prompt
    alone needs none of it (`prompt`).

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
        #: what the policy does at the end of a prompt
        self.prompt = PromptEviction(policy, group, tables, pool, observer)
        self._device = pool.device
        self._per_head = self.policy is not None and not self.policy.shared_across_heads
        self._layers = torch.tensor(group.layers, device=self._device)[:, None]
        self._heads = torch.arange(group.kv_heads, device=self._device)
        rows = len(tables.lengths)
        # tokens that are noted of a sequence, -1 where nothing is decided; whether any was removed, and out of time's order
        self._noted: Ints = np.full(rows, -1, dtype=np.int64)
        self._done = np.zeros(rows, dtype=np.bool_)
        self._unordered = np.zeros(rows, dtype=np.bool_)
        self._notes: TokenNotes | None = None
        # where one decision serves every head the host has the positions, by row and in the order of its table
        self._positions: Ints = np.zeros((0, 0), dtype=np.int64)
        if self.policy is not None and self.policy.acts == "decode":
            if self._per_head:
                self._notes = pool.notes = TokenNotes(
                    layers=len(group.layers),
                    heads=group.kv_heads,
                    blocks=pool.num_blocks + 1,
                    block_size=pool.block_size,
                    scored=self.prompt.scores(torch.zeros(1, dtype=torch.int64, device=self._device)) is not None,
                    device=self._device,
                )
            else:
                self._positions = np.zeros((rows, tables.table.shape[1] * pool.block_size), dtype=np.int64)
        # whether kernels read and move what the notes are about, and find the token to evict
        self._kernels = self._notes is not None and has_kernels(pool.device) and not pool.is_packed
        self._norms_noted = self._kernels and scores_norms(policy)
        # `Policy.size_after` and `RankedPolicy.norm_rule` of lengths that were met
        self._sizes: dict[int, int] = {}
        self._rules: dict[int, NormRule | None] = {}
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

    def decide(self, rows: Ints, seen: Ints, *, prompt: bool = False) -> list[Decided]:
        """What the policy decides now that the sequences, all different, have seen so many tokens each."""
        policy = self.policy
        if policy is None:
            return []
        rows, seen = self._followed(rows, seen)
        if not len(rows):
            return []
        lengths = self._tables.lengths[rows]
        uploaded = self._note(rows, seen, lengths)
        facts = list(zip(seen.tolist(), self._done[rows].tolist(), strict=True))
        due = {fact: policy.due(step=fact[0], done=fact[1], prompt=prompt) for fact in set(facts)}
        if not all(due.values()):
            now = np.array([due[fact] for fact in facts], dtype=np.bool_)
            rows, seen, lengths = rows[now], seen[now], lengths[now]
        found = []
        # those that store equally many tokens are decided for together
        for length in dict.fromkeys(lengths.tolist()):
            size = self._size_after(length)
            if size == length:
                continue
            alike, single = lengths == length, size == length - 1 and not prompt
            some, saw = (rows, seen) if alike.all() else (rows[alike], seen[alike])
            # all of them, or each alone
            parts = [slice(None)] if policy.sequences_apart else [slice(at, at + 1) for at in range(len(some))]
            for part in parts:
                own, steps = some[part], saw[part]
                if policy.needs.prompt and prompt:
                    [row] = own.tolist()
                    found.append(Decided(own, self.prompt.keep_observed(row)[None], False))
                    continue
                here = uploaded
                if uploaded is not None and len(own) != len(uploaded.seen):
                    here = _Uploaded(*upload(self._device, *self._facts(own, steps)))
                rule = self._norm_rule(length) if single else None
                if rule is not None and here is not None:
                    chosen = self._least(rule, here, length)
                else:
                    view = self._view(own, steps, length, here)
                    chosen = policy.victim(view) if single else policy.keep(view)
                    chosen = chosen if len(own) > 1 else chosen[None]
                found.append(Decided(own, chosen, single, None if here is None else (here.blocks, here.last)))
        return found

    def apply(self, decided: Decided) -> list[tuple[int, Callable[[], None]]]:
        """Remove what goes of the sequences whose blocks are theirs alone, if that is one token; it cannot fail.

        Returns
        -------
        list
            The other sequences, and for each what removes its tokens. That raises `PoolFullError` where blocks are lacking,
            and may be done again then.
        """
        rows, chosen, single, places = decided
        # making room in another group may have preempted some
        there = self._noted[rows] >= 0
        if not there.all():
            rows, chosen, places = rows[there], self._some(chosen, there), None
        if not single:
            return [(row, partial(self._cut, row, keep)) for row, keep in zip(rows.tolist(), chosen, strict=True)]
        sole = self._tables.sole[rows]
        if sole.all():
            self._evict_one(rows, chosen, places)
            return []
        if sole.any():
            self._evict_one(rows[sole], self._some(chosen, sole))
        return [
            (int(rows[at]), partial(self._own_and_evict_one, rows[at : at + 1], chosen[at : at + 1]))
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
        if self.policy is not None and keep.dim() > 1 and self._noted[row] >= 0 and not self._per_head:
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
        work = self.prompt.replace(row, kept)(keep)
        if self._noted[row] >= 0:
            if self._notes is None:
                self._positions[row, :kept] = self._positions[row, keep.cpu().numpy()]
            self._noted[row] = kept
        return work

    def places(self, rows: Ints, coming: Sequence[int]) -> list[Tensor | None]:
        """Rank in time of the stored tokens of each sequence, and of ``coming`` new ones behind them.

        ``None`` where they lie in that order.
        """
        found: list[Tensor | None] = [None] * len(rows)
        alike: dict[tuple[int, int], list[int]] = {}
        for index in np.flatnonzero((self._noted[rows] >= 0) & self._done[rows]).tolist():
            alike.setdefault((int(self._noted[rows[index]]), coming[index]), []).append(index)
        for (length, count), some in alike.items():
            own = rows[some]
            if self._notes is None:
                [positions] = upload(self._device, self._positions[own, :length])
            else:
                positions, _ = self._notes.read(upload(self._device, self._blocks(own, length))[0], length)
            ranks = positions.argsort(dim=-1).argsort(dim=-1)
            new = torch.arange(length, length + count, device=self._device)
            places = torch.cat([ranks, new.expand(*ranks.shape[:-1], count)], dim=-1)
            for index, ranked in zip(some, places, strict=True):
                found[index] = ranked
        return found

    def fork(self, row: int, target: int) -> None:
        """Begin the bookkeeping of a sequence that holds what another one does."""
        for book in (self._noted, self._done, self._unordered):
            book[target] = book[row]
        if len(self._positions):
            self._positions[target] = self._positions[row]

    def leave(self, row: int) -> None:
        """Forget a sequence."""
        self._noted[row] = -1
        self.prompt.leave(row)

    def _followed(self, rows: Ints, seen: Ints) -> tuple[Ints, Ints]:
        """Those of the sequences that have a book, and what they have seen."""
        followed = self.follows(rows)
        return (rows, seen) if followed.all() else (rows[followed], seen[followed])

    def _blocks(self, rows: Ints, length: int) -> Ints:
        """Blocks ``[S, width]`` of the first ``length`` tokens."""
        return self._tables.rows(rows)[:, : -(-length // self._pool.block_size)].astype(np.int64)

    def _note(self, rows: Ints, seen: Ints, lengths: Ints) -> _Uploaded | None:
        """Note the stored tokens that are not, the last of which was the ``seen``-th that a sequence saw.

        Mostly one of each; several where known output was fed at once.

        Returns
        -------
        _Uploaded or None
            What the device has of the sequences; ``None`` where the host has all that there is.
        """
        counts = lengths - self._noted[rows]
        owners, at, positions = rows, lengths - 1, seen - 1
        if (counts != 1).any():
            within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            owners, at = np.repeat(rows, counts), np.repeat(lengths - counts, counts) + within
            positions = np.repeat(seen - counts, counts) + within
        found = None
        if self._notes is None:
            self._positions[owners, at] = positions
        else:
            slots, noted, *facts = upload(
                self._device, self._tables.slots_at(owners, at), positions, *self._facts(rows, seen)
            )
            if not len(owners):
                pass
            elif self._norms_noted:
                from .note_kernels import note_norms

                note_norms(self._pool.keys, slots, noted, self._notes.by_slot)
            else:
                self._notes.write(slots, noted, self.prompt.scores(slots) if self._notes.scored else None)
            found = _Uploaded(*facts)
        self._noted[rows] = lengths
        return found

    def _facts(self, rows: Ints, seen: Ints) -> tuple[Ints, Ints, Ints]:
        """What `_Uploaded` has of some sequences."""
        lengths = self._tables.lengths[rows]
        return self._blocks(rows, int(lengths.max())), seen, self._tables.slots_at(rows, lengths - 1)

    def _size_after(self, length: int) -> int:
        """`Policy.size_after` of a length."""
        found = self._sizes.get(length)
        if found is None:
            assert self.policy is not None
            found = self._sizes[length] = self.policy.size_after(length)
        return found

    def _norm_rule(self, length: int) -> NormRule | None:
        """What a kernel finds the token to evict by; ``None`` where the policy does."""
        if not self._norms_noted:
            return None
        if length not in self._rules:
            self._rules[length] = norm_rule_of(self.policy, length)
        return self._rules[length]

    def _least(self, rule: NormRule, uploaded: _Uploaded, length: int) -> Tensor:
        """What a norm rule evicts of sequences that store ``length`` tokens each, int64 ``[S, layers, kv_heads]``."""
        from .note_kernels import least_norms

        assert self._notes is not None
        return least_norms(
            self._notes.by_slot, uploaded.blocks, uploaded.seen, length, self._pool.block_size,
            sign=rule.sign, protected=rule.protected, rounding=ROUNDING,
        )  # fmt: skip

    def _view(self, rows: Ints, seen: Ints, length: int, uploaded: _Uploaded | None) -> CacheView:
        """What a policy sees of sequences that store ``length`` tokens each: on the host where it has all that there is."""
        layers: Tensor | int = 0
        heads: Tensor | int = 0
        scores = None
        if self._notes is None or uploaded is None:
            positions, steps = torch.from_numpy(self._positions[rows, :length]), torch.from_numpy(seen)
        else:
            width = -(-length // self._pool.block_size)
            positions, scores = self._notes.read(uploaded.blocks[:, :width], length)
            layers, heads, steps = self._layers, self._heads, uploaded.seen
        if len(rows) == 1:
            step = int(seen[0])
            own = None if scores is None else scores[0]
            return CacheView(positions[0], step - 1, own, layer=layers, heads=heads, step=step)
        steps = steps.view(-1, *[1] * (positions.dim() - 2))
        return CacheView(positions, steps[..., None] - 1, scores, layer=layers, heads=heads, step=steps)

    def _own_and_evict_one(self, row: Ints, victim: Tensor) -> None:
        """`_evict_one` of a sequence whose blocks others may hold or find."""
        for index in np.unique(victim.cpu().numpy() // self._pool.block_size).tolist():
            self._pool.copy_blocks(self._tables.own(int(row[0]), index))
        self._tables.note_sole(int(row[0]))
        self._evict_one(row, victim)

    def _evict_one(self, rows: Ints, victim: Tensor, places: tuple[Tensor, Tensor] | None = None) -> None:
        """Put the last token in the place of the victim, which may be another one for every head, and drop the last slot.

        The victims lie in blocks that may be written.
        """
        lengths = self._tables.lengths[rows]
        if self._notes is None:
            gone = victim.numpy()
            if ((gone < 0) | (gone >= lengths)).any():
                raise IndexError(f"tokens {gone} of sequences of {lengths} tokens")
            self._pool.move(
                *upload(self._device, self._tables.slots_at(rows, gone), self._tables.slots_at(rows, lengths - 1))
            )
            self._positions[rows, gone] = self._positions[rows, lengths - 1]
        else:
            if places is None:
                blocks, _, last = upload(self._device, *self._facts(rows, lengths))
            else:
                blocks, last = places
            if self._kernels:
                from .note_kernels import move_last

                move_last(self._pool.keys, self._pool.values, self._notes.by_slot, blocks, last, victim.contiguous())
            else:
                slots = (blocks[..., None] * self._pool.block_size + self._offsets).flatten(1)
                self._pool.move(slots.gather(1, victim.flatten(1)).view_as(victim), last)
        self._tables.drop_last(rows)
        self._noted[rows] -= 1
        self._evicted += len(rows)
        self._unordered[rows] = True
        self._settle(rows)

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

    def _some(self, chosen: Tensor, which: Bools) -> Tensor:
        """Of what was chosen for some sequences, what was for those marked."""
        index = np.flatnonzero(which)
        return chosen[torch.from_numpy(index) if chosen.device.type == "cpu" else upload(self._device, index)[0]]


def norm_rule_of(policy: Policy | None, length: int) -> NormRule | None:
    """`RankedPolicy.norm_rule` of a policy whose priority and victim are what the rule says; ``None`` of any other."""
    if not isinstance(policy, RankedPolicy) or type(policy).victim is not RankedPolicy.victim:
        return None
    ours = [next(each for each in type(policy).__mro__ if name in vars(each)) for name in ("priority", "norm_rule")]
    return policy.norm_rule(length) if ours[0] is ours[1] else None
