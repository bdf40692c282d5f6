"""A transformers cache that applies any policy, on preallocated slots or by copying."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.compression.base import Policy
from kvsuite.compression.prompt_view import PromptObservation, PromptView
from kvsuite.engines.rotary import Rotary

from .cache_store import CopyStore, RingStore, Store, gather
from .grouped_store import GroupedStore
from .layer_group import LayerGroup
from .packed_form import PackedForm
from .residual_window import ResidualWindow

Implementation = Literal["ring", "copy"]
OnInterval = Callable[[bool], None]
#: makes the layers that transformers keeps itself, anew, by index
OwnLayers = Callable[[], Mapping[int, Any]]


class EvictionLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of an `EvictionCache`; the signatures serve transformers 5.2 to 5.23."""

    is_sliding = False

    def __init__(self, cache: EvictionCache, store: Store) -> None:
        # the base class would assign `keys`, which is a property here
        self.is_initialized = True
        self._cache = cache
        self.store = store
        self.group: LayerGroup
        self.index = 0
        #: whether the model rotates keys in this layer
        self.rotates = True
        #: of a prompt whose queries the policy has yet to see: keys and values to store, and as the attention reads them
        self._unseen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        #: newest tokens in the model's dtype beside the packed ones
        self.residual: ResidualWindow | None = None
        self._mask: Tensor | None = None

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
            if cache.format is None or not cache.format.is_mixed:
                return read_keys, read_values
            places = torch.arange(tokens, device=key_states.device)
            return self._mixed((read_keys, read_values, places), (key_states, value_states, places))
        if tokens > 1 and cache.format is not None and cache.format.is_mixed:
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
        if cache.format is None:
            return keys, values
        read_keys, read_values = cache.through(own, values)
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
        assert cache.format is not None
        queries = range(cache.seen, cache.seen + cache.incoming)
        device = packed[0].device
        at = torch.tensor(list(queries), device=device)[:, None]
        bound = torch.tensor([cache.format.boundary(query + 1) for query in queries], device=device)[:, None]
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
        if keep is not None:
            self.store.load(gather(own, keep), gather(values, keep))
        if cache.on_interval:
            cache.on_interval(False)
        if keep is None:
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


