"""A transformers cache that applies any policy, on preallocated slots or by copying."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvsuite.compression.base import ImageSpans, Policy
from kvsuite.engines.rotary import Rotary

from .cache_store import CopyStore, RingStore, Store
from .eviction_layer import EvictionLayer
from .grouped_store import GroupedStore
from .layer_group import LayerPositions
from .own_layers import held_by, state_bytes
from .packed_form import PackedForm

Implementation = Literal["ring", "copy"]
OnInterval = Callable[[bool], None]
#: makes the layers that transformers keeps itself, anew, by index
OwnLayers = Callable[[], Mapping[int, Any]]


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
    forms
        How each layer packs keys and values, ``None`` for the model's own numbers; empty: none packs.
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
        forms: Sequence[PackedForm | None] = (),
    ) -> None:
        packing: Sequence[PackedForm | None] = forms or [None] * layers
        #: every form once
        self.forms = [form for form in dict.fromkeys(packing) if form is not None]
        self._make_own = own
        self._own = dict(own())
        ours = [i for i in range(layers) if i not in self._own]
        treated = [] if policy is None else [i for i in ours if i not in policy.skip_layers]
        kept = [i for i in ours if i not in treated]

        def store(layer: int) -> Store:
            reserve, form = capacity[0] if layer in treated else capacity[1], packing[layer]
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
        members: list[Any] = [self._own.get(i) or EvictionLayer(self, store(i), packing[i]) for i in range(layers)]
        self._ours: list[EvictionLayer] = [members[i] for i in ours]
        for i in ours:
            members[i].rotates = i not in unrotated
        self.groups: list[LayerPositions] = []
        shape: Any = {"batch": batch, "kv_heads": kv_heads, "device": device}
        for group_policy, indices in ((policy, treated), (None, kept)):
            if indices:
                stores = [members[i].store for i in indices]
                room = 0 if group_policy is None else capacity[0]
                self._join(LayerPositions(group_policy, indices, stores, **shape, capacity=room), members)
        super().__init__(layers=members)
        if rotary is not None:
            rotary.table(max(capacity) + 1)

    def _join(self, group: LayerPositions, members: list[Any]) -> None:
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
        return self.views_prompt or any(form.format.is_mixed for form in self.forms)

    def refuse_vectors(self) -> None:
        """Refuse keys and values that were not finite since the last call; waits for the device.

        Raises
        ------
        CaseInvalid
            If a format could not store one.
        """
        for form in self.forms:
            form.refuse()

    def turn(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[1, heads, n, head_dim]`` to ``positions`` ``[n]``, wherever they lie."""
        assert self.rotary is not None
        self.rotary.table(int(positions.max()) + 1)
        return self.rotary.rotate(vectors, positions)

    def set_images(self, images: ImageSpans) -> None:
        """Say where image tokens stand in the prompt that comes next: policies that merge treat them apart."""
        for group in self.groups:
            group.images = images

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
            group = LayerPositions(
                None, [index], [layer.store], batch=keys.shape[0], kv_heads=keys.shape[1], device=self._device
            )
            group.slots = keys.shape[2]
            self._join(group, self.layers)
            # layer by layer, so that only one of them exists twice
            source.keys = source.values = None

    def lengths(self) -> list[int]:
        """Stored tokens of every layer."""
        return [
            layer.group.length
            if isinstance(layer, EvictionLayer)
            else 0
            if (held := held_by(layer)) is None
            else int(held[0].shape[-2])
            for layer in self.layers
        ]

    def state_bytes(self) -> int:
        """Bytes of the states that recurrent layers carry: they hold no tokens, and do not grow."""
        return state_bytes(self._own.values())

    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of the distinct live storages, and the part of them that is planned headroom or a hole."""
        storages: dict[int, int] = {}
        headroom = 0
        for layer in self.layers:
            ours = isinstance(layer, EvictionLayer)
            for tensor in layer.tensors() if ours else held_by(layer) or ():
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
