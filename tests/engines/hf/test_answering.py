"""Questions to a compressed context: the order of things, against scoring through the cache, which feeds it otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from hf_sessions import case, random_tokens, session

from kvsuite.engines.capabilities import AnswersQuestions
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.questions import Asked, Question
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid

CONTEXT, QUESTION, ANSWER = 40, 5, 3
WORKLOAD = {"prompt_tokens": CONTEXT, "max_new_tokens": 32}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "streaming": {"policy": "streaming_llm", "policy_params": {"start_size": 2, "recent_size": 10}},
    "moved": {"policy": "streaming_llm", "policy_params": {"start_size": 2, "recent_size": 10, "positions": "cache"}},
    "recent": {"policy": "recent_only", "policy_params": {"window": 12}},
    "norms": {"policy": "fix_size_l2", "policy_params": {"size": 12, "keep_ratio": 0.5, "strategy": "keep_low"}},
    "snapkv": {"policy": "snapkv", "policy_params": {"window": 8, "keep_ratio": 0.4}},
    "packed": {"params": {"kv_cache_dtype": "int8"}},
    "grouped": {"params": {"kv_cache_dtype": "int8:int4(residual=4)"}},
}


def prepared(name: str) -> HfSession:
    built = session()
    built.prepare(case(name=name, workload=WORKLOAD, **CASES[name]))
    return built


def asked(seed: int, questions: int = 1, *, in_turn: bool = False) -> Asked:
    size = QUESTION + ANSWER
    tokens = random_tokens(CONTEXT + questions * size, seed)
    behind = [tokens[CONTEXT + at * size :][:size] for at in range(questions)]
    return Asked(tokens[:CONTEXT], tuple(Question(one[:QUESTION], one[QUESTION:]) for one in behind), in_turn)


def scored(built: HfSession, before: list[int], answer: list[int], *, prompt: int) -> list[float]:
    """Losses of ``answer`` behind ``before``, of which the first ``prompt`` tokens are prefilled and compressed."""
    found = built.score([*before, *answer], "prefix-continuation", prompt)
    return found.nll[-len(answer) :]


@pytest.mark.parametrize("name", CASES)
def test_a_question_is_fed_behind_what_the_method_left_of_the_context(name: str) -> None:
    built, contexts = prepared(name), [asked(1), asked(2), asked(3)]
    found = built.answer(contexts, full=False)
    for one, [answer] in zip(contexts, found, strict=True):
        [question] = one.questions
        before = [*one.context, *question.tokens]
        expected = scored(built, before, list(question.answer), prompt=CONTEXT)
        assert answer.nll == pytest.approx(expected, abs=2e-4)
        # greedily, each token behind those before
        for at in range(1, ANSWER + 1):
            rows: list[int] = []
            built.score_rows(
                [*before, *answer.output[:at]], "prefix-continuation", CONTEXT,
                lambda index, logits, rows=rows: rows.append(int(logits.argmax())), full=False,
            )  # fmt: skip
            assert rows[-1] == answer.output[at - 1]


@pytest.mark.parametrize("name", [name for name, of in CASES.items() if "policy" in of])
def test_a_cache_that_is_compressed_behind_the_question_would_answer_otherwise(name: str) -> None:
    """Were the question part of the prompt, or the evicted tokens still seen, these are the losses that would come out."""
    built, one = prepared(name), asked(1)
    [[answer]] = built.answer([one], full=False)
    [question] = one.questions
    before = [*one.context, *question.tokens]
    seeing = scored(built, before, list(question.answer), prompt=CONTEXT + QUESTION - 1)
    [[everything]] = built.answer([one], full=True)
    assert answer.nll != pytest.approx(seeing, abs=1e-2)
    assert answer.nll != pytest.approx(everything.nll, abs=1e-2)


def test_the_full_cache_answers_as_it_serves() -> None:
    built, contexts = prepared("full"), [asked(seed) for seed in range(4)]
    found = built.answer(contexts, full=False)
    for one, [answer] in zip(contexts, found, strict=True):
        [question] = one.questions
        [served] = built.serve([ServeRequest([*one.context, *question.tokens], ANSWER)]).outputs
        assert answer.output == served
    assert built.answer(contexts, full=True) == found


@pytest.mark.parametrize("name", ["full", "streaming", "snapkv", "grouped"])
def test_questions_of_one_context_do_not_see_each_other(name: str) -> None:
    built, one = prepared(name), asked(1, 3)
    [together] = built.answer([one], full=False)
    apart = [built.answer([Asked(one.context, (question,))], full=False)[0][0] for question in one.questions]
    for ours, alone in zip(together, apart, strict=True):
        assert ours.output == alone.output
        assert ours.nll == pytest.approx(alone.nll, abs=2e-4)


@pytest.mark.parametrize("name", ["full", "streaming", "packed"])
def test_questions_in_turn_stand_behind_the_answers_that_were_given(name: str) -> None:
    built, one = prepared(name), asked(1, 2, in_turn=True)
    [[first, second]] = built.answer([one], full=False)
    before = [*one.context, *one.questions[0].tokens, *first.output, *one.questions[1].tokens]
    assert second.nll == pytest.approx(scored(built, before, list(one.questions[1].answer), prompt=CONTEXT), abs=2e-4)


def test_a_press_is_asked_one_context_at_a_time() -> None:
    built, contexts = session(), [asked(1, 2), asked(2, 2)]
    pytest.importorskip("kvpress")
    built.prepare(case(workload=WORKLOAD, policy="kvpress:Knorm", policy_params={"keep_ratio": 0.5}))
    found = built.answer(contexts, full=False)
    for one, answers in zip(contexts, found, strict=True):
        for question, answer in zip(one.questions, answers, strict=True):
            before = [*one.context, *question.tokens]
            assert answer.nll == pytest.approx(scored(built, before, list(question.answer), prompt=CONTEXT), abs=2e-4)


def test_what_a_press_keeps_outside_the_cache_cannot_be_asked_anew() -> None:
    pytest.importorskip("kvpress")
    built = session()
    built.prepare(case(workload=WORKLOAD, policy="kvpress:AdaKV", policy_params={"keep_ratio": 0.5}))
    with pytest.raises(CaseInvalid, match="cannot be asked several times"):
        built.answer([asked(1)], full=False)


def test_it_is_a_capability_and_a_question_has_tokens() -> None:
    assert isinstance(session(), AnswersQuestions)
    for tokens, answer in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            Question(tokens, answer)
    with pytest.raises(ValueError, match="as many tokens"):
        Asked([1], (Question([1], [2], 5),), in_turn=True)
