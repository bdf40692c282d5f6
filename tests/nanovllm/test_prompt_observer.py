"""Policies see the same queries however a prompt is computed: whole, in chunks, by static steps, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import fresh, greedy, loaded, text
from kept_positions import full_keys, kept_in_pool
from serving import assert_nothing_lost
from torch import Tensor

from kvsuite.compression import get_policy
from kvsuite.engines.rotary import Rotary
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.cuda_runner import cuda_runner
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime

POLICIES: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 6},
    "tova": {},
    "h2o": {},
    "knorm": {},
    "expected_attention": {"future": 16, "sinks": 2},
}
# chunks of 24 leave a last token alone, which a decode step would compute
PROMPT, CHUNK = 49, 24


def positions(of: LoadedModel, name: str, *, chunk: int, runner: Any = None) -> Tensor:
    """What stays of the prompt, ``[layers, kv_heads, kept]``."""
    limits = Limits(
        max_model_len=96,
        max_num_seqs=4,
        max_num_batched_tokens=chunk,
        num_blocks=64,
        block_size=4,
        prefix_caching=False,
    )
    policy = get_policy(name, keep_ratio=0.5, **POLICIES[name])
    whole = full_keys(of, text(PROMPT))
    rotation = Rotary(of.model) if policy.needs.query_statistics is not None else None
    runtime = Runtime(of, limits, policy=policy, rotation=rotation, runner=runner, overlap=False)
    try:
        # another sequence decodes beside the prompt
        runtime.add(greedy(text(5, 1), 40))
        runtime.step()
        request = runtime.add(greedy(text(PROMPT), 8))
        while request.computed < PROMPT:
            runtime.step()
        kept = kept_in_pool(runtime, request, whole)
        while runtime.unfinished:
            runtime.step()
    finally:
        runtime.close()
    assert_nothing_lost(runtime)
    return kept


# Qwen3's keys are normalised: their norms say nothing
CASES = [(name, kind) for name in POLICIES for kind in ("llama", "qwen3") if (name, kind) != ("knorm", "qwen3")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_chunks_and_static_steps_change_nothing(name: str, kind: str) -> None:
    of = loaded(kind)
    whole = positions(of, name, chunk=96)
    assert torch.equal(whole, positions(of, name, chunk=CHUNK + 1))
    assert torch.equal(whole, positions(of, name, chunk=CHUNK + 1, runner=cuda_runner(sizes=[1, 2, 4])))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_gpu_keeps_the_same_tokens(name: str, kind: str) -> None:
    pytest.importorskip("triton")
    whole = positions(loaded(kind), name, chunk=96)
    of = fresh(kind)
    on_cuda = replace(of, model=of.model.to("cuda:0"), device=torch.device("cuda:0"))
    for runner in (None, cuda_runner(sizes=[1, 2, 4])):
        found = positions(on_cuda, name, chunk=CHUNK + 1, runner=runner)
        # another order of sums may turn a choice between two that are nearly alike
        assert (found != whole).float().mean() < 0.03
