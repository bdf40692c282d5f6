"""How kvsuite's figures look: colours, fonts, number formats, and how they become bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, GREEN, RED, BLUE = "#808080", "#2ecc71", "#e74c3c", "#3498db"

_RC = {
    "svg.fonttype": "none",  # text stays text: searchable, editable
    "svg.hashsalt": "kvsuite",  # the same ids in every run
    "text.parse_math": False,  # a `$` in a name is a `$`
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.axisbelow": True,
    "xtick.labelsize": 10,
    "font.size": 10,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house style whatever the user's matplotlibrc says, and leave the process as it was."""
    import matplotlib.style

    with matplotlib.style.context(["default", _RC]):
        yield


def fixed(number: float, decimals: int) -> str:
    """Format with so many decimals, with more where they would print a small number as 0."""
    text = f"{number:.{decimals}f}"
    return f"{number:.1g}" if number and not float(text) else text


def three_digits(number: float) -> str:
    """Format with three digits that count, and never fewer than stand before the point: 0.0123, 29.1, 2,370."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def figure_bytes(figure: Figure, kind: str, *, dpi: int = 300) -> bytes:
    """Render to ``"png"`` (of ``dpi``) or ``"svg"``, tight, the same bytes for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # the canvas of this figure only; the backend of the user's process stays what it is
    FigureCanvasAgg(figure)
    undated = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    buffer = BytesIO()
    with house_style():
        figure.savefig(buffer, format=kind, dpi=dpi if kind == "png" else 300, bbox_inches="tight", metadata=undated)
    return buffer.getvalue()
