"""The cache as a container: buffers that stay, bytes that are counted, calls in the right order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from policy_matrix import MATRIX, Line
from tiny_decoders import HEAD_DIM, LAYERS, chunks_of, decoder, feed, text

from kvsuite.compression import FixSizeL2, RecentOnly, StreamingLLM
from kvsuite.engines.cache_plan import plan
from kvsuite.engines.hf.cache import EvictionCache
from kvsuite.engines.rotary import Rotary

TOKEN_BYTES = 2 * 2 * HEAD_DIM * 4


def new_cache(policy: Any = None, **options: Any) -> EvictionCache:
    of = decoder("llama")
    shape: dict[str, Any] = {"layers": of.layers, "batch": 1, "kv_heads": 2, "device": of.device} | options
    return EvictionCache(policy=policy, **shape)


def buffers(cache: EvictionCache) -> list[int]:
    return [t.data_ptr() for layer in cache.layers for t in layer.store.tensors()]


@torch.no_grad()
def step(cache: EvictionCache, token: int, tokens: int = 1) -> torch.Tensor:
    return decoder("llama").forward(torch.full((1, tokens), token), cache)


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=line.id)
        for line in MATRIX
        if line.policy in ("recent_only", "streaming_llm", "fix_size_l2")
    ],
)
def test_defect_14_a_step_moves_one_token_and_no_buffer(line: Line, positions: Any) -> None:
    policy = line.build(positions=positions)
    rotary = Rotary(decoder("llama").model) if positions == "cache" else None
    cache = new_cache(policy, capacity=(plan(policy, 20, 30).capacity,) * 2, rotary=rotary)
    step(cache, 1, tokens=20)
    step(cache, 2)
    at = buffers(cache)
    tables = cache.groups[0]._positions.data_ptr(), cache.groups[0]._ranks.data_ptr()
    for token in range(3, 32):
        before = [layer.store.tensors()[1].clone() for layer in cache.layers]
        step(cache, token)
        for layer, old in zip(cache.layers, before, strict=True):
            changed = (layer.store.tensors()[1] != old).any(-1)
            assert changed.sum(-1).max() == 1
    assert buffers(cache) == at
    assert (cache.groups[0]._positions.data_ptr(), cache.groups[0]._ranks.data_ptr()) == tables
    cache.reset()
    assert cache.lengths() == [0] * LAYERS
    step(cache, 1, tokens=20)
    assert buffers(cache) == at


def test_copying_builds_new_buffers() -> None:
    cache = new_cache(RecentOnly(window=8), implementation="copy")
    step(cache, 1, tokens=20)
    alive = [t for layer in cache.layers for t in layer.store.tensors()]
    at = buffers(cache)
    step(cache, 2)
    assert not set(at) & set(buffers(cache))
    assert alive[0].shape[2] == cache.layers[0].store.tensors()[0].shape[2] == 8


@pytest.mark.parametrize("implementation", ["ring", "copy"])
def test_defect_03_every_layer_is_counted(implementation: str) -> None:
    policy = StreamingLLM(start_size=4, recent_size=8, skip_layers=[0, 1])
    fed = feed("llama", policy, text(40), chunks_of(20, 40), implementation=implementation)
    assert fed.cache.lengths() == [40, 40, 12, 12]
    allocated, headroom = fed.cache.kv_bytes()
    assert allocated - headroom == (40 + 40 + 12 + 12) * TOKEN_BYTES
    keys = sum(layer.keys.numel() + layer.values.numel() for layer in fed.cache.layers) * 4
    assert keys == allocated - headroom


@pytest.mark.parametrize("implementation", ["ring", "copy"])
@pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])
def test_defect_13_a_cache_is_read_layer_by_layer(line: Line, implementation: str) -> None:
    """As transformers 5 has it: ``cache.layers[i].keys`` and ``.values``, exactly the stored tokens, at any time."""
    fed = feed("llama", line.build(), text(40), chunks_of(20, 40), implementation=implementation)
    for layer, stored in zip(fed.cache.layers, fed.cache.lengths(), strict=True):
        assert layer.keys.shape == layer.values.shape == (1, 2, stored, HEAD_DIM)
        assert layer.get_seq_length() == 40
    assert fed.cache.get_seq_length() == 40


def test_bytes_are_those_of_storages_and_not_of_views() -> None:
    cache = new_cache(RecentOnly(window=8), capacity=(64, 64))
    step(cache, 1, tokens=20)
    allocated, headroom = cache.kv_bytes()
    assert allocated == 64 * LAYERS * TOKEN_BYTES
    assert allocated - headroom == 8 * LAYERS * TOKEN_BYTES


def test_same_kv_bytes_for_one_token_of_a_real_cache() -> None:
    cache = new_cache()
    for token in range(5):
        step(cache, token)
    allocated, headroom = cache.kv_bytes()
    assert (allocated - headroom) / 5 == decoder("llama").kv_bytes([1] * LAYERS) == LAYERS * TOKEN_BYTES


def test_a_buffer_too_small_grows_and_keeps_its_tokens() -> None:
    ids, chunks = text(40), chunks_of(5, 40)
    planned = feed("llama", FixSizeL2(size=16), ids, chunks)
    grown = feed("llama", FixSizeL2(size=16), ids, chunks, capacity=(1, 1))
    assert torch.equal(planned.logits, grown.logits)


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])
def test_a_reused_cache_forgets_the_last_request(line: Line, positions: Any) -> None:
    policy = line.build(positions=positions)
    cache = feed("llama", policy, text(40, seed=2), chunks_of(20, 40)).cache
    fresh = feed("llama", policy, text(40), chunks_of(20, 40))
    cache.reset()
    again = [decoder("llama").forward(part, cache)[:, -1].detach() for part in text(40).split(chunks_of(20, 40), dim=1)]
    assert torch.equal(torch.stack(again), fresh.logits)
    assert cache.lengths() == fresh.cache.lengths()


def test_positions_go_on_after_eviction() -> None:
    cache = new_cache(RecentOnly(window=4))
    for at in range(10):
        assert cache.begin(1).tolist() == [[at]]
        for layer in cache.layers:
            layer.update(torch.zeros(1, 2, 1, HEAD_DIM), torch.zeros(1, 2, 1, HEAD_DIM))
        cache.commit()
        assert cache.get_seq_length() == at + 1
    assert cache.lengths() == [4] * LAYERS
    assert cache.layers[0].get_mask_sizes(1) == (5, 6)


def test_every_forward_stands_between_begin_and_commit() -> None:
    cache = new_cache()
    states = torch.zeros(1, 2, 1, HEAD_DIM)
    with pytest.raises(RuntimeError, match="begin"):
        cache.layers[0].update(states, states)
    cache.begin(1)
    with pytest.raises(RuntimeError, match="begin"):
        cache.begin(1)
    with pytest.raises(RuntimeError, match="no token yet"):
        _ = cache.layers[0].keys


def test_adopting_a_compressed_prompt() -> None:
    sources = [
        SimpleNamespace(keys=torch.randn(1, 2, n, HEAD_DIM), values=torch.randn(1, 2, n, HEAD_DIM))
        for n in (7, 3, 5, 5)
    ]
    keys = [source.keys for source in sources]
    cache = new_cache(capacity=(0, 16))
    cache.adopt(sources, seen=20)
    assert cache.lengths() == [7, 3, 5, 5]
    assert all(source.keys is None and source.values is None for source in sources)
    assert cache.begin(1).tolist() == [[20]]
    for layer, own in zip(cache.layers, keys, strict=True):
        seen, _ = layer.update(torch.zeros(1, 2, 1, HEAD_DIM), torch.zeros(1, 2, 1, HEAD_DIM))
        assert torch.equal(seen[:, :, :-1], own)
    cache.commit()
    assert cache.lengths() == [8, 4, 6, 6]
    assert cache.kv_bytes()[0] == 16 * LAYERS * TOKEN_BYTES


def test_intervals_bracket_compression_and_eviction() -> None:
    calls: list[bool] = []
    cache = new_cache(FixSizeL2(size=8), capacity=(16, 16))
    cache.on_interval = calls.append
    step(cache, 1, tokens=20)
    # once for each layer's prompt and once for the commit
    assert calls == [True, False] * (LAYERS + 1)
    calls.clear()
    step(cache, 2)
    assert calls == [True, False]


@pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])
def test_host_state_returns_the_bookkeeping(line: Line) -> None:
    """What replaying a captured step leaves undone on the host is restored; the device side is what the steps wrote."""
    policy = line.build()
    cache = feed("llama", policy, text(40), chunks_of(20, 40)).cache
    state, lengths = cache.host_state(), cache.lengths()
    kept = [group._positions.clone() for group in cache.groups]
    cache.reset()
    cache.restore(state)
    assert cache.lengths() == lengths
    assert cache.seen == 40
    for group, positions in zip(cache.groups, kept, strict=True):
        assert torch.equal(group._positions, positions)
