"""Tilings of products that need no trying: those kept from a trial on this machine, else a table for devices like it.

Importing this module needs triton.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kvsuite.kernel_builds import BUILDS
from kvsuite.models.smollm2 import cache_root

from . import row_linear
from .fused_layers import PRODUCTS, FusedDecoder, rows_bucket
from .kept_entries import add_entries, read_entries
from .row_linear import MOST_ROWS, Tiling
from .tiling_choice import CANDIDATES, choose_tilings

#: of the devices with this capability: those that won for Qwen3-8B on an H200. Others take torch's products
_CAPABILITY = (9, 0)
_THREE = Tiling(block_n=64, parts=3, block_k=64, splits=1, warps=4, stages=5)
_DEEP = Tiling(block_n=64, parts=1, block_k=128, splits=4, warps=4, stages=4)
_TABLE: dict[int, dict[str, Tiling]] = {
    16: {
        "qkv": replace(_THREE, splits=4),
        "output": _DEEP,
        "gate_up": _THREE,
        "down": _DEEP,
        "final": Tiling(block_n=128, parts=1, block_k=128, splits=1, warps=8, stages=3),
    },
    32: {"qkv": replace(_THREE, splits=4), "output": _DEEP, "gate_up": _THREE, "down": _DEEP, "final": _THREE},
    64: {
        "qkv": replace(_DEEP, splits=1),
        "output": replace(_DEEP, splits=2),
        "gate_up": _THREE,
        "down": replace(_DEEP, splits=2),
        "final": _THREE,
    },
}


def set_tilings(decoder: FusedDecoder, rows: Iterable[int], *, build: bool) -> list[int]:
    """Set ``decoder.tilings`` for steps of ``rows`` rows; return the row counts for which none was tried on this machine.

    Parameters
    ----------
    decoder
        On a CUDA device.
    rows
        Of steps.
    build
        Whether those are tried now, and kept in kvsuite's cache folder.
    """
    kept = KeptTilings(decoder, cache_root())
    buckets = sorted({rows_bucket(count) for count in rows if count <= MOST_ROWS})
    untried = [bucket for bucket in buckets if not kept.apply(decoder, bucket)]
    if untried and build:
        choose_tilings(decoder, untried)
        try:
            kept.keep(decoder, untried)
        except (OSError, NotImplementedError) as error:
            # they serve this process all the same
            BUILDS.say(f"tried tilings are not kept: {kept.path.parent} cannot be written or locked ({error})")
        return []
    capability = torch.cuda.get_device_capability(decoder.device)
    for bucket in untried:
        for product in PRODUCTS:
            decoder.tilings[product, bucket] = _from_table(decoder, product, bucket, capability)
    return untried


def _from_table(decoder: FusedDecoder, product: str, bucket: int, capability: tuple[int, int]) -> Tiling | None:
    found = _TABLE.get(bucket, {}).get(product) if capability == _CAPABILITY else None
    if found is None:
        return None
    features, width = decoder.weights(product)[0].shape
    gated = product == "gate_up"
    return found if found.fits(features // 2 if gated else features, width, gated) else None


class KeptTilings:
    """What trials on a device like the decoder's found, in a file of the cache folder.

    Parameters
    ----------
    decoder
        Gives device, dtype and shapes.
    root
        The cache folder.
    """

    def __init__(self, decoder: FusedDecoder, root: Path) -> None:
        import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

        device = torch.cuda.get_device_name(decoder.device)
        # another kernel, other candidates or another compiler make another choice
        made_of = (Path(row_linear.__file__).read_text(), CANDIDATES, triton.__version__, torch.__version__, device)
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
        self.path = root / "tilings" / f"{device.replace(' ', '-').replace('/', '-')}-{digest}.json"
        self._found = read_entries(self.path)

    def apply(self, decoder: FusedDecoder, bucket: int) -> bool:
        """Set the tilings of all products at a row count; ``False``, and nothing done, where they are not all known."""
        names = {product: _name(decoder, product, bucket) for product in PRODUCTS}
        if not self._found.keys() >= set(names.values()):
            return False
        for product, name in names.items():
            found = self._found[name]
            decoder.tilings[product, bucket] = None if found is None else Tiling(**found)
        return True

    def keep(self, decoder: FusedDecoder, buckets: Iterable[int]) -> None:
        """Keep what the decoder has for some row counts. Another process may keep its own at the same time."""
        chosen = {
            _name(decoder, product, bucket): decoder.tilings[product, bucket]
            for bucket in buckets
            for product in PRODUCTS
        }
        tried = {name: None if tiling is None else asdict(tiling) for name, tiling in chosen.items()}
        self._found = add_entries(self.path, tried)


def _name(decoder: FusedDecoder, product: str, bucket: int) -> str:
    weights = decoder.weights(product)
    features, width = weights[0].shape
    return f"{product} {features}x{width} {str(decoder.dtype).removeprefix('torch.')}, {len(weights)} layers, {bucket} rows"
