"""Questions to a context on the paged runtime: a request whose output is the question, forced, and then an answer, chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from kvsuite.engines.questions import Answer, Asked, Question
from kvsuite.engines.results import TokenProgress
from kvsuite.models.language_head import token_losses
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime

from .memory import stored_tokens
from .serving import exactly


class _Line:
    """One request: a context, and what follows it.

    Parameters
    ----------
    context
        The prompt, at whose end the policy acts.
    asked
        Questions by the place in the output at which their answers begin.
    output
        What is fed, with a place for each token that is chosen while it runs.
    chosen
        Whether answers are chosen; else the right ones stand in ``output``.
    """

    def __init__(self, context: Sequence[int], asked: dict[int, Question], output: list[int], *, chosen: bool):
        self.output = output
        self._chosen = chosen
        self._asked = asked
        self._targets = {at + index: token for at, one in asked.items() for index, token in enumerate(one.answer)}
        self._places = {at + index: at for at, one in asked.items() for index in range(one.limit)} if chosen else {}
        self._nll = dict.fromkeys(self._targets, 0.0)
        self._kept = 0.0
        # the list is read token by token, so that what is chosen is fed
        self.request = Request(list(context), exactly(len(output)), forced=output)

    def take(self, logits: Tensor, runtime: Runtime) -> None:
        """Look at the logits ``[1, vocab]`` of the next token."""
        at = self.request.output_length
        if at == 1:
            # the question's first token was stored, and nothing went for its sake yet
            self._kept = fmean(stored_tokens(runtime, self.request)) - 1
        if at in self._targets:
            target = logits.new_tensor([self._targets[at]], dtype=torch.int64)
            self._nll[at] = float(token_losses(logits, target)[0])
        if at in self._places:
            self.output[at] = int(logits.argmax(-1))
            begin = self._places[at]
            ends = self._asked[begin].ends
            if ends and ends(self.output[begin : at + 1]):
                # this token is the last one
                self.request.longest = self.request.prompt_length + at + 1
                del self.output[at + 1 :]

    def found(self) -> list[Answer]:
        """The answers, in order; losses count as far as the tokens before are the right ones."""
        return [
            Answer(
                self.output[at : at + one.limit],
                [self._nll[at + index] for index in range(len(one.answer))],
                self._kept,
            )
            for at, one in self._asked.items()
        ]


def answer_questions(
    runtime: Runtime, asked: Sequence[Asked], progress: TokenProgress | None = None
) -> list[list[Answer]]:
    """Answers to every question of ``asked``: contexts are computed anew for every question that does not follow another.

    Parameters
    ----------
    runtime
        Of the case, with nothing else to do.
    asked
        As for `kvsuite.engines.capabilities.AnswersQuestions`.
    progress
        Called with contexts done and in all.
    """
    apart = [[one] if one.in_turn else [Asked(one.context, (question,)) for question in one.questions] for one in asked]
    found: list[list[Answer]] = []
    for index, group in enumerate(apart):
        found.append([answer for line in _answer(runtime, group) for answer in line])
        if progress:
            progress(index + 1, len(apart))
    return found


def _answer(runtime: Runtime, group: Sequence[Asked]) -> list[list[Answer]]:
    """Answers of contexts that are served at the same time."""
    lines = []
    for one in group:
        output: list[int] = []
        places: dict[int, Question] = {}
        for question in one.questions:
            output += question.tokens
            places[len(output)] = question
            output += [0] * question.limit
        lines.append(_Line(one.context, places, output, chosen=True))
    _run(runtime, lines)
    found = [line.found() for line in lines]
    # where another token than the right one was chosen, those behind it were scored behind a wrong one
    for one, line, answers_given in zip(group, lines, found, strict=True):
        at = 0
        for index, question in enumerate(one.questions):
            at += len(question.tokens)
            given, right = answers_given[index], list(question.answer)
            if right[:-1] != given.output[: len(right) - 1 if right else 0]:
                again = _Line(one.context, {at: question}, [*line.output[:at], *right], chosen=False)
                _run(runtime, [again])
                answers_given[index] = replace(given, nll=again.found()[0].nll)
            at += len(given.output)
    return found


def _run(runtime: Runtime, lines: Sequence[_Line]) -> None:
    by_request = {line.request: line for line in lines}

    def on_logits(requests: Sequence[Request], logits: Tensor) -> None:
        for row, request in enumerate(requests):
            by_request[request].take(logits[row : row + 1], runtime)

    before, runtime.on_logits = runtime.on_logits, on_logits
    try:
        runtime.run(by_request)
    finally:
        runtime.on_logits = before
        for request in by_request:
            runtime.cancel(request)
    for request in by_request:
        if request.status is not Status.FINISHED:
            raise RuntimeError(f"request {request.status.value}: {request.reason}") from request.error
