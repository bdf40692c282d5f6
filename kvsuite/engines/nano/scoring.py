"""Teacher-forced scoring of the `nano` engine: texts and windows as requests to a runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvsuite.compression.base import Policy
from kvsuite.engines.results import TakeRow, TokenProgress, WindowProgress, WindowScores
from kvsuite.engines.window_batches import WindowText
from kvsuite.errors import UserError
from kvsuite.meters.divergence import TokenDivergence, row_divergence
from kvsuite.meters.quality import TokenScores
from kvsuite.models.language_head import token_losses
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.scoring import Passage, rows_at_once, score_passages, score_steps, visit_rows
from kvsuite.workloads.windows import Window, window_inputs

from .runtime import RuntimeHolder

# windows share a step up to so many tokens
_WINDOW_TOKENS = {"cpu": 2048}
_WINDOW_TOKENS_ELSEWHERE = 16_384
# steps of windows that one of two runtimes of a model computes before it is the other's turn
_TURNS = 8


def score_text(
    holder: RuntimeHolder,
    policy: Policy | None,
    tokens: Sequence[int],
    protocol: str,
    prefix: int,
    progress: TokenProgress | None,
    take: TakeRow | None = None,
    *,
    full: bool = False,
) -> TokenScores:
    """Score ``tokens`` by a cache protocol (docs/protocols.md).

    They are decoded one by one, the known token in the place of the chosen one. Where no policy acts between two tokens, and
    nobody takes the rows, all of them are fed together: the same losses up to rounding.

    Parameters
    ----------
    policy
        Of the case.
    take
        Called with each scored row's index and logits ``[1, vocab]``.
    full
        Through the full cache in the model's dtype, whatever the case says.
    """
    start = prefix if protocol == "prefix-continuation" else 0
    used = None if full else policy
    if used is None and take is None:
        return score_rows(holder, tokens, start + 1, max(start, 1), progress, full=full)
    runtime = holder.get(holder.limits(len(tokens), full=full), used, captures=True)
    # streaming-decode feeds its first token alone
    prompt = max(start, 1)
    scores = score_steps(
        runtime, tokens[:prompt], tokens[prompt:], first=start + 1 - prompt, take=take, progress=progress
    )
    return _token_scores(tokens, start + 1, scores.nll, scores.correct)


def score_rows(
    holder: RuntimeHolder,
    tokens: Sequence[int],
    first: int,
    together: int,
    progress: TokenProgress | None = None,
    *,
    full: bool,
) -> TokenScores:
    """Score ``tokens[first:]`` by chunks of one text through a cache that holds all of it, ``full`` in the model's dtype.

    ``together`` of its tokens count as one forward pass, the others as fed one by one: that is the same up to rounding, unless
    rotary frequencies change with the length.
    """
    runtime = holder.get(holder.limits(len(tokens), full=full), None, captures=False)
    report = None if progress is None else lambda done, of, mean: progress(done, of)
    scores = score_passages(runtime, [Passage(tokens[:-1], tokens[first:], together)], progress=report)
    return _token_scores(tokens, first, scores.nll, scores.correct)


class WindowPassages:
    """A text's windows as passages, and the runtime limits under which several of them share a step.

    Parameters
    ----------
    loaded
        The model that will score them.
    tokens, windows, prefix, prefix_token
        As for `kvsuite.engines.capabilities.ScoresWindows`.

    Raises
    ------
    UserError
        If the rule needs a prefix token and there is none.
    CaseInvalid
        If a token id lies outside the vocabulary.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokens: Sequence[int],
        windows: Sequence[Window],
        prefix: str,
        prefix_token: int | None,
    ) -> None:
        self.text = WindowText(loaded.model, tokens, windows, prefix, prefix_token)
        self.passages = [
            Passage(
                window_inputs(tokens, each.window, prefix=prefix, prefix_token=prefix_token),
                [int(token) for token in tokens[each.window.first_scored : each.window.end]],
            )
            for each in self.text.passes
        ]
        self.longest = max(len(passage.tokens) for passage in self.passages)
        budget = _WINDOW_TOKENS.get(loaded.device.type, _WINDOW_TOKENS_ELSEWHERE)
        self.together = max(1, min(budget // self.longest, len(self.passages)))
        self.step_tokens = max(budget, self.longest) if self.together > 1 else self.longest

    def runtime(self, holder: RuntimeHolder, point: Limits | None = None, *, full: bool = False) -> Runtime:
        """A runtime of ``holder`` with the limits of a design point, or one that takes as many windows as share a step."""
        limits = holder.limits(self.longest, sequences=self.together, step_tokens=self.step_tokens, full=full)
        if point is not None:
            limits = replace(point, prefix_caching=False)
        return holder.get(limits, None, captures=False)


def score_windows(given: WindowPassages, runtime: Runtime, progress: WindowProgress | None) -> WindowScores:
    """Score the targets of windows, each a request of its own."""
    before = runtime.counters.to_dict()
    found = score_passages(runtime, given.passages, progress=progress)
    taken = {name: count - before[name] for name, count in runtime.counters.to_dict().items()}
    scores = TokenScores(given.text.target_ids, given.text.positions, found.nll, found.correct)
    effective = {
        "logit_rows": rows_at_once(runtime),
        "batch_tokens": runtime.limits.max_num_batched_tokens,
        "batch_windows": runtime.limits.max_num_seqs,
        "num_blocks": runtime.num_blocks,
    }
    return WindowScores(scores, taken["computed_prefill_tokens"], taken["steps"], effective)


def compare_windows(
    given: WindowPassages,
    arms: tuple[RuntimeHolder, RuntimeHolder],
    sizes: tuple[int, int],
    progress: WindowProgress | None,
) -> TokenDivergence:
    """Losses of a model and of its reference (``arms``) on the same windows, and their divergence, position by position.

    Hidden states of one step's windows are kept for both; logits of some rows of both are made at a time. Where both arms are
    one model, the reference is its full cache in the model's dtype, and runtimes take turns on it, for many windows each.

    Raises
    ------
    UserError
        If the vocabularies (``sizes``) differ.
    """
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--kv-reference: a vocabulary of {sizes[1]} tokens cannot be compared with one of {sizes[0]}; "
            "give another format of the same model"
        )
    shared = arms[0] is arms[1]
    together = given.together * (_TURNS if shared else 1)
    pieces: list[tuple[Tensor, ...]] = []
    done, of, total = 0, len(given.text.positions), 0.0
    for at in range(0, len(given.passages), together):
        group = given.passages[at : at + together]
        states = _states(given.runtime(arms[0]), group)
        reference_runtime = given.runtime(arms[1], full=shared)
        reference_states = _states(reference_runtime, group)
        runtime = reference_runtime if shared else given.runtime(arms[0])
        rows = max(1, rows_at_once(runtime) // 4)
        targets = torch.tensor([t for p in group for t in p.targets], dtype=torch.int64, device=states.device)
        for row in range(0, len(targets), rows):
            part = slice(row, row + rows)
            logits = runtime.runner.logits(states[part])
            reference = reference_runtime.runner.logits(reference_states[part])
            pieces.append(
                (
                    token_losses(logits, targets[part]),
                    token_losses(reference, targets[part]),
                    *row_divergence(logits, reference),
                )
            )
            del logits, reference
            total += float(pieces[-1][0].sum(dtype=torch.float64))
        done += len(targets)
        if progress:
            progress(done, of, total / done)
    columns: list[list[Any]] = [torch.cat(column).tolist() for column in zip(*pieces, strict=True)]
    return TokenDivergence(*columns)


def _states(runtime: Runtime, passages: Sequence[Passage]) -> Tensor:
    """Hidden states ``[targets, hidden]`` of what predicts the passages' targets."""
    count = sum(len(passage.targets) for passage in passages)
    found: list[Tensor] = []

    def keep(places: Tensor, states: Tensor) -> None:
        if not found:
            found.append(states.new_empty(count, states.shape[-1]))
        found[0][places] = states

    visit_rows(runtime, passages, keep)
    return found[0]


def _token_scores(tokens: Sequence[int], first: int, nll: list[float], correct: list[bool]) -> TokenScores:
    return TokenScores(
        targets=[int(token) for token in tokens[first:]],
        positions=list(range(first, len(tokens))),
        nll=nll,
        correct=correct,
    )
