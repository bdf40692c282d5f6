"""Questions to a compressed context on both engines: equal answers and losses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hf_sessions import VOCAB, case, session

from kvsuite.case import Case
from kvsuite.engines.capabilities import AnswersQuestions
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.questions import Asked, Question

CONTEXT, QUESTION, ANSWER = 40, 5, 3
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "streaming": {"policy": "streaming_llm", "policy_params": {"start_size": 2, "recent_size": 10}},
    "snapkv": {"policy": "snapkv", "policy_params": {"window": 8, "keep_ratio": 0.4}},
}
#: of the context's tokens, in every layer
KEPT = {"full": CONTEXT, "streaming": 12, "snapkv": 16}


@functools.cache
def served() -> NanoSession:
    """The same weights as `hf_sessions.session`."""
    built = NanoSession(case(engine="nano"), EngineSettings(threads=1))
    with torch.no_grad():
        for name, weight in built._loaded.model.named_parameters():
            if "norm" not in name and "embed" not in name:
                weight.mul_(8)
    return built


def asked(seed: int, *, in_turn: bool) -> Asked:
    # no two tokens are equal: equal keys are kept or not by rounding
    tokens = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed)).tolist()
    size = QUESTION + ANSWER
    behind = [tokens[CONTEXT + at * size :][:size] for at in range(2)]
    return Asked(tokens[:CONTEXT], tuple(Question(one[:QUESTION], one[QUESTION:]) for one in behind), in_turn)


@pytest.mark.parametrize("in_turn", [False, True], ids=["apart", "in turn"])
@pytest.mark.parametrize("name", CASES)
def test_both_engines_answer_the_same_tokens(name: str, in_turn: bool) -> None:
    of: Case = case(name=name, workload={"prompt_tokens": CONTEXT, "max_new_tokens": 32}, **CASES[name])
    contexts = [asked(seed, in_turn=in_turn) for seed in range(3)]
    sessions: list[Any] = [session(), served()]
    found = []
    for one in sessions:
        assert isinstance(one, AnswersQuestions)
        one.prepare(Case(**(of.to_dict() | {"engine": "nano" if one is served() else "hf"})))
        found.append(one.answer(contexts, full=False))
    for ours, theirs in zip(*found, strict=True):
        for answer, other in zip(ours, theirs, strict=True):
            assert answer.output == other.output
            assert answer.nll == pytest.approx(other.nll, abs=5e-4)
            assert answer.kept == other.kept == KEPT[name]
    if name != "full":
        whole = served().answer(contexts, full=True)
        assert whole != found[1]
        session().prepare(case(workload=of.workload))
        reference = session().answer(contexts, full=False)
        assert [[one.output for one in group] for group in whole] == [
            [one.output for one in group] for group in reference
        ]


@pytest.mark.parametrize("name", CASES)
def test_both_engines_generate_until_an_output_ends(name: str) -> None:
    of = case(name=name, workload={"prompt_tokens": CONTEXT, "max_new_tokens": 32}, **CASES[name])
    [context, *_] = [asked(seed, in_turn=False) for seed in range(1)]
    question, right = context.questions[0].tokens, list(context.questions[1].answer)
    found = []
    for one in (session(), served()):
        one.prepare(Case(**(of.to_dict() | {"engine": "nano" if one is served() else "hf"})))
        [[whole]] = one.answer([Asked(context.context, (Question(question, (), 6),))], full=False)
        assert (len(whole.output), whole.nll) == (6, [])
        third = whole.output[2]
        assert third not in whole.output[:2]
        ends = Question(question, right, 6, lambda output, third=third: output[-1] == third)
        others = Question(question, right, 4)
        asked_again = [Asked(context.context, (ends, others)), Asked(context.context, (others, others))]
        [[ended, long], [alone, _]] = one.answer(asked_again, full=False)
        # it ends with that token; whoever is computed beside it goes on
        assert (ended.output, long.output, alone.output) == (whole.output[:3], whole.output[:4], whole.output[:4])
        assert ended.nll == pytest.approx(long.nll, abs=2e-4)
        assert len(ended.nll) == len(right)
        found.append((whole.output, long.nll))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=5e-4)


def test_rows_of_a_batch_end_each_by_itself() -> None:
    of = case(workload={"prompt_tokens": CONTEXT, "max_new_tokens": 32})
    session().prepare(of)
    contexts = [asked(seed, in_turn=False).context for seed in range(3)]
    tokens = asked(7, in_turn=False).questions[0].tokens
    whole = session().answer([Asked(one, (Question(tokens, (), 5),)) for one in contexts], full=False)
    sizes = (1, 5, 3)
    cut = session().answer(
        [
            Asked(one, (Question(tokens, (), 5, lambda output, size=size: len(output) == size),))
            for one, size in zip(contexts, sizes, strict=True)
        ],
        full=False,
    )
    assert [one[0].output for one in cut] == [w[0].output[:size] for w, size in zip(whole, sizes, strict=True)]
