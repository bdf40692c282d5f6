"""Layers that are treated alike: which slots their tokens lie in, and which go."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsuite.compression.base import CacheView, ImageSpans, Policy
from kvsuite.compression.merging import Merging
from kvsuite.compression.prompt_view import PromptView
from kvsuite.engines.decoder import refuse_while_capturing

from .cache_store import Hole, Store


class LayerPositions:
    """Bookkeeping of layers of equal policy and length. Their stores hold the tensors, this holds the positions.

    Parameters
    ----------
    policy
        ``None`` keeps everything.
    layers
        Layer indices of the group, in order.
    stores
        One store a layer, in the same order.
    batch, kv_heads
        Leading dimensions of the cache.
    device
        Where the cache lies.
    capacity
        Slots to make room for at once: a captured step must not find the bookkeeping moved.
    """

    def __init__(
        self,
        policy: Policy | None,
        layers: list[int],
        stores: list[Store],
        *,
        batch: int,
        kv_heads: int,
        device: torch.device,
        capacity: int = 0,
    ) -> None:
        self.policy = policy
        self.layers = layers
        self.stores = stores
        self.reuses_slots = all(store.reuses_slots for store in stores)
        self.per_head = policy is not None and not policy.shared_across_heads
        self.ranked = policy is not None and policy.positions == "cache"
        #: whether the policy decides on a prompt by a view of it, in the place of scores that are kept beside the tokens
        self.views_prompt = policy is not None and policy.needs.prompt
        self._lead = (len(layers), batch, kv_heads) if self.per_head else ()
        self._device = device
        # shared decisions are made on the host, once for all layers
        self._positions = torch.empty(*self._lead, 0, dtype=torch.int64, device=device if self.per_head else "cpu")
        self._ranks = torch.empty(*self._lead, 0, dtype=torch.int64, device=device)
        self._scores = torch.empty(*self._lead, 0, device=device)
        if self.per_head:
            self._layer_index = torch.tensor(layers, device=device)[:, None, None]
            self._head_index = torch.arange(kv_heads, device=device)
        else:
            self._layer_index = self._head_index = torch.zeros(1, dtype=torch.int64)
        self._grow(capacity)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens; the stores keep their buffers."""
        self.slots = 0
        self.hole: Hole = None
        self.done = False
        self._incoming = 0
        #: where image tokens stand in the prompt that comes next, for a policy that merges
        self.images: ImageSpans = ()

    @property
    def length(self) -> int:
        """Stored tokens a layer."""
        return self.slots - (self.hole is not None)

    def begin(self, tokens: int, seen: int) -> None:
        """Give ``tokens`` new tokens their slots, positions and ranks before a forward pass."""
        if tokens > 1:
            self.settle()
        self._incoming = tokens
        if self.policy is None or (tokens > 1 and self.slots == 0):
            return  # a prompt is entered by `enter_prompt`, layer by layer
        # a token that reuses a slot needs no room, and tables that moved would leave a captured step with the old ones
        self._grow(self.slots + (tokens if self.hole is None else 0))
        at: slice | Hole = slice(self.slots, self.slots + tokens) if self.hole is None else self.hole
        positions = torch.arange(seen, seen + tokens, device=self._positions.device)
        ranks = torch.arange(self.length, self.length + tokens, device=self._device)
        for book, new in ((self._positions, positions), (self._ranks, ranks)):
            if isinstance(at, Tensor):
                book.scatter_(-1, at[..., None], new.expand(*self._lead, 1))
            elif isinstance(at, int):
                book[..., at : at + 1] = new
            else:
                book[..., at] = new

    def enter_prompt(self, index: int, keys: Tensor, views: list[PromptView] | None = None) -> Tensor | None:
        """Decide what layer ``index`` (place in the group) keeps of a prompt whose keys are given.

        Parameters
        ----------
        index
            Place of the layer in the group.
        keys
            ``[batch, heads, n, head_dim]``.
        views
            What a policy sees that `views_prompt`, for each sequence of the batch.

        Returns
        -------
        Tensor or None
            Slots that stay, ``[k]`` or ``[batch, heads, k]``; ``None`` keeps all.
        """
        policy, tokens = self.policy, keys.shape[2]
        if policy is None or policy.merges:
            return None
        acts = policy.due(step=tokens, done=False, prompt=True) and policy.size_after(tokens) < tokens
        keep: Tensor | None = None
        scores = policy.token_score(keys)
        positions = torch.arange(tokens, device=self._positions.device)
        if acts and views is not None:
            keep = torch.stack([policy.keep(view) for view in views])
        elif acts:
            wide = positions if scores is None else positions.expand(scores.shape)
            keep = policy.keep(
                CacheView(
                    wide,
                    tokens - 1,
                    scores,
                    layer=self.layers[index],
                    heads=self._head_index,
                    step=tokens,
                    ordered=True,
                )
            )
        kept = tokens if keep is None else keep.shape[-1]
        self._grow(kept)
        if self.per_head:
            self._positions[index, ..., :kept] = positions if keep is None else keep
            if scores is not None:
                self._scores[index, ..., :kept] = scores if keep is None else scores.gather(-1, keep)
        else:
            self._positions[:kept] = positions if keep is None else keep
        self._ranks[..., :kept] = torch.arange(kept, device=self._device)
        return keep

    def merge(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """What stands in layer ``index`` for a prompt's keys and values ``[batch, heads, n, head_dim]``.

        ``None`` where the policy merges nothing of it, or does not merge at all.
        """
        policy, tokens = self.policy, keys.shape[2]
        if not isinstance(policy, Merging) or policy.size_of_prompt(tokens, self.images) == tokens:
            return None
        merged = policy.merge(keys[None], values[None], [self.layers[index]], self.images)
        self._grow(merged[0].shape[3])
        return merged[0][0], merged[1][0]

    def score(self, index: int, keys: Tensor) -> None:
        """Remember the scores of layer ``index``'s new tokens."""
        if self.policy is None or not self.per_head:
            return
        scores = self.policy.token_score(keys)
        if scores is None:
            return
        if isinstance(self.hole, Tensor):
            self._scores[index].scatter_(-1, self.hole[index][..., None], scores)
        else:
            self._scores[index, ..., self.slots : self.slots + keys.shape[2]] = scores

    def hole_of(self, index: int) -> Hole:
        """The slot that layer ``index``'s next token reuses."""
        return self.hole[index] if isinstance(self.hole, Tensor) else self.hole

    def positions(self, index: int, slots: int) -> Tensor:
        """Positions in the text of the tokens in layer ``index``'s first ``slots``: ``[n]`` or ``[batch, heads, n]``."""
        if self.policy is None:
            return torch.arange(slots, device=self._device)
        return (self._positions[index] if self.per_head else self._positions)[..., :slots]

    def places(self, index: int, newest_place: int, slots: int) -> Tensor:
        """Cache positions of the first ``slots``, counted so that the newest token stands at ``newest_place``."""
        ranks = self._ranks[index] if self.per_head else self._ranks
        return ranks[..., :slots] + (newest_place - self.length - self._incoming + 1)

    def commit(self, seen: int) -> None:
        """End a forward pass after which ``seen`` tokens were seen: count the new tokens, then let the policy act."""
        tokens, prompt = self._incoming, self.slots == 0 and self._incoming > 1
        self._incoming = 0
        policy = self.policy
        if policy is None:
            self.slots += tokens
            return
        due = policy.due(step=seen, done=self.done, prompt=prompt)
        if prompt:
            self.slots = policy.size_of_prompt(tokens, self.images) if due else tokens
            self.done = self.slots < tokens
            return
        self.slots += tokens if self.hole is None else 0
        self.hole = None
        size = policy.size_after(self.slots) if due else self.slots
        if size == self.slots:
            return
        self.done = True
        view = self._view(seen)
        if self.reuses_slots and size == self.slots - 1:
            victim = policy.victim(view)
            self.hole = victim if self.per_head else int(victim)
            self._close_ranks()
        else:
            self._select(policy.keep(view))

    def host_state(self) -> tuple[int, Hole, bool, Tensor | None]:
        """What of the bookkeeping lies on the host: replaying a captured step changes only what lies on the device."""
        return self.slots, self.hole, self.done, None if self.per_head else self._positions.clone()

    def restore(self, state: tuple[int, Hole, bool, Tensor | None]) -> None:
        """Return to a `host_state`."""
        self.slots, self.hole, self.done, positions = state
        if positions is not None:
            self._positions = positions.clone()

    def settle(self) -> None:
        """Move the last slot's token into the hole, so that the first `length` slots are the stored tokens."""
        if self.hole is None:
            return
        every = torch.arange(self.slots - 1, device=self._device)
        last = self.slots - 1
        if isinstance(self.hole, Tensor):
            keep = torch.where(every == self.hole[..., None], last, every)
        else:
            keep = torch.where(every == self.hole, last, every)
        self.hole = None
        self._select(keep, ordered=False)

    def _view(self, seen: int) -> CacheView:
        scores = self._scores[..., : self.slots] if self.per_head else None
        positions = self._positions[..., : self.slots]
        return CacheView(positions, seen - 1, scores, layer=self._layer_index, heads=self._head_index, step=seen)

    def _close_ranks(self) -> None:
        if not self.ranked:
            return
        gone = self._ranks.gather(-1, self.hole[..., None]) if isinstance(self.hole, Tensor) else self._ranks[self.hole]
        self._ranks -= (self._ranks > gone).long()

    def _select(self, keep: Tensor, *, ordered: bool = True) -> None:
        for index, store in enumerate(self.stores):
            store.select(keep[index] if keep.dim() > 1 else keep, self.slots)
        kept = keep.shape[-1]
        for book in (self._positions, self._scores, self._ranks):
            if self.per_head or book is not self._scores:
                picked = book[..., : self.slots]
                index_ = keep.to(book.device)
                book[..., :kept] = picked.gather(
                    -1, index_ if index_.dim() == book.dim() else index_.expand(*book.shape[:-1], kept)
                )
        if ordered:
            self._ranks[..., :kept] = torch.arange(kept, device=self._device)
        self.slots = kept

    def _grow(self, slots: int) -> None:
        have = self._positions.shape[-1]
        if slots <= have:
            return
        refuse_while_capturing("the bookkeeping")
        size = max(slots, 2 * have)
        for name in ("_positions", "_ranks", "_scores"):
            old = getattr(self, name)
            new = torch.zeros(*self._lead, size, dtype=old.dtype, device=old.device)
            new[..., :have] = old
            setattr(self, name, new)
