"""The roofline of serving: by hand, and against the table that the design of the pipeline began with."""

from __future__ import annotations

import pytest

from kvsuite.compression import get_policy
from kvsuite.errors import UserError
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.roofline import Roofline, sequences_that_fit
from kvsuite.nanovllm.simulation import Arrival, StepWork, simulate

# Qwen3-8B on an H200: bytes of a step, 36 layers of 8 heads of 128 in bfloat16, measured rates
QWEN3_8B = Roofline(step_bytes=15.1e9, token_bytes=2 * 36 * 8 * 128 * 2, bandwidth=3.5e12, prompt_rate=40_500)


def test_a_step_reads_the_weights_and_every_stored_token_once() -> None:
    device = Roofline(step_bytes=1000, token_bytes=10, bandwidth=100, prompt_rate=5)
    assert device.decode_step_s(0) == 10
    assert device.decode_step_s(50) == 15


def test_output_tokens_by_hand() -> None:
    device = Roofline(step_bytes=1000, token_bytes=10, bandwidth=100, prompt_rate=5)
    # a pool for two: a prompt of 20 takes 4 s, ten steps of 10 + 2 * 25 * 0.1 = 15 s for two
    assert device.output_tokens_s(prompt=20, new_tokens=10, pool_tokens=60) == pytest.approx(10 / (4 + 75))
    # 5 of 20 stay: (60 - 15) / 15 = 3 sequences, steps of 10 + 3 * 10 * 0.1 = 13 s
    compressed = device.output_tokens_s(prompt=20, new_tokens=10, pool_tokens=60, kept=5)
    assert compressed == pytest.approx(10 / (4 + 10 * 13 / 3))
    alone = device.output_tokens_s(prompt=20, new_tokens=10, pool_tokens=60, kept=5, max_num_seqs=1)
    assert alone == pytest.approx(10 / (4 + 10 * 11))


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "sequences", "dense", "by_2", "by_5"),
    [
        (3968, 128, 64, 1025, 1.10, 1.19),
        (3968, 128, 16, 830, 1.19, 1.37),
        (3584, 512, 16, 1655, 1.41, 2.00),
        (3584, 512, 8, 1145, 1.41, 2.16),
        (1024, 1024, 16, 2786, 1.26, 1.57),
    ],
)
def test_the_table_of_the_design(
    prompt: int, new_tokens: int, sequences: int, dense: float, by_2: float, by_5: float
) -> None:
    """Its dense figures to 3 %, its gains to 7 %: it was made with whole requests, this with fractions of them."""
    case = {"prompt": prompt, "new_tokens": new_tokens, "pool_tokens": sequences * (prompt + new_tokens)}
    whole = QWEN3_8B.output_tokens_s(**case)
    assert whole == pytest.approx(dense, rel=0.03)
    for factor, gain in ((2, by_2), (5, by_5)):
        found = QWEN3_8B.output_tokens_s(**case, kept=prompt // factor, max_num_seqs=256)
        assert found == pytest.approx(dense * gain, rel=0.07)


def test_the_figures_of_qwen3_8b() -> None:
    """Exact ones, so that a change of the formula is seen: 3584 in, 512 out, a pool for 16."""
    case = {"prompt": 3584, "new_tokens": 512, "pool_tokens": 65_536}
    rates = [QWEN3_8B.output_tokens_s(**case, kept=kept) for kept in (None, 3584 // 2, 3584 // 5)]
    assert [round(rate) for rate in rates] == [1655, 2409, 3352]


def test_the_prompt_itself_has_to_fit() -> None:
    assert sequences_that_fit(prompt=100, new_tokens=10, pool_tokens=105, kept=10) == 1
    with pytest.raises(UserError, match="does not hold one request of 100 \\+ 10 tokens"):
        sequences_that_fit(prompt=100, new_tokens=10, pool_tokens=99, kept=10)
    with pytest.raises(UserError, match="bandwidth=0 must be above 0"):
        Roofline(step_bytes=1, token_bytes=1, bandwidth=0, prompt_rate=1)


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "factor", "share"), [(384, 128, 5, 0.899), (256, 256, None, 1.004), (256, 256, 5, 1.013)]
)
def test_it_is_an_estimate_that_the_scheduler_may_pass(
    prompt: int, new_tokens: int, factor: int | None, share: float
) -> None:
    """Why no figure draws it as a limit: under exactly its step times, nano's schedule gives more where ages differ."""

    def seconds(work: StepWork) -> float:
        decoding = QWEN3_8B.decode_step_s(work.kv_tokens) if work.decode_rows else 0.0
        return work.prompt_tokens / QWEN3_8B.prompt_rate + decoding

    longest = prompt + new_tokens
    limits = Limits(
        max_model_len=longest, max_num_seqs=64, max_num_batched_tokens=8192, num_blocks=8 * longest // 16 + 1,
        prefill_first=True,
    )  # fmt: skip
    policy = None if factor is None else get_policy("streaming_llm", factor=factor)
    found = simulate([Arrival(prompt, new_tokens)] * 64, limits, seconds, policy=policy).output_tokens_s
    estimate = QWEN3_8B.output_tokens_s(
        prompt=prompt, new_tokens=new_tokens, pool_tokens=8 * longest, kept=None if factor is None else prompt // factor,
        max_num_seqs=64,
    )  # fmt: skip
    assert found / estimate == pytest.approx(share, abs=0.002)
