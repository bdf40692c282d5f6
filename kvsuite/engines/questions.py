"""What a context is asked once its cache is made, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: whether an output is complete, told all its tokens so far
Ends = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Question:
    """One question, the answer that is scored, and how much is generated.

    Parameters
    ----------
    tokens
        Token ids of the question, one or more: they are fed behind the context.
    answer
        Token ids of the right answer, whose losses come back; empty where the output alone is wanted.
    new_tokens
        Tokens that are generated, at most; ``None``: as many as the right answer has.
    ends
        Asked behind every generated token; where it says so, that token is the last one.
    """

    tokens: Sequence[int]
    answer: Sequence[int] = ()
    new_tokens: int | None = None
    ends: Ends | None = None

    def __post_init__(self) -> None:
        if not self.tokens or self.limit < 1:
            raise ValueError("a question has at least one token, and so has what is answered")

    @property
    def limit(self) -> int:
        """Tokens that are generated, at most."""
        return len(self.answer) if self.new_tokens is None else self.new_tokens


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

    def __post_init__(self) -> None:
        if self.in_turn and any(one.ends or one.limit != len(one.answer) for one in self.questions):
            raise ValueError("questions in turn are answered in as many tokens as the right answers have")

    @property
    def shape(self) -> tuple[int | bool, ...]:
        """Lengths: what has the same ones can be computed together."""
        sizes = [size for one in self.questions for size in (len(one.tokens), len(one.answer), one.limit)]
        return (len(self.context), self.in_turn, *sizes)

    @property
    def steps(self) -> int:
        """Tokens that are fed behind the context, at most, in one cache."""
        sizes = [len(one.tokens) + max(len(one.answer), one.limit) for one in self.questions]
        return sum(sizes) if self.in_turn else max(sizes)


@dataclass(frozen=True)
class Answer:
    """What was answered.

    Parameters
    ----------
    output
        `Question.limit` tokens, or fewer where it ended before, each the most probable one behind those before.
    nll
        ``-log p`` of each token of the right answer behind the right ones before it, in nats, from a float32 log-softmax.
    kept
        Positions that a layer held of the context once the method had acted, mean over layers.
    """

    output: list[int]
    nll: list[float]
    kept: float
