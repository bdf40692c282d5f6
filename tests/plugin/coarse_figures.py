"""Figures of tests have few pixels: rendering and packing those of print is half of the time of a run that draws.

What a figure says and where stands in its SVG too; pixels at full resolution are compared where a recorded run is drawn again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

_DPI = 40
_fine: list[Callable[..., None]] = []


def draw_coarsely() -> None:
    """From here on every PNG of this process has at most `_DPI` pixels an inch."""
    from matplotlib.figure import Figure

    if _fine:
        return
    fine = Figure.savefig
    _fine.append(fine)

    @functools.wraps(fine)
    def coarse(figure: Figure, place: Any, *, dpi: Any = "figure", **options: Any) -> None:
        is_print = options.get("format") == "png" and isinstance(dpi, int)
        fine(figure, place, dpi=min(dpi, _DPI) if is_print else dpi, **options)

    Figure.savefig = coarse  # type: ignore[method-assign]


@contextlib.contextmanager
def as_fine_as_asked() -> Iterator[None]:
    """Draw with all pixels inside the block."""
    from matplotlib.figure import Figure

    coarse = Figure.savefig
    Figure.savefig = _fine[0] if _fine else coarse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Figure.savefig = coarse  # type: ignore[method-assign]
