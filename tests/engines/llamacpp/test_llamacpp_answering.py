"""Questions to a context in llama.cpp: the answers and losses of engine hf on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hf_sessions import random_tokens
from hf_sessions import session as hf_session
from llamacpp_sessions import case_of, needs_library, widened_session

from kvsuite.engines.capabilities import AnswersQuestions, lacking
from kvsuite.engines.llamacpp.session import LlamacppSession
from kvsuite.engines.questions import Asked, Question

pytestmark = needs_library
CONTEXT, QUESTION, ANSWER = 40, 5, 3
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "streaming": {"policy": "streaming_llm", "policy_params": {"start_size": 2, "recent_size": 10}},
    "moved": {"policy": "streaming_llm", "policy_params": {"start_size": 2, "recent_size": 10, "positions": "cache"}},
    "recent": {"policy": "recent_only", "policy_params": {"window": 12}},
}
F32 = {"kv_cache_dtype": "f32"}
#: nats; a token more or less in the cache moves losses by 0.1 and more
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamacppSession]:
    found = widened_session(tmp_path_factory.mktemp("cache"))
    yield found
    found.close()


def asked(seed: int, *, in_turn: bool = False) -> Asked:
    size = QUESTION + ANSWER
    tokens = random_tokens(CONTEXT + 2 * size, seed)
    behind = [tokens[CONTEXT + at * size :][:size] for at in range(2)]
    return Asked(tokens[:CONTEXT], tuple(Question(one[:QUESTION], one[QUESTION:]) for one in behind), in_turn)


@pytest.mark.parametrize("in_turn", [False, True], ids=["apart", "in turn"])
@pytest.mark.parametrize("name", CASES)
def test_answers_and_losses_are_those_of_transformers(tiny: LlamacppSession, name: str, in_turn: bool) -> None:
    workload = {"prompt_tokens": CONTEXT, "max_new_tokens": 32}
    contexts = [asked(seed, in_turn=in_turn) for seed in range(3)]
    # one question asked twice is fed twice
    contexts.append(replace(contexts[0], questions=contexts[0].questions[:1] * 2))
    tiny.prepare(case_of(params=F32, workload=workload, **CASES[name]))
    reference = hf_session()
    reference.prepare(case_of(engine="hf", workload=workload, **CASES[name]))
    found, expected = (one.answer(contexts, full=False) for one in (tiny, reference))
    assert [[answer.output for answer in one] for one in found] == [
        [answer.output for answer in one] for one in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        for answer, other in zip(ours, theirs, strict=True):
            assert answer.nll == pytest.approx(other.nll, abs=TOLERANCE)
            assert answer.kept == other.kept
    if name != "full":
        # nothing of what was evicted is seen, and the full cache is another one
        whole = tiny.answer(contexts, full=True)
        assert max(
            abs(one - other)
            for ours, theirs in zip(found, whole, strict=True)
            for answer, full in zip(ours, theirs, strict=True)
            for one, other in zip(answer.nll, full.nll, strict=True)
        ) > 20 * TOLERANCE  # fmt: skip
    reference.finish()


def test_a_question_longer_than_a_step_and_one_token_of_an_answer(tiny: LlamacppSession) -> None:
    tokens = random_tokens(600, 5)
    one = Asked(tokens[:20], (Question(tokens[20:570], tokens[570:571]),))
    tiny.prepare(case_of(params=F32))
    [[answer]] = tiny.answer([one], full=False)
    assert lacking(tiny, AnswersQuestions) is None
    expected = tiny.score(tokens[:571], "prefix-continuation", 569).nll[-1:]
    assert answer.nll == pytest.approx(expected, abs=TOLERANCE)
    assert len(answer.output) == 1


def test_a_quantised_cache_is_asked_and_compared_with_the_full_one(tiny: LlamacppSession) -> None:
    contexts = [asked(7)]
    tiny.prepare(case_of(params={"kv_cache_dtype": "bf16"}))
    [through], [full] = (tiny.answer(contexts, full=flag) for flag in (False, True))
    assert [one.nll for one in through] != [one.nll for one in full]
    assert through[0].nll == pytest.approx(full[0].nll, abs=0.3)


@pytest.mark.parametrize("name", ["full", "streaming"])
def test_outputs_end_where_they_are_told_to(tiny: LlamacppSession, name: str) -> None:
    tiny.prepare(case_of(params=F32, workload={"prompt_tokens": CONTEXT, "max_new_tokens": 32}, **CASES[name]))
    tokens = random_tokens(CONTEXT + QUESTION, 11)
    context, question, right = tokens[:CONTEXT], tokens[CONTEXT:], random_tokens(4, 12)
    asked_again = (
        Question(question, (), 6), Question(question, right, 6, lambda output: len(output) == 2), Question(question, right, 1),
        Question(question, right),
    )  # fmt: skip
    [[whole, ended, short, usual]] = tiny.answer([Asked(context, asked_again)], full=False)
    assert (len(whole.output), whole.nll) == (6, [])
    assert (ended.output, short.output, usual.output) == (whole.output[:2], whole.output[:1], whole.output[:4])
    assert len(usual.nll) == 4
    for one in (ended, short):
        assert one.nll == pytest.approx(usual.nll, abs=TOLERANCE)