class EvictionCache(Cache):  # type: ignore[misc]
    """Cache of one request batch. Every forward pass stands between `begin` and `commit`.

    Parameters
    ----------
    layers
        Number of layers.
    policy
        What stays; ``None`` is the full cache. Layers in ``policy.skip_layers`` keep everything.
    batch, kv_heads
        Leading dimensions.
    device
        Device of the cache.
    capacity
        Tokens to reserve for a compressed layer and for an uncompressed one.
    implementation
        ``ring`` (preallocated slots) or ``copy`` (the original's concatenation).
    rotary
        Needed where the policy's positions are ``cache``, or it asks for queries before rotation.
    unrotated
        Layers whose keys the model does not rotate.
    own
        Makes transformers' own layers, for those that hold no more than a window, a state, or both: no policy acts on them.
    form
        How keys and values are packed, ``None`` for the model's own numbers.
    """

    def __init__(
        self,
        *,
        layers: int,
        policy: Policy | None,
        batch: int,
        kv_heads: int,
        device: torch.device,
        capacity: tuple[int, int] = (0, 0),
        implementation: Implementation = "ring",
        rotary: Rotary | None = None,
        unrotated: Collection[int] = (),
        own: OwnLayers = dict,
        form: PackedForm | None = None,
    ) -> None:
        self._form = form
        self.format: CacheFormat | None = None if form is None else form.format
        self._make_own = own
        self._own = dict(own())
        ours = [i for i in range(layers) if i not in self._own]
        treated = [] if policy is None else [i for i in ours if i not in policy.skip_layers]
        kept = [i for i in ours if i not in treated]

        def store(layer: int) -> Store:
            reserve = capacity[0] if layer in treated else capacity[1]
            if form is not None and form.format.token_group > 1:
                return GroupedStore(reserve, form)
            return CopyStore() if implementation == "copy" else RingStore(reserve, form)

        self.rotary = rotary
        self.seen = 0
        self.incoming = 0
        self.incoming_positions = torch.empty(1, 0, dtype=torch.int64)
        self.newest_place = 0
        self.on_interval: OnInterval | None = None
        self._device = device
        members: list[Any] = [self._own.get(i) or EvictionLayer(self, store(i)) for i in range(layers)]
        self._ours: list[EvictionLayer] = [members[i] for i in ours]
        for i in ours:
            members[i].rotates = i not in unrotated
            if self.format is not None and self.format.residual and self.format.token_group == 1:
                members[i].residual = ResidualWindow(self.format.residual)
        self.groups: list[LayerGroup] = []
        shape: Any = {"batch": batch, "kv_heads": kv_heads, "device": device}
        for group_policy, indices in ((policy, treated), (None, kept)):
            if indices:
                stores = [members[i].store for i in indices]
                room = 0 if group_policy is None else capacity[0]
                self._join(LayerGroup(group_policy, indices, stores, **shape, capacity=room), members)
        super().__init__(layers=members)
        if rotary is not None:
            rotary.table(max(capacity) + 1)

    def _join(self, group: LayerGroup, members: list[Any]) -> None:
        self.groups.append(group)
        for index, layer in enumerate(group.layers):
            members[layer].group, members[layer].index = group, index

    @property
    def uses_cache_positions(self) -> bool:
        """Whether queries are placed in the cache instead of in the text."""
        return any(group.ranked for group in self.groups)

    @property
    def is_uneven(self) -> bool:
        """Whether layers hold different numbers of tokens."""
        return bool(self._own) or len({group.length for group in self.groups}) > 1

    @property
    def views_prompt(self) -> bool:
        """Whether a policy waits for the queries of the prompt, which the attention has to show (`EvictionLayer.see`)."""
        return any(group.views_prompt for group in self.groups)

    @property
    def is_shown(self) -> bool:
        """Whether the attention has to ask the layers: for a policy's sake, or for a mask of packed and other tokens."""
        return self.views_prompt or (self.format is not None and self.format.is_mixed)

    def through(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens as they are read once they are stored, behind the last whole group as they are."""
        if self._form is None:
            return keys, values
        whole = self._form.format.boundary(keys.shape[2]) if self._form.format.token_group > 1 else keys.shape[2]
        if not whole:
            return keys, values
        read = self._form.through(keys[:, :, :whole], values[:, :, :whole])
        if whole == keys.shape[2]:
            return read
        rest = (keys[:, :, whole:], values[:, :, whole:])
        return torch.cat((read[0], rest[0]), 2), torch.cat((read[1], rest[1]), 2)

    def refuse_vectors(self) -> None:
        """Refuse keys and values that were not finite since the last call; waits for the device.

        Raises
        ------
        CaseInvalid
            If a format could not store one.
        """
        if self._form is not None:
            self._form.refuse()

    def turn(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[1, heads, n, head_dim]`` to ``positions`` ``[n]``, wherever they lie."""
        assert self.rotary is not None
        self.rotary.table(int(positions.max()) + 1)
        return self.rotary.rotate(vectors, positions)

    def begin(self, tokens: int) -> Tensor:
        """Prepare for a forward pass over ``tokens`` new tokens and return their position ids, int64 ``[1, tokens]``."""
        if self.incoming:
            raise RuntimeError("begin() called twice without commit()")
        self.incoming = tokens
        for group in self.groups:
            group.begin(tokens, self.seen)
        # a layer that keeps all, or a window, was rotated by places in the text, and the queries of all layers share theirs
        placed = self.uses_cache_positions and not self._own
        start = max(group.length for group in self.groups) if placed else self.seen
        self.newest_place = start + tokens - 1
        if self.rotary is not None and (self.uses_cache_positions or tokens > 1):
            self.rotary.table(start + tokens)
        self.incoming_positions = torch.arange(start, start + tokens, device=self._device)[None]
        return self.incoming_positions

    def commit(self) -> None:
        """Count the new tokens and evict: afterwards every layer holds what its policy leaves."""
        self.seen += self.incoming
        self.incoming = 0
        if self.on_interval:
            self.on_interval(True)
        for group in self.groups:
            group.commit(self.seen)
        if self.on_interval:
            self.on_interval(False)

    def adopt(self, compressed: Sequence[Any], seen: int) -> None:
        """Take over a prompt's cache that something else compressed, and empty it.

        Parameters
        ----------
        compressed
            A layer each, with ``keys`` and ``values`` ``[batch, kv_heads, n, head_dim]``; ``n`` may differ between layers.
        seen
            Tokens of the prompt before compression.
        """
        self.seen = seen
        self.groups = []
        for index, (layer, source) in enumerate(zip(self.layers, compressed, strict=True)):
            keys, values = source.keys, source.values
            layer.store.load(keys, values)
            group = LayerGroup(
                None, [index], [layer.store], batch=keys.shape[0], kv_heads=keys.shape[1], device=self._device
            )
            group.slots = keys.shape[2]
            self._join(group, self.layers)
            # layer by layer, so that only one of them exists twice
            source.keys = source.values = None

    def lengths(self) -> list[int]:
        """Stored tokens of every layer."""
        return [
            layer.group.length if isinstance(layer, EvictionLayer) else 0 if held is None else int(held[0].shape[-2])
            for layer, held in ((layer, _held(layer)) for layer in self.layers)
        ]

    def state_bytes(self) -> int:
        """Bytes of the states that recurrent layers carry: they hold no tokens, and do not grow."""
        states = [
            state
            for layer in self._own.values()
            for name in ("conv_states", "recurrent_states")
            for state in _tensors(getattr(layer, name, None))
        ]
        return sum({s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in states}.values())

    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of the distinct live storages, and the part of them that is planned headroom or a hole."""
        storages: dict[int, int] = {}
        headroom = 0
        for layer in self.layers:
            ours = isinstance(layer, EvictionLayer)
            for tensor in layer.tensors() if ours else _held(layer) or ():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            if ours:
                headroom += layer.store.headroom(layer.group.length)
                if layer.residual is not None:
                    headroom += layer.residual.headroom(self.seen)
        return sum(storages.values()), headroom

    def host_state(self) -> list[Any]:
        """Host side of the bookkeeping, to return to after captured steps were replayed."""
        return [self.seen, *(group.host_state() for group in self.groups)]

    def restore(self, state: list[Any]) -> None:
        """Return to a `host_state`."""
        self.seen = state[0]
        for group, own in zip(self.groups, state[1:], strict=True):
            group.restore(own)

    def reset(self) -> None:
        """Forget all tokens; buffers stay where they are, so that captured steps remain valid."""
        self.seen = 0
        self.incoming = 0
        for layer in self._ours:
            layer.reset()
        if self._own:
            self._own = dict(self._make_own())
            for index, layer in self._own.items():
                self.layers[index] = layer


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """transformers' layer of a window, which keeps no more alive than the window."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        # it keeps a view of what attention sees: a whole prompt
        for name in ("keys", "values"):
            setattr(self, name, getattr(self, name).clone(memory_format=torch.contiguous_format))
        return keys, values


def _held(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Keys and values of a layer, ``None`` where it has none."""
    if isinstance(layer, EvictionLayer):
        return None
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return None if keys is None or values is None or keys.dim() < 4 else (keys, values)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a state: one, some, or some by index."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _given(keys: Tensor) -> Tensor:
    return keys
