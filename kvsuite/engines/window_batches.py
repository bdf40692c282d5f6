"""From planned windows to batches of forward passes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from kvsuite.errors import UserError
from kvsuite.models.layers import UnknownLayers, layers_of
from kvsuite.workloads.token_rows import require_rows
from kvsuite.workloads.windows import Window, merge_windows, target_positions, window_inputs

_CPU_BATCH_TOKENS, _MOST_BATCH_TOKENS = 2048, 65_536


@dataclass(frozen=True)
class Pass:
    """One sequence through the model: its window, and how many tokens go in."""

    window: Window
    length: int


class WindowText:
    """A text, its windows and its prefix rule as forward passes.

    Parameters
    ----------
    model
        The transformers model that will score it.
    tokens, windows, prefix, prefix_token
        As for `kvsuite.engines.window_scoring.score_windows`.

    Raises
    ------
    CaseInvalid
        If a token id lies outside the vocabulary: on CUDA that would end the process.
    """

    def __init__(
        self, model: Any, tokens: Sequence[int], windows: Sequence[Window], prefix: str, prefix_token: int | None
    ) -> None:
        config = model.config.get_text_config()
        # from the configuration: a packed embedding has no weight to ask
        vocabulary = int(config.vocab_size)
        require_rows((*tokens, prefix_token or 0), vocabulary)
        self.positions = target_positions(windows)
        self.target_ids = [int(tokens[position]) for position in self.positions]
        self.passes = [
            Pass(window, window.end - 1 - window.begin + (prefix == "bos_each_window"))
            for window in merge_windows(windows, _same_frequencies(config))
        ]
        self._tokens, self._prefix, self._prefix_token = tokens, prefix, prefix_token

    def inputs(self, batch: Sequence[Pass], device: torch.device) -> Tensor:
        """Token ids ``[batch, length]``."""
        rows = [
            window_inputs(self._tokens, each.window, prefix=self._prefix, prefix_token=self._prefix_token)
            for each in batch
        ]
        return torch.tensor(rows, dtype=torch.int64, device=device)

    def targets(self, device: torch.device) -> Tensor:
        """All targets ``[targets]``, in the order of the text, which is that of the passes."""
        return torch.tensor(self.target_ids, dtype=torch.int64, device=device)


def _same_frequencies(config: Any) -> int | None:
    """Longest sequence whose rotary frequencies are those of all shorter ones, ``None`` for any."""
    try:
        return layers_of(config.to_dict()).switch_length
    except UnknownLayers:
        return None


class Batches:
    """Neighbouring passes of equal length, as many at a time as the budget holds, in order.

    Parameters
    ----------
    passes
        In the order of the text.
    batch_tokens
        Most tokens in one forward, ``None`` for the default of `kvsuite.engines.window_scoring.score_windows`.
    model, device
        Decide the default.
    """

    def __init__(self, passes: Sequence[Pass], batch_tokens: int | None, model: Any, device: torch.device) -> None:
        if batch_tokens is not None and batch_tokens < 1:
            raise UserError(f"--kv-batch-tokens={batch_tokens}: a batch needs a token; leave it out for the default")
        self._groups = [list(group) for _, group in groupby(passes, key=lambda each: each.length)]
        self._timed = batch_tokens is None and device.type == "cpu"
        self.budget = batch_tokens or (_CPU_BATCH_TOKENS if self._timed else _free_tokens(model, device))
        #: tokens and forwards so far, and most windows in one
        self.tokens = self.forwards = self.most = 0

    def __iter__(self) -> Iterator[list[Pass]]:
        for group in self._groups:
            size = max(1, self.budget // group[0].length)
            if not self._timed:
                yield from self._cut(group, size)
            elif 1 < size <= (len(group) - 2) // 2:
                yield from self._faster(group, size)
            else:
                # too few for one to warm up, one alone, one batch and another batch that would gain from the choice
                yield from self._cut(group, 1)

    def _cut(self, group: list[Pass], size: int) -> Iterator[list[Pass]]:
        for at in range(0, len(group), size):
            yield self._count(group[at : at + size])

    def _faster(self, group: list[Pass], size: int) -> Iterator[list[Pass]]:
        """Time one window and one batch on work that has to be done anyway, then go on with the faster."""
        yield self._count(group[:1])
        # the generator goes on when its consumer has done what it was given
        begin = time.perf_counter()
        yield self._count(group[1:2])
        alone = time.perf_counter() - begin
        begin = time.perf_counter()
        yield self._count(group[2 : 2 + size])
        together = (time.perf_counter() - begin) / size
        yield from self._cut(group[2 + size :], size if together < alone else 1)

    def _count(self, batch: list[Pass]) -> list[Pass]:
        self.forwards += 1
        self.tokens += sum(each.length for each in batch)
        self.most = max(self.most, len(batch))
        return batch


def _free_tokens(model: Any, device: torch.device) -> int:
    """Tokens whose activations fill a quarter of the free memory, by a rough count of a decoder layer's tensors."""
    if device.type != "cuda":
        return 8 * _CPU_BATCH_TOKENS
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    wide = feed_forward_width(config)
    per_token = (16 * hidden + 4 * wide) * int(model.dtype.itemsize)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(_MOST_BATCH_TOKENS, free // 4 // per_token))


def feed_forward_width(config: Any) -> int:
    """The widest feed-forward part of a language model: Gemma 3n has one for each layer, GPT-2 need not say its own."""
    found = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return max(found) if isinstance(found, list) else int(found)
