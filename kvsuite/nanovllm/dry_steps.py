"""Steps over the scratch block, of every make-up for which kernels have variants: to have them compiled, or to warm up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .batch import BatchBuilder, GroupInputs, StepBatch
from .kv_pool import SCRATCH_BLOCK, KVPool
from .limits import Limits
from .sampling import SamplingParameters, greedy, sample

# more than `fused_layers` launches with overlap
_MOST_TOKENS = 2048
# prompts for which `fused_layers` and its kernels take other variants
_DIFFERENT_ROWS = (2, 20, 40, 100, 130, _MOST_TOKENS)
# prompts of one step, of more tokens together than are launched with overlap: the final layer has as many rows
_DIFFERENT_PROMPTS = (20, 40, 100)
_DIFFERENT_SINGLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class DrySteps:
    """Steps of zeros in the scratch block, whose results nobody wants.

    Parameters
    ----------
    forward
        Computes logits ``[R, vocab]`` of a step, not from a graph.
    pools
        Keys and values of every layer group.
    limits
        No step is larger than they allow.
    device
        Where steps are computed.
    """

    def __init__(
        self, forward: Callable[[StepBatch], Tensor], pools: Sequence[KVPool], limits: Limits, device: torch.device
    ) -> None:
        self._forward = forward
        self._groups = len(pools)
        self._limits = limits
        self._device = device
        # of one sequence
        self._longest = min(limits.max_model_len, limits.max_num_batched_tokens)

    def warm_up(self) -> None:
        """A single token, and prompts as long as they come."""
        # beside the single one
        room = min(_MOST_TOKENS, self._limits.max_num_batched_tokens) - 1
        most = max(1, min(room, self._limits.max_model_len))
        self._step([1, *[most] * (room // most)][: self._limits.max_num_seqs])

    def singles(self) -> None:
        """Single tokens with a prompt and without, for every number of cuts through their keys on the current stream."""
        most = min(self._limits.max_num_seqs, self._limits.max_num_batched_tokens)
        # between two of these numbers keys are cut as at one of them
        for singles in [*(count for count in _DIFFERENT_SINGLES if count < most), most - 1]:
            self._step([1] * singles + [min(2, self._longest)])
        self._step([1] * most)

    def prompts(self) -> None:
        """Prompts of every number of rows for which kernels differ, alone and together."""
        limits, longest = self._limits, self._longest
        for rows in _DIFFERENT_ROWS:
            self._step([min(rows, longest)])
        # where one sequence is too short for a step without overlap
        together = min(_MOST_TOKENS, limits.max_num_batched_tokens, longest * limits.max_num_seqs)
        if together > longest:
            whole, rest = divmod(together, longest)
            self._step([longest] * whole + [rest] * (rest > 0))
        for prompts in _DIFFERENT_PROMPTS:
            each = _MOST_TOKENS // prompts
            if prompts <= limits.max_num_seqs and each <= longest and limits.max_num_batched_tokens >= _MOST_TOKENS:
                self._step([each] * prompts)

    def _step(self, counts: Sequence[int]) -> None:
        """Sequences of so many new tokens each, and tokens chosen from what comes out in both ways."""
        tokens = np.array(counts)
        ids = np.zeros(tokens.sum(), dtype=np.int64)
        part = GroupInputs(
            slots=ids,
            kv_lengths=tokens,
            block_tables=np.full((len(tokens), self._limits.blocks_per_sequence), SCRATCH_BLOCK, dtype=np.int32),
            dropped=np.zeros_like(tokens),
        )
        batch = BatchBuilder(self._device).build(
            ids=ids, positions=ids, counts=tokens, sample_rows=np.cumsum(tokens) - 1, groups=[part] * self._groups
        )
        logits = self._forward(batch)
        greedy(logits)
        sample(logits, [SamplingParameters(temperature=1.0)] * len(tokens), [0] * len(tokens))
