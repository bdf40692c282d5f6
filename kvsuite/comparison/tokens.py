"""Raw token losses of a case, and the difference of two cases on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.store.inside import inside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Tokens:
    """Scored tokens of a case, shape (tokens,) each.

    ``place`` is text and position of a token, ``nll`` its loss in nats, ``correct`` whether the arg-max hit (0 or 1).
    """

    place: NDArray[np.int64]
    nll: NDArray[np.float64]
    correct: NDArray[np.float64]

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> Tokens | None:
        """Tokens of a sidecar's columns, ``None`` if it holds something else."""
        import numpy as np

        try:
            place = np.asarray([columns["text"], columns["position"], columns["token"]], dtype=np.int64)
            return cls(place, np.asarray(columns["nll"], float), np.asarray(columns["correct"], float))
        except (KeyError, TypeError, ValueError):
            return None


def read_tokens(folder: Path, sidecar: str) -> Tokens | None:
    """Tokens of a sidecar inside the run's folder, ``None`` if it is not there or damaged."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return Tokens.of(parquet.read_table(inside(folder, sidecar)).to_pydict())
    except (OSError, ValueError, pa.ArrowException):
        return None


def paired_difference(base: Tokens | None, now: Tokens | None, column: str) -> tuple[float, float] | None:
    """Mean difference ``now - base`` of ``nll`` or ``correct`` over the tokens, and its standard error.

    Both sides find the same tokens hard, so the standard error of the mean difference is far below that of either mean.

    Returns
    -------
    tuple of float or None
        ``None`` if a side has no tokens, or the two did not score the same ones.
    """
    if base is None or now is None or base.place.shape != now.place.shape or (base.place != now.place).any():
        return None
    difference = getattr(now, column) - getattr(base, column)
    n = len(difference)
    if n < 2:
        return None
    return float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(n)
