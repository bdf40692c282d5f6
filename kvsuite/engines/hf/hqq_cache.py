"""transformers' own quantised cache with hqq, as a foreign reference beside kvsuite's formats."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import QuantizedCache

from kvsuite.cache_formats.chosen_format import HqqFormat
from kvsuite.errors import CaseSkipped

INSTALL = "pip install hqq==0.2.8.post1"


def require_hqq(chosen: HqqFormat) -> None:
    """Skip where hqq is not installed.

    Raises
    ------
    CaseSkipped
        With the install line.
    """
    if importlib.util.find_spec("hqq") is None:
        raise CaseSkipped(f"--kv-cache-dtype={chosen} needs hqq, which is not installed; run: {INSTALL}")


class HqqCache(QuantizedCache):  # type: ignore[misc]
    """The cache with the `begin` and `commit` of `kvsuite.engines.hf.cache.EvictionCache`; nothing else is added."""

    #: nothing looks at what the attention gets
    is_shown = is_uneven = False

    def __init__(self, chosen: HqqFormat, config: Any, device: torch.device) -> None:
        super().__init__(
            "hqq", config, nbits=chosen.bits, axis_key=1, axis_value=1, q_group_size=chosen.group,
            residual_length=chosen.residual,
        )  # fmt: skip
        self._device = device

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return int(self.layers[0].cumulative_length)

    def begin(self, tokens: int) -> Tensor:
        """Position ids of ``tokens`` new tokens, int64 ``[1, tokens]``."""
        return torch.arange(self.seen, self.seen + tokens, device=self._device)[None]

    def commit(self) -> None:
        """Nothing is left to do."""

    def lengths(self) -> list[int]:
        """Stored tokens of every layer."""
        return [int(layer.cumulative_length) for layer in self.layers]

    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of the distinct live storages, scales and zero points included; nothing of them is headroom."""
        tensors: list[Tensor] = []
        for layer in self.layers:
            tensors += [one for one in (layer.keys, layer.values) if one is not None]
            for packed in (layer._quantized_keys, layer._quantized_values):
                if packed is not None:
                    codes, meta = packed
                    tensors += [codes, meta["scale"], meta["zero"]]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if one.numel()}
        return sum(storages.values()), 0
