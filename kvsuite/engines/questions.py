"""What a context is asked once its cache is made, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question and the answer that is scored.

    Parameters
    ----------
    tokens
        Token ids of the question, one or more: they are fed behind the context.
    answer
        Token ids of the right answer, one or more.
    """

    tokens: Sequence[int]
    answer: Sequence[int]

    def __post_init__(self) -> None:
        if not self.tokens or not self.answer:
            raise ValueError("a question and its answer have at least one token each")


@dataclass(frozen=True)
class Asked:
    """A context with what is asked of it.

    Parameters
    ----------
    context
        Token ids of the prompt: at its end the case's method acts, before anything of a question is known.
    questions
        What is asked then.
    in_turn
        Whether they follow each other in one cache, each behind the answer that was given to the one before. Else every one
        finds the cache as the context left it.
    """

    context: Sequence[int]
    questions: tuple[Question, ...]
    in_turn: bool = False

    @property
    def shape(self) -> tuple[int | bool, ...]:
        """Lengths: what has the same ones can be computed together."""
        sizes = [size for one in self.questions for size in (len(one.tokens), len(one.answer))]
        return (len(self.context), self.in_turn, *sizes)

    @property
    def steps(self) -> int:
        """Tokens that are fed behind the context, at most, in one cache."""
        sizes = [len(one.tokens) + len(one.answer) for one in self.questions]
        return sum(sizes) if self.in_turn else max(sizes)


@dataclass(frozen=True)
class Answer:
    """What was answered.

    Parameters
    ----------
    output
        As many tokens as the right answer has, each the most probable one behind those before.
    nll
        ``-log p`` of each token of the right answer behind the right ones before it, in nats, from a float32 log-softmax.
    """

    output: list[int]
    nll: list[float]
