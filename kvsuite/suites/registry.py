"""Suites by name: which space gives their cases, and how a run of theirs is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.options.resolve import Options

from .compression.cases import compression_cases, method_name
from .dse.cases import DSE, dse_cases
from .perplexity.cases import perplexity_cases

SPACES: dict[str, Callable[[Options], list[Case]]] = {
    "compression": compression_cases,
    "perplexity": perplexity_cases,
    DSE: dse_cases,
}
RUN_NAMES: dict[str, Callable[[Options], str]] = {"compression": method_name}
# suites of which nothing is left without trained weights
_QUALITY_ALONE = ("perplexity",)


def cases_of(suite: str, options: Options) -> list[Case]:
    """Cases of ``suite`` in the space's order.

    Raises
    ------
    UserError
        For an unknown suite, or options that give no case.
    """
    if suite not in SPACES:
        raise UserError(f"kv_suite({suite!r}): unknown suite; known: {', '.join(sorted(SPACES))}")
    cases = SPACES[suite](options)
    if not cases:
        raise UserError(f"suite {suite}: the options leave no case; drop --kv-no-baseline or name a --kv-method")
    return cases


def require_measurable(cases: Sequence[Case]) -> None:
    """Refuse a selection of which no case can say anything.

    Raises
    ------
    UserError
        If all cases ask for quality alone, of a model with random weights.
    """
    if cases and all(case.suite in _QUALITY_ALONE and case.model.startswith("dummy:") for case in cases):
        raise UserError(
            f"--kv-model={cases[0].model}: random weights have no perplexity, and nothing else is selected; name a real "
            "model"
        )
