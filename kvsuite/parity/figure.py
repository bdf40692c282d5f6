"""The figure of engines: a panel for each number, a bar for each engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvsuite.reporting.figure_style import BLUE, GREEN, GREY, RED, figure_bytes, house_style, three_digits

from .engine_result import EngineResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS: tuple[tuple[str, Callable[[float], str], Callable[[EngineResult], float | None]], ...] = (
    (
        "Perplexity, difference (%)\nbracket: what is promised",
        lambda number: f"{number:+.3f}",
        lambda one: None if one.difference is None else 100 * one.difference,
    ),
    ("KL divergence (nats)", lambda number: f"{number:.1e}", lambda one: one.kld),
    ("KV bytes a token", lambda number: f"{number:,.0f}", lambda one: one.kv_bytes_token),
    ("TTFT (ms)", three_digits, lambda one: None if one.ttft_s is None else 1e3 * one.ttft_s),
    ("TPOT (ms)", three_digits, lambda one: None if one.tpot_s is None else 1e3 * one.tpot_s),
)


def parity_figure(results: Sequence[EngineResult], about: str) -> dict[str, bytes]:
    """``parity.png`` and ``parity.svg``: what an engine has no number for says ``n/a``, the reason is in the table."""
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=(3.1 * len(_PANELS), 1.6 + 0.45 * len(results)), layout="constrained")
        panels = figure.subplots(1, len(_PANELS), sharey=True)
        for axes, (title, written, value) in zip(panels, _PANELS, strict=True):
            _draw(axes, results, title, written, [value(one) for one in results])
        panels[0].set_yticks(range(len(results)), [one.engine for one in results])
        panels[0].set_ylim(len(results) - 0.4, -0.6)
        _draw_bounds(panels[0], results)
        figure.suptitle(about, fontsize=11)
        return {f"parity.{kind}": figure_bytes(figure, kind, dpi=150) for kind in ("png", "svg")}


def _draw(
    axes: Axes,
    results: Sequence[EngineResult],
    title: str,
    written: Callable[[float], str],
    values: Sequence[float | None],
) -> None:
    for place, (one, value) in enumerate(zip(results, values, strict=True)):
        if value is None:
            is_reference = one.state == "ok" and not place
            axes.annotate(
                "reference" if is_reference else "n/a",
                (0, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=GREY,
            )
            continue
        axes.barh(place, value, 0.6, color=RED if one.exceeds else GREEN if not place else BLUE)
        axes.annotate(
            written(value), (max(value, 0), place), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.35)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=4)


def _draw_bounds(axes: Axes, results: Sequence[EngineResult]) -> None:
    """What each engine promises, as a bracket around 0."""
    for place, one in enumerate(results):
        if one.bound is not None and one.difference is not None:
            axes.plot(
                [-100 * one.bound, 100 * one.bound], [place + 0.4] * 2, "|-", color="black", linewidth=1, markersize=6
            )
