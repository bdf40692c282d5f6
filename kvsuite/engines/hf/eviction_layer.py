"""One layer of a cache with any policy, packed or not: what attention sees of it, and what is stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvsuite.compression.prompt_view import PromptObservation, PromptView
from kvsuite.engines.rotary import Rotary

from .cache_store import Store, gather
from .grouped_store import GroupedStore
from .layer_group import LayerPositions
from .packed_form import PackedForm
from .residual_window import ResidualWindow


class HoldsLayers(Protocol):
    """The cache of a layer: what all its layers share (`kvsuite.engines.hf.cache.EvictionCache`)."""

    rotary: Rotary | None
    layers: Any
    #: tokens seen, and those of the forward pass that is under way with their position ids ``[1, tokens]``
    seen: int
    incoming: int
    incoming_positions: Tensor
    #: where the newest token stands among those stored
    newest_place: int
    on_interval: Callable[[bool], None] | None

    def turn(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[1, heads, n, head_dim]`` to ``positions`` ``[n]``."""
        ...


class EvictionLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of an eviction cache; the signatures serve transformers 5.2 to 5.23."""

    is_sliding = False

    def __init__(self, cache: HoldsLayers, store: Store, form: PackedForm | None = None) -> None:
        # the base class would assign `keys`, which is a property here
        self.is_initialized = True
        self._cache = cache
        self.store = store
        #: how keys and values are packed, ``None`` for the model's own numbers
        self.form = form
        self.group: LayerPositions
        self.index = 0
        #: whether the model rotates keys in this layer
        self.rotates = True
        #: of a prompt whose queries the policy has yet to see: keys and values to store, and as the attention reads them
        self._unseen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        #: newest tokens in the model's dtype beside the packed ones
        self.residual: ResidualWindow | None = None
        if form is not None and form.format.residual and form.format.token_group == 1:
            self.residual = ResidualWindow(form.format.residual)
        self._mask: Tensor | None = None

    @property
    def is_mixed(self) -> bool:
        """Whether a query sees some tokens packed and some in the model's dtype."""
        return self.form is not None and self.form.format.is_mixed

    @property
    def keys(self) -> Tensor:
        """Stored keys ``[batch, kv_heads, n, head_dim]`` (unrotated where the policy's positions are ``cache``)."""
        return self._stored()[0]

    @property
    def values(self) -> Tensor:
        """Stored values ``[batch, kv_heads, n, head_dim]``."""
        return self._stored()[1]

    def _stored(self) -> tuple[Tensor, Tensor]:
        self.group.settle()
        return self._plain_where_new(*self.store.view(self.group.slots), seen=self._cache.seen)

    def _plain_where_new(self, keys: Tensor, values: Tensor, *, seen: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots, those in the residual window of the last of ``seen`` tokens not packed."""
        if self.residual is None:
            return keys, values
        return self.residual.over(keys, values, self.group.positions(self.index, keys.shape[2]), seen)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens; return the keys and values that attention sees: all stored ones and the new ones."""
        cache, group = self._cache, self.group
        tokens = key_states.shape[2]
        if cache.incoming != tokens:
            raise RuntimeError("call EvictionCache.begin(tokens) before the forward pass")
        own = key_states
        turns = group.ranked and self.rotates
        if turns:
            assert cache.rotary is not None
            own = cache.rotary.unrotate(key_states, cache.incoming_positions[0])
        if tokens > 1 and group.slots == 0:
            read_keys, read_values = self._as_read(key_states, own, value_states)
            self._unseen = (own, value_states, read_keys, read_values)
            if not group.views_prompt:
                self._enter_prompt(None)
            if not self.is_mixed:
                return read_keys, read_values
            places = torch.arange(tokens, device=key_states.device)
            return self._mixed((read_keys, read_values, places), (key_states, value_states, places))
        if tokens > 1 and self.is_mixed:
            return self._append_many(key_states, own, value_states)
        keys, values = self.store.append(own, value_states, group.slots, group.hole_of(self.index))
        if self.residual is not None:
            self.residual.keep(own, value_states, cache.seen)
            keys, values = self._plain_where_new(keys, values, seen=cache.seen + tokens)
        if group.policy is not None:
            group.score(self.index, self._as_read(key_states, own, value_states)[0])
        if turns:
            keys = self._turned(keys)
        return keys, values

    def _as_read(self, keys: Tensor, own: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys at their places and values as they are read once ``own`` and ``values`` are stored."""
        cache = self._cache
        if self.form is None:
            return keys, values
        read_keys, read_values = self.form.through(own, values)
        if own is not keys:
            assert cache.rotary is not None
            read_keys = cache.rotary.rotate(read_keys, cache.incoming_positions[0])
        return read_keys, read_values

    def _turned(self, keys: Tensor) -> Tensor:
        """Keys of the first slots, rotated to their places in the cache."""
        cache = self._cache
        assert cache.rotary is not None
        return cache.rotary.rotate(keys, self.group.places(self.index, cache.newest_place, keys.shape[2]))

    def _append_many(self, keys: Tensor, own: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store several tokens behind others, of which each query sees some packed and some not."""
        cache, group, store = self._cache, self.group, self.store
        seen, slots = cache.seen, group.slots
        if isinstance(store, GroupedStore):
            old_keys, old_values, first = store.tail
            before = torch.arange(first, seen, device=own.device)
        else:
            old_keys, old_values = self._plain_where_new(*store.view(slots), seen=seen)
            before = group.positions(self.index, slots)
        packed_keys, packed_values = store.append(own, values, slots, None)
        if self.residual is not None:
            self.residual.keep(own, values, seen)
        if group.policy is not None:
            group.score(self.index, self._as_read(keys, own, values)[0])
        after = group.positions(self.index, packed_keys.shape[2])
        new = torch.arange(seen, seen + own.shape[2], device=own.device)
        plain_keys, plain_values = torch.cat((old_keys, own), 2), torch.cat((old_values, values), 2)
        if own is not keys:
            packed_keys, plain_keys = self._turned(packed_keys), self._turned(plain_keys)
        places = torch.cat((before.to(own.device), new.expand(*before.shape[:-1], -1)), -1)
        return self._mixed((packed_keys, packed_values, after.to(own.device)), (plain_keys, plain_values, places))

    def _mixed(
        self, packed: tuple[Tensor, Tensor, Tensor], plain: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both forms behind each other, with a mask that shows each query one form of each token.

        ``packed`` and ``plain`` are keys, values and positions ``[n]`` or ``[batch, heads, n]``.
        """
        cache = self._cache
        assert self.form is not None
        queries = range(cache.seen, cache.seen + cache.incoming)
        device = packed[0].device
        at = torch.tensor(list(queries), device=device)[:, None]
        bound = torch.tensor([self.form.format.boundary(query + 1) for query in queries], device=device)[:, None]
        old, new = (places.unsqueeze(-2) for places in (packed[2], plain[2]))
        seen = torch.cat((old < bound, (new >= bound) & (new <= at)), -1)
        self._mask = seen if seen.dim() == 4 else seen[None, None]
        return torch.cat((packed[0], plain[0]), 2), torch.cat((packed[1], plain[1]), 2)

    def take_mask(self, heads: int) -> Tensor | None:
        """What each query of ``heads`` heads sees of the keys that `update` returned last, bool ``[batch, heads, q, n]``.

        ``None`` where the model's own mask is the right one. It is handed out once.
        """
        mask, self._mask = self._mask, None
        if mask is None or mask.shape[1] in (1, heads):
            return mask
        return mask.repeat_interleave(heads // mask.shape[1], 1)

    def see(self, query: Tensor, scale: float) -> None:
        """Show the policy the queries ``[batch, heads, q, head_dim]`` of the prompt that was just stored; none for a token."""
        if self._unseen is None:
            return
        cache, policy = self._cache, self.group.policy
        assert policy is not None
        _, _, keys, values = self._unseen
        views = []
        for own_query, own_keys, own_values in zip(query, keys, values, strict=True):
            observed = PromptObservation(policy.needs, None if cache.rotary is None else cache.rotary.unrotate)
            observed.add(own_query, partial(_given, own_keys), scale)
            places = torch.arange(own_keys.shape[1], device=own_keys.device)
            views.append(
                PromptView(
                    places.expand(own_keys.shape[:2]), own_keys.shape[1] - 1, keys=own_keys, values=own_values,
                    observed=observed, layer=self.group.layers[self.index], layers=len(cache.layers),
                    rotate=None if cache.rotary is None else cache.turn,
                )
            )  # fmt: skip
        self._enter_prompt(views)

    def _enter_prompt(self, views: list[PromptView] | None) -> None:
        """Store of a prompt what the policy keeps."""
        cache = self._cache
        assert self._unseen is not None
        own, values, keys, _ = self._unseen
        self._unseen = None
        if cache.on_interval:
            cache.on_interval(True)
        keep = self.group.enter_prompt(self.index, keys, views)
        made = self.group.merge(self.index, own, values)
        if keep is not None:
            made = gather(own, keep), gather(values, keep)
        if made is not None:
            self.store.load(*made)
        if cache.on_interval:
            cache.on_interval(False)
        if made is None:
            self.store.append(own, values, 0, None)
        if self.residual is not None:
            self.residual.keep(own, values, 0)

    def tensors(self) -> list[Tensor]:
        """The tensors kept alive."""
        return self.store.tensors() + ([] if self.residual is None else self.residual.tensors())

    def get_seq_length(self, *args: Any) -> int:
        """Tokens seen, not stored: default positions are the true ones."""
        return self._cache.seen

    def get_mask_sizes(self, query: int | Tensor, *args: Any) -> tuple[int, int]:
        """Length of keys and offset of the first: every stored key counts as past."""
        tokens = query if isinstance(query, int) else query.shape[0]
        return self.group.length + tokens, self._cache.seen - self.group.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self._unseen = self._mask = None
        self.group.reset()


def _given(keys: Tensor) -> Tensor:
    return keys
