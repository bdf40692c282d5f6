"""Memory of a case before it runs, from its model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvsuite.cache_formats.chosen_format import HqqFormat, format_of
from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.memory_model.cache_room import kv_bytes
from kvsuite.memory_model.config import Architecture, architecture_of
from kvsuite.memory_model.formats import WeightFormat, nano_format
from kvsuite.options.common import CommonOptions
from kvsuite.options.paths import expanded
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, quantization

#: dtype of checkpoints that say theirs only when they are loaded
_CHECKPOINT = "bfloat16"


@dataclass(frozen=True)
class Footprint:
    """What a case needs.

    Parameters
    ----------
    weight_bytes, elements
        Of the model in the case's weight format; 0 where they are not known.
    bytes
        All that is known of its memory, ``None`` if nothing is.
    is_whole
        Whether ``bytes`` is a prediction of all of it, and no lower bound.
    share
        Part of the device that the engine may use, in (0, 1].
    reason
        Why something is not known.
    """

    weight_bytes: int = 0
    elements: int = 0
    bytes: float | None = None
    is_whole: bool = False
    share: float = 1.0
    reason: str | None = None

    def fits(self, card_bytes: int) -> str:
        """``yes``, ``no``, ``likely`` (a lower bound fits) or ``unknown``."""
        if self.bytes is None:
            return "unknown"
        if self.bytes > card_bytes * self.share:
            return "no"
        if self.is_whole:
            return "yes"
        # without the weights the bound says little
        return "likely" if self.weight_bytes else "unknown"


@dataclass(frozen=True)
class KnownModel:
    """A model whose memory can be told before it is loaded."""

    architecture: Architecture
    format: WeightFormat
    weights: Footprint


def known_model(case: Case, options: Options) -> KnownModel | Footprint:
    """The model of ``case`` in its weight format; where something of it is not known, what is, with the reason."""
    cache_dir = options.of(CommonOptions).cache_dir
    try:
        architecture = architecture_of(case.model, cache_dir=None if cache_dir is None else expanded(cache_dir))
    except UserError as error:
        return Footprint(reason=str(error))
    shapes = architecture.weights
    elements = 0 if isinstance(shapes, str) else shapes.elements
    dtype = _CHECKPOINT if case.dtype == "checkpoint" else case.dtype
    chosen = case.quantization or NONE
    # what only rounds weights keeps them dense
    dense = quantization(chosen).quality_only
    try:
        format_ = nano_format(NONE if dense else chosen, dtype)
    except UserError as error:
        return Footprint(elements=elements, reason=str(error))
    weights = None if isinstance(shapes, str) else shapes.bytes(format_)
    if weights is None:
        reason = shapes if isinstance(shapes, str) else f"the layout of {chosen} is not known"
        return KnownModel(architecture, format_, Footprint(elements=elements, reason=reason))
    known = Footprint(weight_bytes=weights, elements=elements, bytes=weights)
    return KnownModel(architecture, format_, known)


def weights_and_cache(case: Case, options: Options) -> Footprint:
    """No less than the weights and the largest cache of ``case``, by its workload."""
    known = known_model(case, options)
    if isinstance(known, Footprint):
        return known
    if isinstance(known.architecture.cache, str):
        return replace(known.weights, reason=known.weights.reason or known.architecture.cache)
    chosen = format_of(case)
    if isinstance(chosen, HqqFormat):
        return replace(known.weights, reason=known.weights.reason or "transformers decides what its packed cache takes")
    cache = kv_bytes(known.architecture, _tokens(case), known.format.element_bytes, chosen)
    return replace(known.weights, bytes=known.weights.weight_bytes + cache)


def _tokens(case: Case) -> int:
    """Tokens of the largest cache that is alive at once: the prompt is whole before anything is removed from it."""
    workload = case.workload
    spoken = int(workload.get("prompt_tokens", 0)) + int(workload.get("max_new_tokens", 0))
    return max(spoken, int(workload.get("max_tokens") or 0), int(workload.get("max_length") or 0))
