"""Applies a policy to the blocks of sequences: at the end of the prompt and after every further token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvsuite.compression.base import CacheView, Policy
from kvsuite.compression.prompt_view import PromptView
from kvsuite.errors import UserError

from .block_table import BlockTables
from .groups import LayerGroup
from .kv_pool import KVPool
from .prompt_observer import PromptObserver


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
    """

    positions: Tensor
    scores: Tensor | None = None
    done: bool = False


class Eviction:
    """One layer group's tokens under a policy. The bookkeeping of a sequence begins with `enter` and ends with `leave`.

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
        self._device = pool.keys.device
        self._per_head = self.policy is not None and not self.policy.shared_across_heads
        self._sequences: dict[int, Stored] = {}
        self.evicted = 0

    def enter(self, row: int) -> None:
        """Begin the bookkeeping of a sequence whose first tokens are stored and complete."""
        length = int(self._tables.lengths[row])
        if self.policy is None:
            return
        if not self._per_head:
            self._sequences[row] = Stored(torch.arange(length))
            return
        keys = self._pool.gather_keys(self._slots(row))
        positions = torch.arange(length, device=self._device)
        self._sequences[row] = Stored(
            positions.expand(len(self.group.layers), self.group.kv_heads, length).clone(),
            self.policy.token_score(keys),
        )

    def append(self, row: int, position: int) -> None:
        """Note the tokens up to ``position``, which is the last in the table: several where known output was fed at once."""
        stored = self._sequences.get(row)
        if stored is None:
            return
        count = int(self._tables.lengths[row]) - stored.positions.shape[-1]
        new = torch.arange(position - count + 1, position + 1, device=stored.positions.device)
        stored.positions = torch.cat([stored.positions, new.expand(*stored.positions.shape[:-1], count)], dim=-1)
        if stored.scores is not None:
            assert self.policy is not None
            score = self.policy.token_score(self._pool.gather_keys(self._slots(row)[-count:]))
            assert score is not None
            stored.scores = torch.cat([stored.scores, score], dim=-1)

    def act(self, row: int, seen: int, *, prompt: bool) -> bool:
        """Let the policy act after ``seen`` tokens; return whether it removed any.

        Raises
        ------
        PoolFullError
            If a shared block has to be copied and none is free. Acting again later gives what it would have given.
        """
        stored = self._sequences.get(row)
        if stored is None or self.policy is None:
            return False
        length = int(self._tables.lengths[row])
        due = self.policy.due(step=seen, done=stored.done, prompt=prompt)
        size = self.policy.size_after(length) if due else length
        if size == length:
            return False
        if self.policy.needs.prompt and prompt:
            self.select(row, self._keep_of_prompt(row))
            stored.done = True
            return True
        view = CacheView(
            stored.positions,
            seen - 1,
            stored.scores,
            layer=torch.tensor(self.group.layers, device=self._device)[:, None] if self._per_head else 0,
            heads=torch.arange(self.group.kv_heads, device=self._device) if self._per_head else 0,
            step=seen,
        )
        if size == length - 1 and not prompt:
            self._evict_one(row, stored, self.policy.victim(view))
        else:
            self.select(row, self.policy.keep(view))
        stored.done = True
        return True

    def _keep_of_prompt(self, row: int) -> Tensor:
        """What the policy keeps of a complete prompt, ``[layers, kv_heads, k]``, or ``[k]`` of one that all heads share."""
        assert self.policy is not None
        assert self._observer is not None
        keys, values = self._pool.gather(self._slots(row))
        positions = torch.arange(keys.shape[2], device=self._device)
        kept = []
        for index, layer in enumerate(self.group.layers):
            own = keys[index]
            if self.group.places:
                own = self._observer.rotate(own[None], positions)[0]
            view = PromptView(
                positions.expand(own.shape[:2]), own.shape[1] - 1, keys=own, values=values[index],
                observed=self._observer.observation(row, layer), layer=layer, layers=self._observer.layers,
                rotate=self._observer.turn(layer),
            )  # fmt: skip
            kept.append(self.policy.keep(view))
        return torch.stack(kept)

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

    def select(self, row: int, keep: Tensor) -> None:
        """Keep the stored tokens ``keep``, int64 ``[k]`` or ``[layers, kv_heads, k]``, and free what the others held.

        The kept ones move to blocks that no other sequence holds and that no prefix finds.

        Raises
        ------
        PoolFullError
            If there are no such blocks; nothing has changed then.
        """
        length, kept = int(self._tables.lengths[row]), int(keep.shape[-1])
        keys, values = self._pool.gather(self._slots(row))
        index = keep.to(self._device)
        if index.dim() == 1:
            picked = (tensor.index_select(2, index) for tensor in (keys, values))
        else:
            wide = index[..., None].expand(*index.shape, self.group.head_dim)
            picked = (tensor.gather(2, wide) for tensor in (keys, values))
        chosen = tuple(picked)
        self._tables.replace(row, kept)
        self._pool.scatter(self._slots(row), *chosen)
        self.evicted += length - kept
        stored = self._sequences.get(row)
        if stored is not None:
            own = keep.to(stored.positions.device)
            stored.positions = stored.positions.gather(-1, own.expand(*stored.positions.shape[:-1], kept))
            if stored.scores is not None:
                stored.scores = stored.scores.gather(-1, index.expand(*stored.scores.shape[:-1], kept))

    def ranks(self, row: int, coming: int) -> Tensor | None:
        """Rank in time of the stored tokens and ``coming`` new ones behind them; ``None`` where they lie in that order."""
        stored = self._sequences.get(row)
        if stored is None or not stored.done:
            return None
        positions, length = stored.positions.to(self._device), stored.positions.shape[-1]
        ranks = positions.argsort(dim=-1).argsort(dim=-1)
        new = torch.arange(length, length + coming, device=self._device)
        return torch.cat([ranks, new.expand(*ranks.shape[:-1], coming)], dim=-1)

    def positions(self, row: int) -> Tensor | None:
        """Logical positions of the stored tokens in the order of the table; ``None`` where nothing is kept of them."""
        stored = self._sequences.get(row)
        return None if stored is None else stored.positions

    def fork(self, row: int, target: int) -> None:
        """Begin the bookkeeping of a sequence that holds what another one does."""
        stored = self._sequences.get(row)
        if stored is not None:
            # tensors are replaced or cloned before they are written, so both may refer to the same ones
            self._sequences[target] = Stored(stored.positions, stored.scores, stored.done)

    def leave(self, row: int) -> None:
        """Forget a sequence."""
        self._sequences.pop(row, None)
        if self._observer is not None:
            self._observer.leave(row)

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
        self._tables.shrink(row, last)
        self.evicted += 1

    def _slots(self, row: int) -> Tensor:
        return torch.from_numpy(self._tables.stored_slots(row)).to(self._device)
