"""A cache format for each layer, and the bytes of formats on a model. Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvsuite.errors import CaseInvalid
from kvsuite.foreign_text import VALUE_LIMIT, visible
from kvsuite.models.layers import ModelLayers
from kvsuite.options.numbers import whole
from kvsuite.options.paths import expanded

from .cache_format import AUTO, CacheFormat, wrong_format
from .cast_format import CastFormat
from .ggml_format import GgmlFormat

#: the word with which such a format begins
BY_LAYER = "by_layer"
_TIMES, _NEXT = "*", "|"
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class ByLayerFormat:
    """A format for each layer.

    Parameters
    ----------
    layers
        In order; ``None`` is the model's own dtype.
    """

    layers: tuple[CacheFormat | None, ...]

    @property
    def token_group(self) -> int:
        """Most tokens that a layer packs together, 1 where each is on its own."""
        return max(one.token_group for one in self.layers if one is not None)

    @property
    def is_mixed(self) -> bool:
        """Whether a query of some layer sees some tokens in the model's dtype."""
        return any(one.is_mixed for one in self.layers if one is not None)

    @property
    def residual(self) -> int:
        """Tokens of the longest residual window."""
        return max(one.residual for one in self.layers if one is not None)

    def of_layers(self, layers: int) -> tuple[CacheFormat | None, ...]:
        """The format of each of the model's ``layers`` layers.

        Raises
        ------
        CaseInvalid
            If it is for another number.
        """
        if len(self.layers) != layers:
            raise CaseInvalid(
                f"--kv-cache-dtype={self.label}: names formats for {len(self.layers)} layers, and the model has {layers}; "
                "name one for each"
            )
        return self.layers

    @property
    def label(self) -> str:
        """What stands in names of cases and in tables: the formats would be too long."""
        return f"{BY_LAYER}-{hashlib.sha256(str(self).encode()).hexdigest()[:8]}"

    def __str__(self) -> str:
        """The name, the same for every way to write the format: of layers in a row that are alike, one and their number."""
        runs = [(str(one or AUTO), len(list(run))) for one, run in itertools.groupby(self.layers)]
        return f"{BY_LAYER}({_NEXT.join(name if count == 1 else f'{name}{_TIMES}{count}' for name, count in runs)})"

    @classmethod
    def parse(cls, typed: str) -> ByLayerFormat:
        """Read ``by_layer(int8*4|int8:int4*26)``, or ``by_layer(FILE.json)`` with a list of a name for each layer.

        Raises
        ------
        UserError
            For a format that there is not, or a file that is no such list.
        """
        inside = typed.strip().removeprefix(f"{BY_LAYER}(").removesuffix(")")
        if typed.strip() != f"{BY_LAYER}({inside})":
            raise wrong_format(typed, f"write {BY_LAYER}(FORMAT{_TIMES}LAYERS{_NEXT}...), or {BY_LAYER}(FILE.json)")
        names: list[str] = []
        if inside.strip().endswith(".json"):
            names = _listed(typed, inside.strip())
        else:
            for part in inside.split(_NEXT):
                name, times, count = part.partition(_TIMES)
                try:
                    names += [name] * (whole(count.strip(), 1, _MOST_LAYERS) if times else 1)
                except ValueError as error:
                    raise wrong_format(typed, f"{visible(part, VALUE_LIMIT)}: {error}") from None
        layers = tuple(CacheFormat.parse(name) for name in names)
        if not any(layers):
            raise wrong_format(typed, "no layer has another format than auto; leave it at --kv-cache-dtype=auto")
        return cls(layers)


def _listed(typed: str, path: str) -> list[str]:
    try:
        found = json.loads(Path(expanded(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise wrong_format(
            typed, f"cannot be read ({' '.join(str(error).split())}); give a JSON file with a format for each layer"
        ) from None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise wrong_format(typed, "is no JSON list with the name of a format for each layer")
    return found


#: formats that are packed and unpacked here
OwnFormat = CacheFormat | ByLayerFormat
#: formats of which a layer's bytes are known
CountedFormat = OwnFormat | GgmlFormat | CastFormat


def kv_bytes(
    chosen: CountedFormat | None, of: ModelLayers, tokens_per_layer: Sequence[int], seen: int, element_bytes: int
) -> int:
    """Bytes of the keys and values of one sequence of ``seen`` tokens where each layer holds so many of them.

    The one formula for what is stored, planned and predicted; without a format `ModelLayers.kv_bytes`.
    """
    if chosen is None:
        return of.kv_bytes(tokens_per_layer, element_bytes)
    formats: Sequence[CacheFormat | GgmlFormat | CastFormat | None] = chosen.of_layers(len(of.layers))
    plain = [tokens if one is None else 0 for one, tokens in zip(formats, tokens_per_layer, strict=True)]
    return of.kv_bytes(plain, element_bytes) + sum(
        one.layer_bytes(
            tokens, seen, kv_heads=layer.kv_heads, key_dim=layer.key_dim, value_dim=layer.value_dim,
            element_bytes=element_bytes,
        )
        for layer, one, tokens in zip(of.layers, formats, tokens_per_layer, strict=True)
        if one is not None and layer.attention
    )  # fmt: skip


def refused_heads(chosen: OwnFormat, of: ModelLayers) -> str | None:
    """Why a model has not the layers, or the head sizes, for a format; ``None`` if it has."""
    try:
        formats = chosen.of_layers(len(of.layers))
    except CaseInvalid as error:
        return str(error).removeprefix(f"--kv-cache-dtype={chosen.label}: ")
    for layer, own in zip(of.layers, formats, strict=True):
        if own is not None and layer.attention and (reason := own.refused(layer.key_dim, layer.value_dim)):
            return reason
    return None
