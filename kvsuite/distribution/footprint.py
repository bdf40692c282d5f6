"""Memory of a case before it runs: predicted where there is a model, else no less than weights and cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvsuite.case import Case
from kvsuite.engines.registry import get_engine
from kvsuite.errors import UserError
from kvsuite.memory_model.config import architecture_of
from kvsuite.memory_model.formats import nano_format
from kvsuite.memory_model.prediction import Predictor
from kvsuite.options.common import CommonOptions
from kvsuite.options.paths import expanded
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, quantization
from kvsuite.suites.dse.cases import DSE, judge, point_of

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
        return "yes" if self.is_whole else "likely"


def footprint(case: Case, options: Options) -> Footprint:
    """Memory of ``case`` from its model's configuration alone; what cannot be known has a reason."""
    cache_dir = options.of(CommonOptions).cache_dir
    try:
        architecture = architecture_of(case.model, cache_dir=None if cache_dir is None else expanded(cache_dir))
    except UserError as error:
        return Footprint(reason=str(error))
    if isinstance(architecture.weights, str):
        return Footprint(reason=architecture.weights)
    dtype = _CHECKPOINT if case.dtype == "checkpoint" else case.dtype
    chosen = case.quantization or NONE
    # what only rounds weights keeps them dense
    dense = quantization(chosen).quality_only
    try:
        format_ = nano_format(NONE if dense else chosen, dtype)
    except UserError as error:
        return Footprint(elements=architecture.weights.elements, reason=str(error))
    weights = architecture.weights.bytes(format_)
    if weights is None:
        return Footprint(elements=architecture.weights.elements, reason=f"the layout of {chosen} is not known")
    known = Footprint(weight_bytes=weights, elements=architecture.weights.elements, bytes=weights)
    if case.suite == DSE:
        predictor = get_engine(case.engine, options).memory_model(architecture, case)
        if predictor is not None:
            return _of_point(case, predictor, known)
    if isinstance(architecture.cache, str):
        return replace(known, reason=architecture.cache)
    cache = architecture.kv_bytes(_tokens(case), format_.element_bytes)
    return Footprint(known.weight_bytes, known.elements, weights + cache)


def _of_point(case: Case, predictor: Predictor, known: Footprint) -> Footprint:
    architecture = predictor.architecture
    broken = judge(case, architecture.trained_length, is_dummy=architecture.is_dummy).broken
    if broken:
        return Footprint(known.weight_bytes, known.elements, 0.0, True, reason="; ".join(broken))
    try:
        found = predictor.predict(point_of(case))
    except UserError as error:
        return replace(known, reason=str(error))
    share = 1.0 if case.device_kind == "cpu" else predictor.share
    reason = "; ".join(found.reasons) or None
    return Footprint(known.weight_bytes, known.elements, found.needed_at_least, found.needed is not None, share, reason)


def _tokens(case: Case) -> int:
    """Tokens of the largest cache that is alive at once: the prompt is whole before anything is removed from it."""
    workload = case.workload
    spoken = int(workload.get("prompt_tokens", 0)) + int(workload.get("max_new_tokens", 0))
    return max(spoken, int(workload.get("max_tokens") or 0), int(workload.get("max_length") or 0))
