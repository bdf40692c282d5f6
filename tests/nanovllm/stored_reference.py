"""What a runtime gave against a plain forward pass in float32 over the very keys and values that it had stored.

A reference that packs keys of its own differs by more than rounding: a little noise puts a number into the neighbouring code
now and then, which in 4 bits moves logits by several per cent. Over the stored codes nothing is left but the runtime's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvsuite.cache_formats.cache_format import SideFormat
from kvsuite.cache_formats.pack import Packed, pack, unpack
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.layer_pages import LayerPages
from kvsuite.nanovllm.paged_attention import attending
from kvsuite.nanovllm.reference_attention import visible
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runner import ModelRunner
from kvsuite.nanovllm.runtime import Runtime


@dataclass(frozen=True)
class _Given:
    """Logits ``[vocab]`` of a request's last token, and what its row held: ``[kv_heads, n, head_dim]`` by side and layer."""

    tokens: list[int]
    logits: Tensor
    stored: tuple[list[Tensor], list[Tensor]]
    dropped: int


class _StoredAttention:
    """Attention over tensors that are there; notes what it was to write."""

    def __init__(self, stored: tuple[list[Tensor], list[Tensor]], mask: Tensor | None) -> None:
        self._stored, self._mask = stored, mask
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, batch: Any) -> None:
        raise NotImplementedError

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.written[layer] = key.transpose(0, 1), value.transpose(0, 1)

    def attend(self, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        keys, values = (side[layer] for side in self._stored)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(0, 1), keys, values, attn_mask=self._mask, scale=scale, enable_gqa=True,
            is_causal=self._mask is None and len(query) > 1,
        )  # fmt: skip
        return mixed.transpose(0, 1)


class StoredReference:
    """Looks at every logits of a runtime with one layer group and forced outputs; `errors` when the runtime is closed."""

    def __init__(self, runtime: Runtime) -> None:
        (self._pool,), (self._table,) = runtime.pools, runtime.tables
        self._given: list[_Given] = []
        runtime.on_logits = self

    def __call__(self, requests: Sequence[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            slots = torch.from_numpy(self._table.stored_slots(request.row)).to(self._pool.device)
            layers = [self._pool.layer(index) for index in range(len(self._pool.group.layers))]
            keys, values = zip(*((_unpacked(own, slots), _unpacked(its, slots)) for own, its in layers), strict=True)
            dropped = int(self._table.dropped[request.row])
            tokens = list(request.tokens[: request.computed])
            self._given.append(_Given(tokens, row.float().cpu(), (list(keys), list(values)), dropped))

    def errors(self, of: LoadedModel) -> tuple[float, float]:
        """Largest relative error of any logits, and of any stored vector beyond what its format takes.

        Parameters
        ----------
        of
            The runtime's model, in float32 on the CPU.
        """
        assert self._given
        worst = [self._errors(of, given) for given in self._given]
        return max(logits for logits, _ in worst), max(stored for _, stored in worst)

    def farthest(self, other: StoredReference) -> float:
        """Largest relative distance of what the same step of another runtime held of a token: about 1.4 of two tokens.

        `errors` takes what is held as it comes, whichever tokens it is that a policy or a window left.
        """
        others = {tuple(given.tokens): given for given in other._given}
        assert others.keys() == {tuple(given.tokens) for given in self._given}
        worst = 0.0
        for given in self._given:
            for side, expected in zip(given.stored, others[tuple(given.tokens)].stored, strict=True):
                # layers and heads of a token together
                found, wanted = (torch.stack(layers).transpose(1, 2).flatten(2) for layers in (side, expected))
                assert found.shape == wanted.shape
                worst = max(worst, ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item())
        return worst

    def _errors(self, of: LoadedModel, given: _Given) -> tuple[float, float]:
        length = given.stored[0][0].shape[1]
        # where something is gone, what earlier tokens saw is not known
        count = length if length == len(given.tokens) else 1
        mask = visible(self._pool.group, count, length, given.dropped, self._pool.block_size, torch.device("cpu"))
        attention = _StoredAttention(given.stored, mask)
        positions = torch.arange(len(given.tokens))[-count:]
        runner = ModelRunner(of, attention)
        try:
            with torch.inference_mode(), attending(attention):
                ids = torch.tensor([given.tokens[-count:]])
                found = of.model(input_ids=ids, position_ids=positions[None], use_cache=False).logits[0, -1]
        finally:
            runner.close()
        assert torch.isfinite(given.logits).all()
        pages = self._pool.layer(0)
        beyond = max(
            _beyond(pages[side].side, given.stored[side][layer][:, -count:], written[side])
            for layer, written in attention.written.items()
            for side in (0, 1)
        )
        return ((given.logits - found).norm() / found.norm()).item(), beyond


def _unpacked(pages: LayerPages, slots: Tensor) -> Tensor:
    codes = pages.codes.flatten(0, 1)[slots].cpu()
    if not pages.side.is_packed:
        return codes.float().transpose(0, 1)
    return unpack(pages.side, Packed(codes, pages.scales.flatten(0, 1)[slots].cpu()), torch.float32).transpose(0, 1)


def _beyond(side: SideFormat, stored: Tensor, own: Tensor) -> float:
    """Largest error of stored vectors ``[..., head_dim]`` relative to their norm, less that of packing them."""
    packing = (unpack(side, pack(side, own), own.dtype) - own if side.is_packed else torch.zeros_like(own)).norm(dim=-1)
    return (((stored - own).norm(dim=-1) - packing) / own.norm(dim=-1)).max().item()
