"""Losses from vLLM's log-probabilities of prompts: of token windows, and of a text whose every token is a step."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvsuite.engines.results import TakeRow, WindowProgress, WindowScores
from kvsuite.meters.quality import TokenScores
from kvsuite.workloads.token_rows import require_rows
from kvsuite.workloads.windows import Window, merge_windows, target_positions, window_inputs

#: what is asked: sequences of ``tokens``, each with the index of its ``first`` scored token; ``nll`` and ``top1`` come back
AskScores = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
#: what is asked: the index of a row and a number of rows; ``rows`` come back
AskRows = Callable[[int, int], dict[str, Any]]
# rows of the whole vocabulary of an answer: about 20 MB of text
_ROWS = 32


def score_windows(
    ask: AskScores,
    tokens: Sequence[int],
    windows: Sequence[Window],
    *,
    prefix: str,
    prefix_token: int | None,
    vocabulary: int,
    at_once: int,
    progress: WindowProgress | None = None,
) -> WindowScores:
    """Score the targets of ``windows``, each window a request of its own.

    Parameters
    ----------
    ask
        Asks vLLM.
    tokens, windows, prefix, prefix_token, progress
        As in `kvsuite.engines.capabilities.ScoresWindows`.
    vocabulary
        Of the model.
    at_once
        Windows that are asked for together.

    Raises
    ------
    UserError
        If the rule needs a prefix token and there is none.
    CaseInvalid
        If a token id lies outside the vocabulary.
    """
    require_rows((*tokens, prefix_token or 0), vocabulary)
    passes = merge_windows(windows)
    sequences = [
        [*window_inputs(tokens, one, prefix=prefix, prefix_token=prefix_token), int(tokens[one.end - 1])]
        for one in passes
    ]
    asked = [
        {"tokens": [int(token) for token in ids], "first": len(ids) - window.targets}
        for ids, window in zip(sequences, passes, strict=True)
    ]
    nll: list[float] = []
    correct: list[bool] = []
    targets = sum(window.targets for window in passes)
    for begin in range(0, len(asked), at_once):
        for one in ask(asked[begin : begin + at_once]):
            nll += one["nll"]
            correct += one["top1"]
        if progress is not None:
            progress(len(nll), targets, sum(nll) / len(nll))
    positions = target_positions(windows)
    scores = TokenScores([int(tokens[position]) for position in positions], positions, nll, correct)
    return WindowScores(
        scores, sum(map(len, sequences)) - len(sequences), len(passes),
        {"head": "vLLM's prompt log-probabilities", "batch_windows": min(at_once, len(passes))},
    )  # fmt: skip


def text_scores(ask: AskScores, tokens: Sequence[int], first: int, vocabulary: int) -> TokenScores:
    """Losses of ``tokens[first:]``, as the engine that is asked feeds them.

    Raises
    ------
    CaseInvalid
        If a token id lies outside the vocabulary.
    """
    require_rows(tokens, vocabulary)
    known = [int(token) for token in tokens]
    [found] = ask([{"tokens": known, "first": first}])
    return TokenScores(known[first:], list(range(first, len(known))), found["nll"], found["top1"])


def take_rows(ask: AskRows, take: TakeRow, count: int, vocabulary: int) -> None:
    """Hand out the rows behind the losses that were asked for last, as log-probabilities ``[1, vocabulary]``."""
    import torch

    for first in range(0, count, _ROWS):
        size = min(_ROWS, count - first)
        found = np.frombuffer(base64.b64decode(ask(first, size)["rows"]), dtype="<f4").reshape(size, vocabulary)
        for at, row in enumerate(torch.from_numpy(found.astype(np.float32))):
            take(first + at, row[None])
