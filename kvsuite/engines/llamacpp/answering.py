"""Questions to a context whose cache is already made: prefill, context shift, question, greedy answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvsuite.compression.base import Policy
from kvsuite.engines.questions import Answer, Asked, Question
from kvsuite.engines.results import TokenProgress
from kvsuite.models.language_head import token_losses

from .context import BatchToken, Context
from .stream import Stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

# sequences of the context: what was prefilled, the copy that is asked, and the copy that the right answer is fed to
_PROMPT, _ASKED, _RIGHT = range(3)
SEQUENCES = 3


def answer_questions(
    context: Context,
    asked: Sequence[Asked],
    *,
    policy: Policy | None = None,
    progress: TokenProgress | None = None,
) -> list[list[Answer]]:
    """Answers to every question, one context after the other; of a context every question finds a copy of its sequence.

    Parameters
    ----------
    context
        Of `SEQUENCES` sequences, each with room for the longest context and what is asked of it.
    asked
        As for `kvsuite.engines.capabilities.AnswersQuestions`.
    policy
        Acts behind the context, and behind every token that follows.
    progress
        Called with contexts done and in all.
    """
    found = []
    for index, one in enumerate(asked):
        context.clear()
        prompt = Stream(context, _PROMPT, policy)
        prompt.feed(one.context)
        prompt.evict(prompt=True)
        answers, kept = [], float(prompt.stored)
        for at, question in enumerate(one.questions):
            own = prompt if one.in_turn else prompt.copy(_ASKED)
            answers.append(_answer(context, own, question, kept, together=policy is None))
            if one.in_turn and at < len(one.questions) - 1:
                own.feed(answers[-1].output[-1:])
                own.evict(prompt=False)
        found.append(answers)
        if progress is not None:
            progress(index + 1, len(asked))
    return found


def _answer(context: Context, stream: Stream, question: Question, kept: float, *, together: bool) -> Answer:
    """Feed a question, and of the answer that is given all tokens but the last.

    Parameters
    ----------
    context
        Of the stream.
    stream
        Holds the context; behind it the question and the answer that was given.
    question
        What is asked.
    kept
        Positions that were kept of the context.
    together
        Whether nothing goes while it is fed, so that its tokens may share a step. Else a token that is evicted in between is
        not seen by those that follow.
    """
    size = len(question.tokens) if together else 1
    for at in range(0, len(question.tokens), size):
        logits = stream.feed(question.tokens[at : at + size])
        stream.evict(prompt=False)
    output = [int(np.argmax(logits))]
    losses = [_loss(logits, question.answer[0])] if question.answer else []
    waiting = list(itertools.pairwise(question.answer))
    right = stream.copy(_RIGHT) if waiting else stream
    while (goes_on := _goes_on(question, output)) or waiting:
        # one step for both: they do not see each other
        rows = [BatchToken(output[-1], stream.position, stream.sequence, True)] if goes_on else []
        if waiting:
            rows.append(BatchToken(int(waiting[0][0]), right.position, _RIGHT, True))
        context.decode(rows)
        if waiting:
            losses.append(_loss(context.logits(len(rows) - 1), waiting.pop(0)[1]))
            right.fed(1)
            right.evict(prompt=False)
        if goes_on:
            output.append(int(np.argmax(context.logits(0))))
            stream.fed(1)
            stream.evict(prompt=False)
    return Answer(output, losses, kept)


def _goes_on(question: Question, output: Sequence[int]) -> bool:
    """Whether a further token is generated."""
    return len(output) < question.limit and not (question.ends and question.ends(output))


def _loss(logits: NDArray[np.float32], target: int) -> float:
    return float(token_losses(torch.from_numpy(logits.copy())[None], torch.tensor([int(target)])))
