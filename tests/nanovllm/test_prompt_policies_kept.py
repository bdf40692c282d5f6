"""Policies that look at a prompt, on small models with grouped heads: kvpress, `hf` and `nano` keep the same positions."""

from __future__ import annotations

from typing import Any

import pytest
from decoders import loaded, text
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kept_positions import differing, kept_by_kvpress, kept_on_hf, kept_on_nano, spied
from policy_matrix import PROMPT_MATRIX, PromptLine

from kvsuite.compression import get_policy

EVERY_LINE = pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in PROMPT_MATRIX])
TOKENS = 120


@pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in PROMPT_MATRIX if line.press])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_hf_keeps_what_kvpress_keeps(line: PromptLine, ratio: float) -> None:
    of, policy, prompt = loaded("llama"), line.build(keep_ratio=ratio), text(TOKENS)
    scores = spied(policy)
    ours = kept_on_hf(of, policy, prompt)
    assert line.press is not None
    theirs = kept_by_kvpress(of, line.press, ratio, prompt, **line.press_parameters)
    assert ours.shape == (3, 2, int(TOKENS * ratio))
    # of 3 layers and 2 heads, nearly none is near enough to be ranked either way
    assert differing(ours, theirs, scores) <= 4


@EVERY_LINE
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("chunk", [17, 256])
def test_nano_keeps_what_hf_keeps_fed_whole_or_in_chunks(line: PromptLine, kind: str, chunk: int) -> None:
    of, policy, prompt = loaded(kind), line.build(keep_ratio=0.4), text(TOKENS, seed=3)
    scores = spied(policy)
    expected = kept_on_hf(of, policy, prompt)
    found = kept_on_nano(of, line.build(keep_ratio=0.4), prompt, chunk=chunk)
    assert differing(found, expected, scores) <= 4


@EVERY_LINE
@settings(max_examples=15)
@given(tokens=st.integers(2, 40), chunk=st.integers(8, 41), ratio=st.sampled_from([0.1, 0.3, 0.5, 0.9]))
# the model ends this text at once
@example(tokens=40, chunk=9, ratio=0.5)
def test_what_stays_of_any_prompt_on_any_chunks(line: PromptLine, tokens: int, chunk: int, ratio: float) -> None:
    """As many as announced, the sinks and the youngest among them, for each head; a prompt shorter than a window too."""
    policy = line.build(keep_ratio=ratio)
    kept = policy.size_after(tokens)
    found = kept_on_nano(loaded("llama"), policy, text(tokens, seed=tokens), chunk=chunk, block_size=4)
    assert found.shape[-1] == kept
    for row in found.reshape(-1, kept).tolist():
        assert len(set(row)) == kept
        assert set(row) <= set(range(tokens))
        if policy.caveat(tokens) is None and kept < tokens and kept > max(line.recent(kept), line.sinks):
            assert set(range(tokens - line.recent(kept), tokens)) <= set(row)
            assert set(range(min(line.sinks, tokens))) <= set(row)


@pytest.mark.parametrize("chunk", [11, 64])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("knorm", {"keep_ratio": 0.57}),
        ("l2_compress", {"keep_ratio": 0.56, "prune_after": 10}),
        ("fix_size_l2", {"size": 34, "keep_ratio": 0.0}),
    ],
)
def test_of_repeated_tokens_the_older_stay_on_every_engine(name: str, parameters: dict[str, Any], chunk: int) -> None:
    """In the first layer they have keys of one norm, which rounding at different rotations tells apart."""
    of, period = loaded("llama"), 20
    prompt = text(period) * 3
    on_hf = kept_on_hf(of, get_policy(name, **parameters), prompt)[0]
    on_nano = kept_on_nano(of, get_policy(name, **parameters), prompt, chunk=chunk)[0]
    assert on_hf.tolist() == on_nano.tolist()
    for row in on_hf.tolist():
        # not a multiple of 3: the last token that stays has equals that go
        assert len(row) == 34
        for position in row:
            assert position < period or position - period in row


def test_where_all_keys_have_one_norm_the_older_stay() -> None:
    # Qwen3 normalises its keys: nothing but rounding would be left to rank by
    of, prompt = loaded("qwen3"), text(50)
    for found in (
        kept_on_hf(of, get_policy("knorm", keep_ratio=0.5), prompt),
        kept_on_nano(of, get_policy("knorm", keep_ratio=0.5), prompt, chunk=16),
    ):
        assert found.tolist() == [[list(range(25))] * 2] * 3
