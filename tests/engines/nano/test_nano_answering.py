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
    if name != "full":
        whole = served().answer(contexts, full=True)
        assert whole != found[1]
        session().prepare(case(workload=of.workload))
        reference = session().answer(contexts, full=False)
        assert [[one.output for one in group] for group in whole] == [
            [one.output for one in group] for group in reference
        ]
