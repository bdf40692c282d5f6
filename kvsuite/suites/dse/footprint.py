"""Memory of a design point before it runs: what its engine's formulas predict."""

from __future__ import annotations

from dataclasses import replace

from kvsuite.case import Case
from kvsuite.engines.registry import get_engine
from kvsuite.errors import UserError
from kvsuite.options.resolve import Options
from kvsuite.suites.footprint import Footprint, known_model, weights_and_cache

from .cases import judge, point_of


def point_footprint(case: Case, options: Options) -> Footprint:
    """What the engine predicts for the point of ``case``; no less than weights and cache where it has no formulas."""
    model = known_model(case, options)
    if isinstance(model, Footprint):
        return model
    predictor = get_engine(case.engine, options).memory_model(model.architecture, case)
    if predictor is None:
        return weights_and_cache(case, options)
    known, architecture = model.weights, predictor.architecture
    broken = judge(case, architecture.trained_length, is_dummy=architecture.is_dummy).broken
    if broken:
        return replace(known, bytes=0.0, is_whole=True, reason="; ".join(broken))
    try:
        found = predictor.predict(point_of(case))
    except UserError as error:
        return replace(known, reason=str(error))
    return replace(
        known,
        # buffers alone are no bound worth a number
        bytes=found.needed_at_least if known.weight_bytes or found.allocation is not None else None,
        is_whole=found.needed is not None,
        share=1.0 if case.device_kind == "cpu" else predictor.share,
        reason="; ".join(found.reasons) or None,
    )
