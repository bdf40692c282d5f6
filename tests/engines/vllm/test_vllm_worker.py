"""What the worker makes of vLLM's log-probabilities: an engine that gives them as vLLM does, two tokens equally probable."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvsuite.engines.vllm.worker import StepwiseEngine

#: behind every token: token 2 and token 3 are equally probable, and an argmax is the first of them
ROW = {0: 0.1, 1: 0.1, 2: 0.4, 3: 0.4}
MOST = 2


class TiedEngine:
    """One request; its log-probabilities of a prompt as ``vllm.logprobs`` builds them.

    The token's own rank is the number of tokens that are at least as probable; where the token is among the most probable
    that were asked for, its place there stands instead.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[str, list[int], Any]] = []

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> str:
        self._waiting.append((name, prompt["prompt_token_ids"], params))
        return name

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting)

    def step(self) -> list[Any]:
        name, prompt, params = self._waiting.pop()
        behind = [None, *(self._row(token, params.prompt_logprobs) for token in prompt[1:])]
        last = self._row(params.allowed_token_ids[0], params.logprobs)
        return [
            SimpleNamespace(request_id=name, prompt_logprobs=behind, outputs=[SimpleNamespace(logprobs=[last])])
        ]  # fmt: skip

    @staticmethod
    def _row(token: int, wanted: int) -> dict[int, Any]:
        place = {token: sum(one >= ROW[token] for one in ROW.values())}
        best = sorted(ROW, key=lambda one: (-ROW[one], one))[:wanted]
        place |= {one: at for at, one in enumerate(best, 1)}
        return {one: SimpleNamespace(logprob=math.log(ROW[one]), rank=rank) for one, rank in place.items()}


def test_one_of_two_tokens_that_are_equally_probable_is_the_most_probable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    parameters.RequestOutputKind = SimpleNamespace(FINAL_ONLY=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    worker = object.__new__(StepwiseEngine)
    worker.engine, worker._rows, worker._inside = TiedEngine(), None, {}
    (found,) = worker.score([{"tokens": [0, 1, MOST, 3, MOST], "first": 1}])["scores"]
    # as an argmax has it; a rank of the token alone would be 2 for both
    assert found["top1"] == [False, True, False, True]
    assert found["nll"] == [-math.log(ROW[one]) for one in (1, MOST, 3, MOST)]
