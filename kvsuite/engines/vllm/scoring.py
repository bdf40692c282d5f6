"""Losses of token windows from vLLM's log-probabilities of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvsuite.engines.results import WindowProgress, WindowScores
from kvsuite.meters.quality import TokenScores
from kvsuite.workloads.token_rows import require_rows
from kvsuite.workloads.windows import Window, merge_windows, target_positions, window_inputs

#: what is asked: sequences of ``tokens``, each with the index of its ``first`` scored token; ``nll`` and ``top1`` come back
AskScores = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


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
