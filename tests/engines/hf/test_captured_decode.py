"""Captured decode steps give the tokens of eager ones: a step that was captured wrongly is fast and silent."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("captured steps need a CUDA device", allow_module_level=True)

from requests_served import timed, tokens_of  # noqa: E402

from kvsuite.engines.registry import SessionPool  # noqa: E402
from kvsuite.engines.results import ServeRequest  # noqa: E402
from kvsuite.meters.clock import clock_for  # noqa: E402
from kvsuite.options.resolve import default_options  # noqa: E402
from kvsuite.suites.compression.cases import compression_cases  # noqa: E402

pytestmark = pytest.mark.gpu
PROMPT, NEW = 192, 48


@pytest.fixture(scope="module")
def sessions():
    pool = SessionPool(seed=0, threads=None)
    yield pool
    pool.close()


def _cases(**overrides):
    values = {
        "model": "dummy:tiny", "device": "cuda:0", "dtype": "float32", "prompt_tokens": str(PROMPT),
        "max_new_tokens": str(NEW), "method": "streaming_llm,fix_size_l2,l2_compress", "l2_mode": "every_token",
        "prune_after": "20", "keep_ratios": "0.5", "strategies": "keep_low,random",
    }  # fmt: skip
    return compression_cases(default_options(**(values | overrides)))


CASES = [
    *_cases(),
    *_cases(skip_layers="0"),
    *_cases(positions="cache"),
    *_cases(positions="cache", skip_layers="0"),
    *_cases(method="kvpress:SnapKV,kvpress:PyramidKV,kvpress:KeyRerotation"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.id}-skip{case.policy_params.get('skip_layers', [])}")
def test_captured_steps_give_the_tokens_of_eager_steps(case, sessions):
    session = sessions.get(case)
    if case.policy and case.policy.startswith("kvpress:"):
        pytest.importorskip("kvpress")
    session.prepare(case)
    tokens_of(session, [(7 * i + 3) % 500 for i in range(PROMPT)], NEW)
    session.capture([ServeRequest([(7 * i + 3) % 500 for i in range(PROMPT)], NEW)])
    assert session.effective["decode_step"] == "cuda_graph"
    for shift in range(3):
        prompt = [(11 * i + shift) % 500 for i in range(PROMPT)]
        times, output = timed(session, prompt, NEW, clock_for(session.device))
        assert times.generated == NEW
        assert output == tokens_of(session, prompt, NEW)
