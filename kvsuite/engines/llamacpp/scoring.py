"""Losses of given tokens by llama.cpp's logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvsuite.compression.base import Policy
from kvsuite.engines.results import TakeRow, TokenProgress, WindowProgress, WindowScores
from kvsuite.meters.divergence import TokenDivergence, row_divergence
from kvsuite.meters.quality import TokenScores
from kvsuite.models.language_head import token_losses
from kvsuite.workloads.token_rows import require_rows
from kvsuite.workloads.windows import Window, merge_windows, target_positions, window_inputs

from .context import BatchToken, Context
from .stream import Stream

# rows whose logits are copied at a time
_ROWS = 64


def score_steps(
    context: Context,
    tokens: Sequence[int],
    protocol: str,
    prefix: int,
    *,
    policy: Policy | None = None,
    take: TakeRow | None = None,
    progress: TokenProgress | None = None,
) -> TokenScores:
    """Score ``tokens`` by a cache protocol (docs/protocols.md): behind the prefix each known token is a step of its own."""
    start = prefix if protocol == "prefix-continuation" else 0
    context.clear()
    stream = Stream(context, policy=policy)
    if start:
        stream.feed(tokens[:start])
        stream.evict(prompt=True)
    nll, correct = [], []
    for at in range(start, len(tokens) - 1):
        context.decode([BatchToken(int(tokens[at]), stream.position, wanted=True)])
        stream.fed(1)
        logits = torch.from_numpy(context.logits(0).copy())[None]
        target = int(tokens[at + 1])
        nll.append(float(token_losses(logits, torch.tensor([target]))))
        correct.append(int(logits.argmax()) == target)
        if take is not None:
            take(at - start, logits)
        # a stream of single tokens has no prompt but its first
        stream.evict(prompt=at == 0)
        if progress is not None:
            progress(at + 1 - start, len(tokens) - 1 - start)
    return _scores(tokens, start + 1, nll, correct)


def score_together(context: Context, tokens: Sequence[int], first: int) -> TokenScores:
    """Score ``tokens[first:]`` with as many tokens a step as it takes."""
    nll: list[float] = []
    correct: list[bool] = []
    targets = torch.tensor([int(token) for token in tokens[first:]])
    for logits in logits_of(context, tokens[:-1], len(targets)):
        part = targets[len(nll) : len(nll) + len(logits)]
        nll += token_losses(logits, part).tolist()
        correct += (logits.argmax(-1) == part).tolist()
    return _scores(tokens, first, nll, correct)


def logits_of(context: Context, inputs: Sequence[int], wanted: int) -> Iterator[Tensor]:
    """Logits ``[rows, vocabulary]`` of the last ``wanted`` inputs of a sequence of its own, some rows at a time."""
    context.clear()
    stream, first = Stream(context), len(inputs) - wanted
    size = context.settings.step_tokens
    for at in range(0, len(inputs), size):
        part = inputs[at : at + size]
        rows = [BatchToken(int(token), at + place, wanted=at + place >= first) for place, token in enumerate(part)]
        context.decode(rows)
        stream.fed(len(rows))
        places = [place for place, row in enumerate(rows) if row.wanted]
        for piece in range(0, len(places), _ROWS):
            found = np.stack([context.logits(place) for place in places[piece : piece + _ROWS]])
            yield torch.from_numpy(found)


@dataclass(frozen=True)
class WindowSequences:
    """Windows of a text as sequences of their own.

    Parameters
    ----------
    tokens, windows, prefix, prefix_token
        As for `kvsuite.engines.capabilities.ScoresWindows`.
    """

    tokens: Sequence[int]
    windows: Sequence[Window]
    prefix: str
    prefix_token: int | None

    def require_rows(self, vocabulary: int) -> None:
        """Refuse token ids beyond the vocabulary."""
        require_rows((*self.tokens, self.prefix_token or 0), vocabulary)

    @property
    def passes(self) -> list[Window]:
        """Windows that go through the model: those that begin together are one."""
        return merge_windows(self.windows)

    def inputs(self, window: Window) -> list[int]:
        """What goes in."""
        return window_inputs(self.tokens, window, prefix=self.prefix, prefix_token=self.prefix_token)

    def targets(self, window: Window) -> Tensor:
        """Its targets ``[targets]``."""
        return torch.tensor([int(token) for token in self.tokens[window.first_scored : window.end]])

    @property
    def longest(self) -> int:
        """Tokens of the longest pass."""
        return max(len(self.inputs(window)) for window in self.passes)


def score_windows(context: Context, text: WindowSequences, progress: WindowProgress | None) -> WindowScores:
    """Score the targets of windows, one window after the other."""
    nll: list[float] = []
    correct: list[bool] = []
    steps = fed = 0
    positions = target_positions(text.windows)
    for window in text.passes:
        inputs, targets = text.inputs(window), text.targets(window)
        done = 0
        for logits in logits_of(context, inputs, len(targets)):
            part = targets[done : done + len(logits)]
            nll += token_losses(logits, part).tolist()
            correct += (logits.argmax(-1) == part).tolist()
            done += len(logits)
        fed += len(inputs)
        steps += -(-len(inputs) // context.settings.step_tokens)
        if progress is not None:
            progress(len(nll), len(positions), sum(nll) / len(nll))
    scores = TokenScores([int(text.tokens[at]) for at in positions], positions, nll, correct)
    effective = {"logit_rows": _ROWS, "batch_windows": 1, "batch_tokens": context.settings.step_tokens}
    return WindowScores(scores, fed, steps, effective)


def compare_windows(
    arms: tuple[Context, Context], text: WindowSequences, progress: WindowProgress | None
) -> TokenDivergence:
    """Losses through a cache and through its reference on the same windows, and their divergence, by position."""
    found = TokenDivergence(nll=[], nll_reference=[], kld=[], same_top1=[])
    of = len(target_positions(text.windows))
    for window in text.passes:
        inputs, targets = text.inputs(window), text.targets(window)
        done = 0
        for logits, reference in zip(*(logits_of(one, inputs, len(targets)) for one in arms), strict=True):
            part = targets[done : done + len(logits)]
            kld, same = row_divergence(logits, reference)
            found.nll.extend(token_losses(logits, part).tolist())
            found.nll_reference.extend(token_losses(reference, part).tolist())
            found.kld.extend(kld.tolist())
            found.same_top1.extend(same.tolist())
            done += len(logits)
        if progress is not None:
            progress(len(found.nll), of, sum(found.nll) / len(found.nll))
    return found


def _scores(tokens: Sequence[int], first: int, nll: list[float], correct: list[bool]) -> TokenScores:
    return TokenScores([int(token) for token in tokens[first:]], list(range(first, len(tokens))), nll, correct)
