"""Rows of a reference's log-probabilities on disk: 16 bits an entry, so that many caches are compared with one pass."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .divergence import TokenDivergence, row_divergence
from .quality import TokenScores

if TYPE_CHECKING:
    from torch import Tensor

#: codes 1 .. 65535 are steps between a row's least and largest log-probability; 0 is a probability of 0
_STEPS = 65534


class ReferenceRows:
    """Log-probabilities of the reference by scored position, in a file that no name is left of when the process ends.

    Of a row the least and the largest log-probability are exact, the others are rounded to 65,534 equal steps between them
    and the sum of probabilities is made 1 again. Over a range of 30 nats a log-probability is off by 2.3e-4 at most, which
    changes a divergence of D nats by about 2e-4 * sqrt(D), and leaves about 1e-8 where there is none. Losses and the most
    likely token are exact.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="kvsuite-reference-")  # noqa: SIM115  lives as long as the rows
        weakref.finalize(self, self._file.close)
        self._range: list[tuple[float, float]] = []
        self._vocabulary = 0
        self.top1: list[int] = []
        #: what the reference scored, once it has
        self.scores: TokenScores | None = None

    def add(self, at: int, logits: Tensor) -> None:
        """Keep row ``at``, the next one, of logits ``[1, vocab]``."""
        import torch

        if at != len(self._range):
            raise ValueError(f"row {at} after {len(self._range)} rows")
        row = torch.log_softmax(logits[0].float(), -1)
        possible = row.isfinite()
        # a row of a model that overflowed has no range; its loss, which is not finite either, says what is wrong
        low, high = (float(end) for end in row[possible].aminmax()) if bool(possible.any()) else (0.0, 0.0)
        step = (high - low) / _STEPS
        codes = ((row - low) / step).round() + 1 if step else torch.ones_like(row)
        stored = torch.where(possible, codes, 0.0).cpu().numpy().astype(np.uint16)
        self._file.write(stored.tobytes())
        self._range.append((low, step))
        self._vocabulary = len(stored)
        self.top1.append(int(logits[0].argmax()))

    def row(self, at: int, device: Any) -> Tensor:
        """Log-probabilities ``[1, vocab]`` of row ``at``, float32, but for a constant that makes them sum to 1."""
        import torch

        self._file.seek(at * self._vocabulary * 2)
        codes = np.frombuffer(self._file.read(self._vocabulary * 2), dtype=np.uint16)
        low, step = self._range[at]
        row = torch.from_numpy(codes.astype(np.float32)).to(device)
        return torch.where(row > 0, low + (row - 1) * step, -torch.inf)[None]


@dataclass
class RowComparison:
    """Takes a cache's rows as they come, and compares each with the reference's."""

    reference: ReferenceRows
    _kld: list[Tensor] = field(default_factory=list)
    _same: list[Tensor] = field(default_factory=list)

    def add(self, at: int, logits: Tensor) -> None:
        """Compare row ``at`` of logits ``[1, vocab]``; waits for nothing."""
        kld, _ = row_divergence(logits, self.reference.row(at, logits.device))
        self._kld.append(kld[0])
        self._same.append(logits[0].argmax() == self.reference.top1[at])

    def found(self, scores: TokenScores) -> TokenDivergence:
        """The comparison of all rows, of which the cache's losses are ``scores``."""
        assert self.reference.scores is not None
        return TokenDivergence(
            nll=scores.nll,
            nll_reference=self.reference.scores.nll,
            kld=[float(one) for one in self._kld],
            same_top1=[bool(one) for one in self._same],
        )
