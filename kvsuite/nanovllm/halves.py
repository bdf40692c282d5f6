"""Two halves of a decode step side by side: while one reads its keys, the other computes its products.

Attention waits for memory, and the small kernels around it wait for each other. In a small model's step of many sequences the
small ones take a quarter of the time, and hide behind the other half's attention. Each half reads all weights, so that a large
model would lose more than it gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import StepBatch
from .paged_attention import AttentionBackend
from .side_streams import side_stream

#: sequences of a step, and the attention of their static tensors
Part = tuple[StepBatch, AttentionBackend]

#: sequences from which a step is halved: fewer do not fill the device anyway
FEWEST_SEQUENCES = 64
#: bytes of weights up to which it is: read twice, they take as long as the small kernels that are hidden
MOST_WEIGHT_BYTES = 2 << 30


@dataclass(frozen=True)
class Halves:
    """How captured steps run in halves.

    Parameters
    ----------
    forward
        Logits ``[S, vocab]`` of the sequences of both halves, in their order.
    fewest
        Sequences from which a step is halved.
    """

    forward: Callable[[Sequence[Part]], Tensor]
    fewest: int


def side_by_side(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What two functions return whose kernels may run at the same time; on a CPU one goes after the other."""
    if not torch.cuda.is_available():
        return first(), second()
    here = torch.cuda.current_stream()
    beside = side_stream("second halves", here.device)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        other = second()
    own = first()
    here.wait_stream(beside)
    return own, other
