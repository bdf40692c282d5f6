"""What every policy computes through an `EvictionCache`, against a slow reference and against its plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_matrix import MATRIX, Line
from tiny_decoders import HEAD_DIM, LAYERS, Reference, chunks_of, decoder, feed, model, text

from kvsuite.compression import StreamingLLM
from kvsuite.engines.cache_plan import plan

TOKENS = 36
ROTARY_DIM = {"llama": 16, "neox": 8}
EVERY_LINE = [pytest.param(line, id=line.id) for line in MATRIX]


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("line", EVERY_LINE)
@pytest.mark.parametrize(
    ("kind", "skip", "prompt"),
    [
        pytest.param("llama", (), 1, id="llama-all-1"),
        pytest.param("llama", (), 20, id="llama-all-20"),
        pytest.param("llama", (0, 1), 20, id="llama-skip01-20"),
        pytest.param("neox", (), 20, id="neox-all-20"),
        # how long the prompt is, which layers are skipped and the model's family have nothing to do with each other
        pytest.param("llama", (0, 1), 1, id="llama-skip01-1", marks=pytest.mark.slow),
        pytest.param("neox", (), 1, id="neox-all-1", marks=pytest.mark.slow),
        pytest.param("neox", (0, 1), 1, id="neox-skip01-1", marks=pytest.mark.slow),
        pytest.param("neox", (0, 1), 20, id="neox-skip01-20", marks=pytest.mark.slow),
    ],
)
def test_policy_through_the_cache(kind: str, line: Line, positions: Any, skip: tuple[int, ...], prompt: int) -> None:
    policy = line.build(positions=positions, skip_layers=skip)
    ids, chunks = text(TOKENS), chunks_of(prompt, TOKENS)
    ring = feed(kind, policy, ids, chunks)
    copy = feed(kind, policy, ids, chunks, implementation="copy")
    reference = Reference(line, policy, chunks, ROTARY_DIM[kind])
    wanted = reference.logits(kind, ids)

    torch.testing.assert_close(ring.logits, copy.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ring.logits, wanted, rtol=0, atol=1e-5)
    heads = decoder(kind).kv_heads
    for layer in range(LAYERS):
        of_heads = torch.tensor([reference.kept[layer, 0, head] for head in range(heads)])
        for fed in (ring, copy):
            assert torch.equal(fed.kept(layer).expand(1, heads, -1)[0], of_heads)

    short, long = plan(policy, prompt, TOKENS - prompt), plan(None, prompt, TOKENS - prompt)
    for fed in (ring, copy):
        for layer in range(LAYERS):
            planned = long if layer in skip else short
            held = [lengths[layer] for lengths in fed.lengths]
            assert (held[0], held[-1]) == (planned.prefill, planned.final)
            # a step stores the new token before the policy acts
            assert max(held[0], *(before + 1 for before in held[:-1])) == planned.capacity
        allocated, headroom = fed.cache.kv_bytes()
        assert allocated - headroom == sum(2 * heads * HEAD_DIM * 4 * tokens for tokens in fed.lengths[-1])
    reserved = len(skip) * long.capacity + (LAYERS - len(skip)) * short.capacity
    assert ring.cache.kv_bytes()[0] == 2 * heads * HEAD_DIM * 4 * reserved
    assert copy.cache.kv_bytes()[1] == 0


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_the_policies_of_the_matrix_change_the_logits(kind: str) -> None:
    # without this the comparisons above could agree on a model that does not attend
    ids = text(TOKENS)
    baseline = feed(kind, None, ids, chunks_of(1, TOKENS)).logits
    for line in MATRIX:
        for positions in ("original", "cache"):
            logits = feed(kind, line.build(positions=positions), ids, chunks_of(1, TOKENS)).logits
            assert (logits - baseline).abs().max() > 0.1, (line.id, positions)


@pytest.mark.parametrize("kind", ["llama", "neox"])
@pytest.mark.parametrize("start", [0, 4])
def test_streaming_is_one_forward_under_a_mask(kind: str, start: int) -> None:
    recent = 8
    ids = text(TOKENS)
    query, key = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    # query t sees itself and what was kept after token t - 1: the sinks and the last `recent`
    seen = (key <= query) & ((key < start) | (key >= query - recent))
    with torch.no_grad():
        masked = model(kind)(input_ids=ids, attention_mask=seen[None, None], use_cache=False).logits[0]
    fed = feed(kind, StreamingLLM(start_size=start, recent_size=recent), ids, chunks_of(1, TOKENS))
    torch.testing.assert_close(fed.logits[:, 0], masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("line", EVERY_LINE)
def test_chunks_behind_a_stored_cache(line: Line, positions: Any) -> None:
    # several tokens at once arrive where a slot is still free to be reused
    chunks = [20, 1, 1, 4, 1, 3, 3, 1, 1, 1, 6, 1, 1]
    policy = line.build(positions=positions)
    ids = text(sum(chunks))
    capacity = (64, 64)
    wanted = Reference(line, policy, chunks, 16).logits("llama", ids)
    for implementation in ("ring", "copy"):
        fed = feed("llama", policy, ids, chunks, implementation=implementation, capacity=capacity)
        torch.testing.assert_close(fed.logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("line", EVERY_LINE)
@pytest.mark.parametrize("implementation", ["ring", "copy"])
def test_rows_of_a_batch_do_not_touch_each_other(line: Line, positions: Any, implementation: str) -> None:
    policy = line.build(positions=positions)
    chunks = chunks_of(20, 40)
    # no token twice in a row: two keys of one norm in the first layer, and rounding would say which of them goes
    rows = torch.cat([text(40), text(40, seed=3)])
    assert all(len(row.unique()) == 40 for row in rows)
    both = feed("llama", policy, rows, chunks, implementation=implementation)
    for row in range(2):
        alone = feed("llama", policy, rows[row : row + 1], chunks, implementation=implementation)
        torch.testing.assert_close(both.logits[:, row], alone.logits[:, 0], rtol=0, atol=1e-5)
        for layer in range(LAYERS):
            kept = both.kept(layer)
            assert torch.equal(kept[row] if kept.dim() == 3 else kept, alone.kept(layer).reshape(kept.shape[1:] or -1))
    twice = feed("llama", policy, rows[:1].expand(2, -1), chunks, implementation=implementation)
    # rows of one product may be summed in other orders, by their place in it
    torch.testing.assert_close(twice.logits[:, 0], twice.logits[:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("implementation", ["ring", "copy"])
def test_values_stay_with_their_keys(positions: Any, implementation: str) -> None:
    """Each stored row is the key and the value of one position, per head, and positions follow the slots."""
    ids = text(40)
    full = feed("llama", None, ids, chunks_of(20, 40), implementation=implementation)
    line = MATRIX[5]
    fed = feed("llama", line.build(positions=positions), ids, chunks_of(20, 40), implementation=implementation)
    layer = fed.cache.layers[0]  # its keys do not depend on what earlier layers saw
    group = layer.group
    keys, values = layer.keys, layer.values
    at = group._positions[0, 0, :, : group.slots]
    for head in range(2):
        torch.testing.assert_close(values[0, head], full.cache.layers[0].values[0, head, at[head]], rtol=0, atol=1e-6)
        wanted = full.cache.layers[0].keys[0, head, at[head]]
        if positions == "cache":
            assert fed.cache.rotary is not None
            wanted = fed.cache.rotary.unrotate(wanted[None, None], at[head])[0, 0]
        torch.testing.assert_close(keys[0, head], wanted, rtol=0, atol=1e-5)
