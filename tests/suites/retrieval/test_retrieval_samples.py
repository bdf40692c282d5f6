"""Samples: contexts of exact length, with facts where they were asked to stand and nowhere else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvsuite.errors import CaseInvalid
from kvsuite.suites.retrieval.options import TASKS
from kvsuite.suites.retrieval.samples import ContextSample, SampleMaker
from kvsuite.suites.retrieval.tasks import MAKERS
from kvsuite.workloads.corpus import load_corpus

LENGTH, DEPTHS = 300, (0.0, 0.5, 1.0)
PROSE = load_corpus("default", num_texts=1).texts[0]


class WordTokenizer:
    """A token a word with the space before it, a sign, or a digit; ``decode`` gives the text back."""

    unk_token_id = None
    pattern = re.compile(r" ?[A-Za-z]+|[0-9]|\s|[^\w\s]")

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, **how: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(one, len(self.ids)) for one in self.pattern.findall(text)]}

    def decode(self, ids: list[int]) -> str:
        words = list(self.ids)
        return "".join(words[one] for one in ids)


class JoiningTokenizer(WordTokenizer):
    """Splits ``is`` and the word behind it no more: the answer begins inside the question's last token."""

    pattern = re.compile(r" is [a-z]+| ?[A-Za-z]+|[0-9]|\s|[^\w\s]")


class BreakingTokenizer(WordTokenizer):
    """Has a sign and the line breaks behind it as one token, as the vocabularies of Llama 3 and Qwen."""

    pattern = re.compile(r" ?[A-Za-z]+|[0-9]|[^\w\s]\n*|\s")


class LetterTokenizer(WordTokenizer):
    """A token a letter, so that few names are of one length."""

    pattern = re.compile(r"(?s).")


class SmallTokenizer(WordTokenizer):
    """Has no word of a list for what is said."""

    unk_token_id = 0

    def __call__(self, text: str, **how: Any) -> dict[str, list[int]]:
        found = super().__call__(text)["input_ids"]
        words = list(self.ids)
        return {"input_ids": [0 if re.fullmatch(" [a-z]+", words[one]) else one + 1 for one in found]}


def maker(task: str, tokenizer: Any = None, length: int = LENGTH, seed: int = 0) -> SampleMaker:
    return SampleMaker(tokenizer or WordTokenizer(), PROSE, task=task, length=length, depths=DEPTHS, seed=seed)


def tokens_of(samples: list[ContextSample]) -> list[list[int]]:
    return [list(one.context) for sample in samples for one in sample.asked]


def test_every_task_of_the_option_is_made_and_no_other() -> None:
    assert set(TASKS) == set(MAKERS)


@pytest.mark.parametrize("task", TASKS)
def test_contexts_are_exactly_as_long_and_say_what_is_asked_at_its_depth(task: str) -> None:
    tokenizer = WordTokenizer()
    for sample in maker(task, tokenizer).samples(8):
        for asked, known in zip(sample.asked, sample.known, strict=True):
            assert len(asked.context) == LENGTH
            context = tokenizer.decode(list(asked.context))
            for question, what in zip(asked.questions, known, strict=True):
                assert tokenizer.decode(list(question.answer)).strip() == what.answer
                assert what.answer in context
                if what.behind is None:
                    continue
                # the answer stands in front of what is told to stand behind its fact, and not in there
                end = tokenizer.decode(list(asked.context[LENGTH - what.behind :]))
                assert what.answer not in end
                assert what.depth is not None
                assert what.behind == pytest.approx((1 - what.depth) * LENGTH, abs=80)
                if what.depth == 1 and task != "variables":
                    assert what.behind == 0


def test_samples_follow_from_the_seed_alone() -> None:
    ten, four = maker("facts4").samples(10), maker("facts4").samples(4)
    assert [one.hash for one in ten[:4]] == [one.hash for one in four]
    assert len({one.hash for one in ten}) == 10
    assert maker("facts4", seed=1).samples(1)[0].hash != four[0].hash


def test_as_many_facts_as_depths_share_a_context_and_fewer_do_not() -> None:
    for task, contexts, questions in (
        ("facts4", 1, 3),
        ("multi_query", 1, 3),
        ("facts1", 3, 1),
        ("common_words", 1, 1),
    ):
        sample = maker(task).samples(1)[0]
        assert (len(sample.asked), len(sample.asked[0].questions)) == (contexts, questions), task
    assert maker("multi_query").samples(1)[0].asked[0].in_turn


def test_the_question_stands_before_the_context_only_where_it_is_called_so() -> None:
    for task, first in (("question_first", True), ("facts4", False)):
        tokenizer = WordTokenizer()
        sample = maker(task, tokenizer).samples(1)[0]
        assert tokenizer.decode(list(sample.asked[0].context)).startswith("In the following text, find") is first


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    with pytest.raises(
        CaseInvalid, match=r"--kv-task-lengths=100: 16 facts of task facts16 take \d+ tokens of 100; give a"
    ):
        maker("facts16", length=100).samples(1)
    with pytest.raises(CaseInvalid, match="task riddles: no such task; choose one of facts1"):
        maker("riddles")
    with pytest.raises(CaseInvalid, match="has no sentences"):
        SampleMaker(WordTokenizer(), "Short.", task="copy", length=64, depths=DEPTHS, seed=0)


@pytest.mark.parametrize(
    ("tokenizer", "told"), [(JoiningTokenizer(), "the tokenizer joins"), (SmallTokenizer(), "not in the model's vocab")]
)
def test_an_answer_that_cannot_be_scored_is_refused_in_a_line(tokenizer: Any, told: str) -> None:
    with pytest.raises(CaseInvalid, match=told) as caught:
        maker("facts4", tokenizer).samples(1)
    assert "cannot be scored; use another --kv-task or model" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", TASKS)
def test_an_end_of_a_sentence_and_a_break_may_be_one_token(task: str) -> None:
    tokenizer = BreakingTokenizer()
    for sample in maker(task, tokenizer).samples(2):
        for asked, known in zip(sample.asked, sample.known, strict=True):
            for question, what in zip(asked.questions, known, strict=True):
                assert tokenizer.decode(list(question.answer)).strip() == what.answer
                assert tokenizer.decode(list(question.tokens)).startswith("\n")


def test_too_few_names_are_refused_in_a_line() -> None:
    with pytest.raises(CaseInvalid, match=r"task facts16: 13 names of one length in tokens and [0-9]+ words") as caught:
        maker("facts16", LetterTokenizer(), length=2000).samples(1)
    assert "\n" not in str(caught.value)


def test_the_models_first_token_stands_before_the_context() -> None:
    class Beginning(WordTokenizer):
        def __call__(self, text: str, *, add_special_tokens: bool = True, **how: Any) -> dict[str, list[int]]:
            found = super().__call__(text)["input_ids"]
            return {"input_ids": [9999, *found] if add_special_tokens else found}

    [context] = tokens_of(maker("facts4", Beginning()).samples(1))
    assert context[0] == 9999
    assert len(context) == LENGTH
    assert 9999 not in context[1:]
