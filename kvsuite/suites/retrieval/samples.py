"""Samples: contexts of exactly so many tokens with what they are asked, from real prose, by a seed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from kvsuite.case import digest
from kvsuite.engines.questions import Asked, Question
from kvsuite.errors import CaseInvalid

from .tasks import MAKERS, ContextPlan, Draw
from .words import KEYS, VALUES

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_SHORTEST_SENTENCE = 40


@dataclass(frozen=True)
class SampleQuestion:
    """What is known of a question beside its tokens.

    Parameters
    ----------
    depth
        Where its fact was asked to stand, ``None`` where the whole context answers it.
    behind
        Tokens of the context behind that fact, ``None`` likewise.
    answer
        The right one as text.
    """

    depth: float | None
    behind: int | None
    answer: str


@dataclass(frozen=True)
class ContextSample:
    """One draw: a context that is asked at several depths, or a context for each depth.

    Parameters
    ----------
    asked
        The contexts.
    known
        Of each context, its questions.
    """

    asked: tuple[Asked, ...]
    known: tuple[tuple[SampleQuestion, ...], ...]

    @property
    def hash(self) -> str:
        """Of all tokens."""
        return digest(
            [
                [list(one.context), [[list(q.tokens), list(q.answer)] for q in one.questions], one.in_turn]
                for one in self.asked
            ]
        )


class SampleMaker:
    """Makes the samples of one task and length.

    Parameters
    ----------
    tokenizer
        The model's.
    text
        Prose that contexts are filled with; its sentences follow each other from a random one on, and begin anew at its end.
    task
        Name.
    length
        Tokens of a context.
    depths
        Where what is asked stands.
    seed
        Of the run.
    """

    def __init__(
        self, tokenizer: Any, text: str, *, task: str, length: int, depths: Sequence[float], seed: int
    ) -> None:
        self._tokenizer = tokenizer
        if task not in MAKERS:
            raise CaseInvalid(f"task {task}: no such task; choose one of {', '.join(MAKERS)}")
        self._task, self._length, self._depths, self._seed = task, length, depths, seed
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
        self._sentences = [
            sentence for part in paragraphs for sentence in _SENTENCE.split(part) if len(sentence) > _SHORTEST_SENTENCE
        ]
        if not self._sentences:
            raise CaseInvalid("--kv-corpus: the text has no sentences to fill a context with; give prose")
        self._first = first_tokens(tokenizer)
        self._counts: dict[str, int] = {}
        self._keys, self._values = self._alike(KEYS), self._alike(VALUES)

    def samples(self, count: int) -> list[ContextSample]:
        """The first ``count`` samples: those of a longer run are the same.

        Raises
        ------
        CaseInvalid
            If what a context has to say does not fit, or an answer cannot be scored.
        """
        return [self._sample(index) for index in range(count)]

    def _sample(self, index: int) -> ContextSample:
        random = Random(f"{self._seed}|{self._task}|{index}")
        start = random.randrange(len(self._sentences))
        prose = self._prose(start)
        taken = " ".join(prose).lower()
        values = [word for word in self._values if word not in taken]
        try:
            plans = MAKERS[self._task](Draw(random, self._depths, self._keys, values))
        except ValueError:
            raise CaseInvalid(
                f"task {self._task}: {len(self._keys)} names of one length in tokens and {len(values)} words that the text "
                "does not say are too few; use a shorter --kv-task-lengths, or another --kv-task"
            ) from None
        made = [self._made(plan, prose, random) for plan in plans]
        return ContextSample(tuple(asked for asked, _ in made), tuple(known for _, known in made))

    def _prose(self, start: int) -> list[str]:
        """Sentences in their order that fill a context."""
        found: list[str] = []
        tokens = 0
        while tokens < self._length:
            found.append(self._sentences[(start + len(found)) % len(self._sentences)])
            tokens += self._count(found[-1])
        return found

    def _made(
        self, plan: ContextPlan, prose: Sequence[str], random: Random
    ) -> tuple[Asked, tuple[SampleQuestion, ...]]:
        head = self._ids(plan.head) if plan.head else []
        room = self._length - len(self._first) - len(head)
        body, ends = self._body(plan, prose, room, random)
        whole = self._ids(body)
        # a context that begins inside a sentence is exactly as long as all others
        cut = len(whole) - room
        context = [*self._first, *head, *whole[cut:]]
        behind = [len(whole) - len(self._ids(body[:end])) for end in ends]
        questions, known = [], []
        for question in plan.questions:
            tokens, answer = self._split(body, question.text, question.answer)
            questions.append(Question(tokens, answer))
            piece = question.piece
            known.append(
                SampleQuestion(
                    None if piece is None else plan.pieces[piece].depth,
                    None if piece is None else behind[piece],
                    question.answer.strip(),
                )
            )
        return Asked(context, tuple(questions), plan.in_turn), tuple(known)

    def _body(self, plan: ContextPlan, prose: Sequence[str], room: int, random: Random) -> tuple[str, list[int]]:
        """Text of at least ``room`` tokens, whose first sentence alone is too long, and where each piece ends in it."""
        if plan.filler is not None:
            words: list[str] = []
            while self._count(text := " " + ", ".join(words) + ".") < room:
                part = list(plan.filler)
                random.shuffle(part)
                words += part
            return text, []
        said = sum(self._count(piece.text) for piece in plan.pieces)
        left = room - said
        if left < 0:
            raise CaseInvalid(
                f"--kv-task-lengths={self._length}: {len(plan.pieces)} facts of task {self._task} take {said} tokens of "
                f"{room}; give a longer context, or another --kv-task"
            )
        # sentences from the end on, of which the first one is too long
        filler: list[str] = []
        while left > 0 or not filler:
            filler.insert(0, prose[-1 - len(filler) % len(prose)])
            left -= self._count(filler[0])
        text, ends = self._joined(plan, filler)
        while len(self._ids(text)) < room:
            # some tokenizers split a sentence into more tokens where it stands alone
            filler.insert(0, prose[-1 - len(filler) % len(prose)])
            text, ends = self._joined(plan, filler)
        return text, ends

    def _joined(self, plan: ContextPlan, filler: Sequence[str]) -> tuple[str, list[int]]:
        """Text of a plan's pieces between sentences, and where each piece ends in it."""
        sizes = [self._count(sentence) for sentence in filler]
        gaps: list[list[int]] = [[] for _ in range(len(filler) + 1)]
        for index, piece in enumerate(plan.pieces):
            # nothing stands before the first sentence, of which only the end is left
            at, before = 1, sizes[0]
            while at < len(filler) and before + sizes[at] / 2 < piece.depth * sum(sizes):
                before += sizes[at]
                at += 1
            gaps[len(filler) if piece.depth == 1 else at].append(index)
        text, ends = "", [0] * len(plan.pieces)
        for at, gap in enumerate(gaps):
            for index in sorted(gap, key=lambda one: plan.pieces[one].depth):
                text += f" {plan.pieces[index].text}"
                ends[index] = len(text)
            if at < len(filler):
                text += f" {filler[at]}"
        return text, ends

    def _split(self, body: str, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of question and answer behind the context.

        Raises
        ------
        CaseInvalid
            If they cannot be told apart, or the answer is not in the vocabulary.
        """
        # what stands right before decides how the first word is split, not what stands far away
        before = body[body.rfind(" ", 0, max(len(body) - 200, 0)) :] if len(body) > 200 else body
        start, asked, whole = (self._ids(text) for text in (before, before + question, before + question + answer))
        if asked[: len(start)] != start:
            # ".\n\n" is one token of some vocabularies; the context is fed before the question and ends by itself
            start, asked, whole = [], self._ids(question), self._ids(question + answer)
        tokens, found = asked[len(start) :], whole[len(asked) :]
        if asked[: len(start)] != start or whole[: len(asked)] != asked or not tokens or not found:
            raise CaseInvalid(
                f"task {self._task}: the tokenizer joins the end of {question.strip()!r} and the begin of "
                f"{answer.strip()!r}, so the answer cannot be scored; use another --kv-task or model"
            )
        if getattr(self._tokenizer, "unk_token_id", None) in found and self._tokenizer.unk_token_id is not None:
            raise CaseInvalid(
                f"task {self._task}: {answer.strip()!r} is not in the model's vocabulary, so it cannot be scored; use another "
                "--kv-task or model"
            )
        if len(found) > 1 and not self._tokenizer.decode(found[:1]).strip():
            # a space of its own is no part of the answer
            tokens, found = [*tokens, found[0]], found[1:]
        return tokens, found

    def _alike(self, words: Sequence[str]) -> list[str]:
        """Those of ``words`` that have as many tokens as most: questions of one length are computed together."""
        usual = Counter(map(self._count, words)).most_common(1)[0][0]
        return [word for word in words if self._count(word) == usual]

    def _ids(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def _count(self, text: str) -> int:
        if text not in self._counts:
            self._counts[text] = len(self._ids(f" {text}"))
        return self._counts[text]


def first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    alone, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    return whole[: whole.index(alone[0])] if alone and alone[0] in whole else []
