"""Shows a policy the queries of prompts, as steps compute them: in chunks, beside the tokens of other sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvsuite.compression.base import Needs
from kvsuite.compression.prompt_view import PromptObservation, Turn

from .batch import StepBatch
from .kv_pool import KVPool
from .paged_attention import AttentionBackend
from .pooled_prompt import attention_sums_of
from .reference_attention import KeyRotation, slots_of
from .request import Request


class PromptObserver:
    """Gathers what a policy asks for, for every sequence whose prompt is being computed.

    Parameters
    ----------
    needs
        What the policy looks at.
    pools
        Keys and values of every layer group.
    rotation
        Turns keys and queries; needed where keys are stored unrotated, or queries are asked for before rotation.
    longest
        Tokens of a sequence at most.
    """

    def __init__(self, needs: Needs, pools: Sequence[KVPool], rotation: KeyRotation | None, longest: int) -> None:
        self._needs = needs
        self._rotation = rotation
        self._unrotate = None if rotation is None else rotation.unrotate
        if rotation is not None:
            rotation.table(longest + 1 + needs.beyond)
        #: layers of the model
        self.layers = sum(len(pool.group.layers) for pool in pools)
        self._where = {
            layer: (number, index, pool)
            for number, pool in enumerate(pools)
            if pool.group.compressed
            for index, layer in enumerate(pool.group.layers)
        }
        self._gathered: dict[int, dict[int, PromptObservation]] = {}
        self._prompts: list[tuple[int, int]] = []

    @property
    def active(self) -> bool:
        """Whether the step under way computes tokens of a prompt: it must not be replayed from a graph."""
        return bool(self._prompts)

    def begin(self, requests: Sequence[Request]) -> None:
        """Learn the requests of the next step, in their order, before their tokens are counted."""
        self._prompts = [
            (at, request.row) for at, request in enumerate(requests) if request.computed < request.prompt_length
        ]

    def end(self) -> None:
        """The step is over: what is computed from now on belongs to nobody."""
        self._prompts = []

    def around(self, backend: AttentionBackend, batch: StepBatch) -> AttentionBackend:
        """The attention of this step, which shows the queries of its prompts."""
        return _Observed(self, backend, batch) if self._prompts and self._needs.looks_at_queries else backend

    def observations(self, row: int, layers: Sequence[int]) -> list[PromptObservation]:
        """What was gathered of a sequence's prompt in some layers."""
        gathered = self._gathered.get(row, {})
        return [gathered.get(layer) or PromptObservation(self._needs) for layer in layers]

    def take(self, row: int, layers: Sequence[int]) -> list[PromptObservation]:
        """`observations`, which are forgotten here."""
        found = self.observations(row, layers)
        for layer in layers:
            self._gathered.get(row, {}).pop(layer, None)
        return found

    def leave(self, row: int) -> None:
        """Forget a sequence whose blocks were given back."""
        self._gathered.pop(row, None)

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[1, heads, n, head_dim]`` to ``positions`` ``[n]``, none further behind a prompt than `Needs.beyond`."""
        assert self._rotation is not None
        return self._rotation.rotate(vectors, positions)

    def turn(self, layer: int) -> Turn | None:
        """`rotate` for a layer, where there is something to rotate with; nothing turns where the model does not rotate."""
        if not self._where[layer][2].group.rotary:
            return _unturned
        return None if self._rotation is None else self.rotate

    def see(self, layer: int, query: Tensor, scale: float, batch: StepBatch) -> None:
        """Take the queries ``[T, heads, head_dim]`` of one layer."""
        if layer not in self._where:
            return
        number, index, pool = self._where[layer]
        starts = batch.query_start_host.tolist()
        for at, row in self._prompts:
            seen = self._gathered.setdefault(row, {}).setdefault(
                layer,
                PromptObservation(
                    self._needs, self._unrotate if pool.group.rotary else _unturned, attention_sums_of(pool)
                ),
            )

            def keys(at: int = at) -> Tensor:
                part = batch.groups[number]
                length = int(part.kv_lengths_host[at])
                slots = slots_of(part.block_tables[at], length, pool.block_size)
                own = pool.keys_of(slots, slice(index, index + 1))[0]
                if not pool.group.places:
                    return own
                # of a prompt under way every token stands at its own position
                assert self._rotation is not None
                return self._rotation.rotate(own[None], torch.arange(length, device=own.device))[0]

            seen.add(query[starts[at] : starts[at + 1]].transpose(0, 1), keys, scale)


def _unturned(vectors: Tensor, positions: Tensor) -> Tensor:
    return vectors


class _Observed:
    """An attention that shows queries before it computes."""

    def __init__(self, observer: PromptObserver, backend: AttentionBackend, batch: StepBatch) -> None:
        self._observer, self._backend, self._batch = observer, backend, batch

    def attend(self, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        self._observer.see(layer, query, scale, self._batch)
        return self._backend.attend(layer, query, scale, out)

    def begin(self, batch: StepBatch) -> None:
        self._backend.begin(batch)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._backend.write(layer, key, value)

    def __getattr__(self, name: str) -> Any:
        # where the attention stores keys itself it has a `destination`
        return getattr(self._backend, name)
