from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_matrix import MATRIX

from kvsuite.compression import FixSizeL2, L2Compress, Policy, RecentOnly, StreamingLLM
from kvsuite.engines.cache_plan import CachePlan, plan
from kvsuite.models.layers import Layer, ModelLayers, layers_of
from kvsuite.models.presets import build_config

FED = 1999  # 2,000 tokens are 1,999 predictions


def bytes_of(preset: str, lengths: list[int], element_bytes: int = 2) -> int:
    return layers_of(build_config(preset).to_dict()).kv_bytes(lengths, element_bytes)


def lengths_of(policy: Policy, layers: int) -> list[int]:
    compressed, full = plan(policy, 1, FED - 1), plan(None, 1, FED - 1)
    return [full.final if layer in policy.skip_layers else compressed.final for layer in range(layers)]


def test_pythia_full_cache() -> None:
    assert bytes_of("Pythia-2.8b", [1] * 32) == 327_680
    assert plan(None, 1, FED - 1) == CachePlan(capacity=FED, prefill=1, final=FED)
    assert bytes_of("Pythia-2.8b", [FED] * 32) == 655_032_320
    assert bytes_of("Pythia-2.8b", [FED] * 32, element_bytes=4) == 2 * 655_032_320


@pytest.mark.parametrize(("total", "expected"), [(256, 119_582_720), (512, 198_225_920), (1024, 355_512_320)])
def test_pythia_with_two_skipped_layers(total: int, expected: int) -> None:
    policy = StreamingLLM(recent_size=total - 4, skip_layers=[0, 1])
    lengths = lengths_of(policy, 32)
    assert lengths == [FED, FED] + [total] * 30
    assert bytes_of("Pythia-2.8b", lengths) == expected
    for other in (RecentOnly(window=total, skip_layers=[0, 1]), FixSizeL2(size=total, skip_layers=[0, 1])):
        assert lengths_of(other, 32) == lengths


def test_the_same_bytes_a_token_everywhere() -> None:
    assert bytes_of("Llama-3-8B", [1] * 32) == 131_072


@pytest.mark.parametrize(("ratio", "final", "low"), [(0.8, 99, 81), (0.5, 99, 51), (0.3, 39, 31)])
def test_defect_04_l2_after_every_token_saws(ratio: float, final: int, low: int) -> None:
    policy = L2Compress(keep_ratio=ratio, prune_after=100, mode="every_token")
    assert plan(policy, 1, FED - 1).final == final
    # from full to full it takes at most 70 steps
    held = [plan(policy, 1, steps).final for steps in range(100, 260)]
    assert (min(held), max(held)) == (low, 100)
    assert plan(policy, 1, FED - 1).capacity == 101


def test_l2_single_shot_is_a_ratio_once() -> None:
    policy = L2Compress(keep_ratio=0.3, prune_after=100, mode="single_shot")
    assert plan(policy, 1000, 0) == CachePlan(capacity=300, prefill=300, final=300)
    # afterwards the cache grows again
    assert plan(policy, 1000, 50) == CachePlan(capacity=350, prefill=300, final=350)
    assert plan(policy, 1, FED - 1).final == 31 + FED - 101


def test_l2_interval() -> None:
    policy = L2Compress(keep_ratio=0.5, prune_after=100, mode="interval=64")
    assert plan(policy, 1, 126).final == 127
    assert plan(policy, 1, 127).final == 64
    assert plan(policy, 1, 126).capacity == 127
    assert plan(policy, 1, 127).capacity == 128


def test_a_compressed_prompt_never_counts_whole() -> None:
    assert plan(StreamingLLM(recent_size=60), 1000, 31) == CachePlan(capacity=65, prefill=64, final=64)
    assert plan(StreamingLLM(recent_size=60), 1000, 0) == CachePlan(capacity=64, prefill=64, final=64)
    assert plan(None, 1000, 31) == CachePlan(capacity=1031, prefill=1000, final=1031)


@given(line=st.sampled_from(MATRIX), prompt=st.integers(1, 40), steps=st.integers(0, 40))
def test_a_plan_holds_together(line: Any, prompt: int, steps: int) -> None:
    policy = line.build()
    found = plan(policy, prompt, steps)
    assert found.prefill <= prompt
    assert found.final <= min(found.capacity, prompt + steps)
    assert found.capacity <= max(prompt + steps, 1)
    further = plan(policy, prompt, steps + 1)
    assert further.capacity == max(found.capacity, found.final + 1)
    assert further.prefill == found.prefill


@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    heads=st.integers(1, 64),
    dims=st.sampled_from([(16, 16), (192, 128), (512, 64)]),
    element=st.sampled_from([2, 4]),
)
def test_bytes_are_keys_and_values_of_every_layer(
    lengths: list[int], heads: int, dims: tuple[int, int], element: int
) -> None:
    layers = [Layer(index, "full", None, True, heads, *dims, "full_attention") for index in range(len(lengths))]
    # a layer that stores nothing counts nothing
    layers.append(Layer(len(lengths), None, None, False, 0, 0, 0, "linear_attention"))
    found = ModelLayers(tuple(layers), "rotary").kv_bytes([*lengths, 7], element)
    assert found == sum(heads * sum(dims) * element * n for n in lengths)
