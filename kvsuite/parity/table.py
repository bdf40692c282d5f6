"""The table of engines, and what stands below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvsuite.console import Column, Sheet, stacked

from .engine_result import REFERENCE, EngineResult

if TYPE_CHECKING:
    from rich.console import RenderableType

MISSING = "n/a"
_COLUMNS = (
    "Dtype", "Perplexity", f"vs {REFERENCE}", "Bound", "KLD", "Top-1", "KV B/token", "TTFT ms", "TPOT ms",
)  # fmt: skip


def parity_table(results: Sequence[EngineResult], about: str) -> RenderableType:
    """A line an engine, or why it has no numbers."""
    rows: list[tuple[str, Sequence[str] | str]] = [
        (one.engine, _cells(one) if one.state == "ok" else f"{one.state}: {one.reason}") for one in results
    ]
    return stacked(
        [about],
        [Sheet("Engine", [Column(title, 8) for title in _COLUMNS], rows, 9)],
        _notes(results),
        _verdicts(results),
    )


def _cells(one: EngineResult) -> list[str]:
    return [
        one.dtype or MISSING,
        _number(one.perplexity, ".4f"),
        "reference" if one.engine == REFERENCE else _difference(one),
        "" if one.engine == REFERENCE else "none" if one.bound is None else f"{one.bound:.2%}",
        "" if one.engine == REFERENCE else _number(one.kld, ".2e"),
        "" if one.engine == REFERENCE else _number(one.same_top1, ".1%"),
        _number(one.kv_bytes_token, ",.0f"),
        _number(None if one.ttft_s is None else 1e3 * one.ttft_s, ".2f"),
        _number(None if one.tpot_s is None else 1e3 * one.tpot_s, ".3f"),
    ]


def _difference(one: EngineResult) -> str:
    error = "" if one.difference_se is None else f" ± {one.difference_se:.3%}"
    return _number(one.difference, "+.3%") + (error if one.difference is not None else "")


def _number(value: float | None, spec: str) -> str:
    return MISSING if value is None else format(value, spec)


def _notes(results: Sequence[EngineResult]) -> list[str]:
    """Why numbers are missing: a line for each engine and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in results:
        for name, reason in one.unknown.items():
            found.setdefault((one.engine, reason), []).append(name)
    return [f"{engine}: no {', '.join(names)}: {reason}" for (engine, reason), names in found.items()]


def _verdicts(results: Sequence[EngineResult]) -> list[str]:
    return [
        f"{one.engine} promises {REFERENCE}'s perplexity within {one.bound:.2%} in {one.dtype} and differs by "
        f"{_difference(one)}, with a KL divergence of {_number(one.kld, '.2e')} nats"
        for one in results
        if one.exceeds and one.bound is not None and one.difference is not None
    ]
