"""The tasks: what a context says and what it is asked, as text, by a random generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

_FACT = "The password of the {key} is {value}."
_ASK = "\n\nQuestion: What is the password of the {key}?\nAnswer: The password of the {key} is"
_LIST_ITEMS = 8
_OFTEN, _SELDOM = 3, 1


@dataclass(frozen=True)
class Piece:
    """A sentence of the context that is no filler, and where it stands: 0 is the begin, 1 the end."""

    text: str
    depth: float


@dataclass(frozen=True)
class TextQuestion:
    """A question, its right answer, and the piece that holds it.

    Parameters
    ----------
    text
        Stands right behind the context, or behind the answer before.
    answer
        Stands right behind the question.
    piece
        Index of the piece that says it, ``None`` where the whole context does.
    """

    text: str
    answer: str
    piece: int | None


@dataclass(frozen=True)
class ContextPlan:
    """One context as text.

    Parameters
    ----------
    pieces
        What it says.
    questions
        What is asked, each from the same cache.
    in_turn
        Whether they follow each other in one cache.
    head
        Stands before everything else.
    filler
        What makes the context as long as it has to be: ``None`` is prose, else words to be drawn from.
    """

    pieces: tuple[Piece, ...]
    questions: tuple[TextQuestion, ...]
    in_turn: bool = False
    head: str = ""
    filler: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Draw:
    """What the contexts of one sample are drawn from.

    Parameters
    ----------
    random
        Of the sample.
    depths
        Where what is asked stands.
    keys, values
        Words that facts are about, and that they say.
    """

    random: Random
    depths: Sequence[float]
    keys: Sequence[str]
    values: Sequence[str]


#: makes the contexts of one sample: one that is asked at every depth, or one for each depth
Maker = Callable[[Draw], list[ContextPlan]]


def _facts(count: int, *, in_turn: bool = False, asked_first: bool = False) -> Maker:
    def make(draw: Draw) -> list[ContextPlan]:
        random, depths = draw.random, draw.depths
        groups = [list(depths)] if len(depths) <= count and not asked_first else [[depth] for depth in depths]
        keys, words = random.sample(draw.keys, count), random.sample(draw.values, count)
        others = [random.random() for _ in range(count)]
        plans = []
        for group in groups:
            # the asked ones at their depths, the others anywhere
            places = [*group, *others[: count - len(group)]]
            pieces = [
                Piece(_FACT.format(key=key, value=word), place)
                for key, word, place in zip(keys, words, places, strict=True)
            ]
            order = list(range(len(group)))
            if in_turn:
                random.shuffle(order)
            questions = [TextQuestion(_ASK.format(key=keys[at]), f" {words[at]}", at) for at in order]
            head = f"In the following text, find the password of the {keys[0]}. " if asked_first else ""
            plans.append(ContextPlan(tuple(pieces), tuple(questions), in_turn, head))
        return plans

    return make


def _passkey(draw: Draw) -> list[ContextPlan]:
    number = draw.random.randrange(10_000, 100_000)
    return [
        ContextPlan(
            (Piece(f"The pass key is {number}. Remember it. {number} is the pass key.", depth),),
            (TextQuestion("\n\nQuestion: What is the pass key?\nAnswer: The pass key is", f" {number}", 0),),
        )
        for depth in draw.depths
    ]


def _copy(draw: Draw) -> list[ContextPlan]:
    items = ", ".join(draw.random.sample(draw.values, _LIST_ITEMS))
    return [
        ContextPlan(
            (Piece(f"The list of words: {items}.", depth),),
            (TextQuestion("\n\nThe list of words, again:", f" {items}", 0),),
        )
        for depth in draw.depths
    ]


def _variables(draw: Draw) -> list[ContextPlan]:
    names = draw.random.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 3)
    number = draw.random.randrange(10_000, 100_000)
    said = [f"VAR {names[0]} = {number}.", f"VAR {names[1]} = {names[0]}.", f"VAR {names[2]} = {names[1]}."]
    plans = []
    for depth in draw.depths:
        links = tuple(Piece(text, depth + (1 - depth) * at / 3) for at, text in enumerate(said))
        question = f"\n\nQuestion: What is VAR {names[2]}?\nAnswer: VAR {names[2]} ="
        plans.append(ContextPlan(links, (TextQuestion(question, f" {number}", 0),)))
    return plans


def _common_words(draw: Draw) -> list[ContextPlan]:
    words = draw.random.sample(draw.values, 12)
    # the first one three times as often as any other
    filler = (*[words[0]] * _OFTEN, *[word for word in words[1:] for _ in range(_SELDOM)])
    question = TextQuestion("\n\nThe word that appears most often in the list above is", f" {words[0]}", None)
    return [ContextPlan((), (question,), head="List of words:", filler=filler)]


MAKERS: dict[str, Maker] = {
    "facts1": _facts(1),
    "facts4": _facts(4),
    "facts16": _facts(16),
    "multi_query": _facts(4, in_turn=True),
    "reuse": _facts(4),
    "question_first": _facts(4, asked_first=True),
    "passkey": _passkey,
    "copy": _copy,
    "variables": _variables,
    "common_words": _common_words,
}
