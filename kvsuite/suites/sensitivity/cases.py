"""The sensitivity suite's space: uniform formats, each layer's keys and values alone in few bits, mixed assignments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.cache_formats.cache_format import CacheFormat, SideFormat
from kvsuite.cache_formats.chosen_format import PARAMETER, StoredFormat, refuse_long_residual, selected_cache_formats
from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.memory_model.config import architecture_of
from kvsuite.models.layers import ModelLayers
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.paths import expanded
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, dtype_of, selected_formats

from .assignment import KEYS, PLAIN, Assignment, lowerings
from .options import SensitivityOptions

#: what a case is: a format for all layers, one layer's keys or values in a format, an assignment
UNIFORM, LAYER, MIXED = "uniform", "layer", "mixed"


@dataclass(frozen=True)
class Formats:
    """What the options name.

    Parameters
    ----------
    base
        Keys and values of what an assignment does not lower.
    lower
        Formats that each layer's keys, and its values, take alone.
    """

    base: tuple[SideFormat, SideFormat]
    lower: tuple[tuple[SideFormat, SideFormat], ...]

    @classmethod
    def of(cls, options: Options) -> Formats:
        """Of a run.

        Raises
        ------
        UserError
            For a format that there is not, or that cannot be in one layer and not in another.
        """
        own = options.of(SensitivityOptions)
        return cls.named(own.sensitivity_base, own.sensitivity)

    @classmethod
    def named(cls, base: str, lower: tuple[str, ...]) -> Formats:
        """By their names, as `of` reads them."""
        pairs = [_read("--kv-sensitivity", typed) for typed in lower]
        if (PLAIN, PLAIN) in pairs:
            raise UserError(
                "--kv-sensitivity=auto: is what layers are compared with; give a packed format, such as int4"
            )
        if len(set(pairs)) < len(pairs):
            raise UserError(f"--kv-sensitivity={','.join(lower)}: names one format twice; name it once")
        kept = _read("--kv-sensitivity-base", base)
        groups = {side.token_group for pair in (*pairs, kept) for side in pair} - {1}
        if len(groups) > 1:
            raise UserError(
                f"--kv-sensitivity={','.join(lower)}: keys and values of a layer are packed together, so groups per channel "
                "must be equal in all formats and in --kv-sensitivity-base"
            )
        return cls(kept, tuple(pairs))

    def base_assignment(self, layers: int) -> Assignment:
        """All layers in the base."""
        return Assignment.uniform(layers, *self.base)

    def uniform(self) -> list[OwnFormat | None]:
        """Formats for all layers to compare with: the model's dtype, the base, each lower format for both and for one side."""
        pairs = [(PLAIN, PLAIN), self.base]
        for keys, values in self.lower:
            pairs += [(keys, values), (self.base[0], values), (keys, self.base[1])]
        return list(dict.fromkeys(Assignment.uniform(1, *pair).format for pair in pairs))


def _read(option: str, typed: str) -> tuple[SideFormat, SideFormat]:
    try:
        found = CacheFormat.parse(typed)
    except UserError as error:
        raise UserError(f"{option}={typed}: {error}") from None
    if found is not None and found.residual:
        raise UserError(
            f"{option}={typed}: layers in other formats have no residual window in common; leave residual out"
        )
    return (PLAIN, PLAIN) if found is None else (found.keys, found.values)


def sensitivity_cases(options: Options) -> list[Case]:
    """Cases of the suite: formats for all layers, each layer's keys and values in each format, an assignment a budget.

    Raises
    ------
    UserError
        Naming the option whose value cannot be.
    """
    common, own = options.of(CommonOptions), options.of(SensitivityOptions)
    formats = Formats.of(options)
    uniform: list[StoredFormat | None] = [*formats.uniform()]
    if "cache_dtype" in options.given:
        stores = selected_cache_formats(options)
        for stored in stores:
            refuse_long_residual(stored, own.sensitivity_tokens, "--kv-sensitivity-tokens")
        uniform = [stored.format for stored in stores]
    device = resolve_device(common.device)
    weights = selected_formats(options) or (NONE,)
    if len(weights) > 1:
        raise UserError(
            f"--kv-quantization={','.join(weights)}: the sensitivity suite takes one weight format a run; name one"
        )
    packed = None if weights[0] == NONE else weights[0]
    engine = "hf" if common.engine == "auto" else common.engine
    workload = {
        "corpus": common.corpus,
        "num_samples": common.num_samples,
        "max_tokens": own.sensitivity_tokens,
        "batch": 1,
    }
    return [
        Case(
            suite="sensitivity",
            engine=engine,
            model=common.model,
            name=name,
            device=device,
            dtype=dtype_of(options, device, weights[0]),
            quantization=packed,
            workload=workload,
            params=params | common.attention_parameters,
        )
        for name, params in _variants(common, own, formats, uniform)
    ]


def _variants(
    common: CommonOptions, own: SensitivityOptions, formats: Formats, uniform: list[StoredFormat | None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for stored in uniform:
        named = {} if stored is None else {PARAMETER: str(stored)}
        yield "auto" if stored is None else stored.label, {"kind": UNIFORM, "base": own.sensitivity_base} | named
    of = _layers(common)
    plain = Assignment.uniform(0 if of is None else len(of.layers))
    for lowering in [] if of is None else lowerings(of, formats.lower):
        side, layer, chosen = lowering
        params = {"kind": LAYER, "side": side, "layer": layer, "format": str(chosen)}
        yield (
            f"{chosen}_{'k' if side == KEYS else 'v'}{layer:02}",
            params | {PARAMETER: str(plain.lowered(lowering).format)},
        )
    for number, unit in own.sensitivity_budget:
        shown = f"{number:g}bits" if unit == "bits" else f"{number:g}percent"
        yield (
            f"mixed_{shown}",
            {
                "kind": MIXED, "base": own.sensitivity_base, "formats": list(own.sensitivity), "budget": number,
                "unit": unit,
            },
        )  # fmt: skip


def _layers(common: CommonOptions) -> ModelLayers | None:
    """Layers of the model, ``None`` of one that is not here yet: its mixed assignments measure them, or say why they cannot."""
    cache_dir = None if common.cache_dir is None else expanded(common.cache_dir)
    try:
        found = architecture_of(common.model, cache_dir=cache_dir).cache
    except UserError:
        return None
    return None if isinstance(found, str) else found
