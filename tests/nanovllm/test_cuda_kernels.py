"""The fused kernels against torch. On a CUDA device, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_device import DEVICE, INTERPRETED
from torch.nn import functional

from kvsuite.nanovllm import (
    fused_kernels,
    gather_tokens,
    row_linear,
    split_attention,
    step_attention,
    whole_rows,
)
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.layer_pages import plain_pages
from kvsuite.nanovllm.reference_attention import visible

pytestmark = pytest.mark.gpu
# launch attributes do nothing in the interpreter
PDL = [False] if INTERPRETED else [False, True]


def _random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def _norm(x, weight, eps):
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype)


def _close(found, expected, dtype):
    assert torch.isfinite(found).all()
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    # the interpreter cuts bfloat16 off where a device rounds
    assert error < {torch.float32: 3e-6, torch.bfloat16: 2e-2 if INTERPRETED else 4e-3}[dtype]


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("parts", "rows", "width"), [(0, 1, 64), (1, 5, 576), (3, 7, 1024)])
def test_add_norm(parts, rows, width, dtype, pdl):
    residual, weight = _random(rows, width, dtype=dtype), 1 + 0.1 * _random(width, seed=1, dtype=dtype)
    delta = _random(parts, rows, width, seed=2, dtype=torch.float32 if parts > 1 else dtype) if parts else None
    expected = residual.clone() if delta is None else residual + delta.sum(0).to(dtype)
    found = fused_kernels.add_norm(delta, residual, weight, 1e-5, pdl=pdl)
    _close(residual, expected, dtype)
    _close(found, _norm(expected, weight, 1e-5), dtype)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("parts", "heads", "kv_heads", "head_dim"), [(1, 8, 2, 32), (2, 9, 3, 64), (4, 32, 8, 128)])
def test_rotate_store(parts, heads, kv_heads, head_dim, normed, dtype, pdl):
    rows, blocks, size = 5, 4, 4
    qkv = _random(parts, rows, (heads + 2 * kv_heads) * head_dim, dtype=torch.float32 if parts > 1 else dtype)
    positions = torch.tensor([0, 3, 11, 4, 7], device=DEVICE)
    slots = torch.tensor([5, 4, 15, 9, 8], device=DEVICE)
    angles = torch.arange(16, device=DEVICE)[:, None] / 10 ** torch.linspace(0, 2, head_dim // 2, device=DEVICE)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (1 + 0.1 * _random(head_dim, seed=1, dtype=dtype), 1 + 0.1 * _random(head_dim, seed=2, dtype=dtype))
    pages = [
        plain_pages(torch.full((blocks, size, kv_heads, head_dim), 7.0, dtype=dtype, device=DEVICE)) for _ in range(2)
    ]
    found = fused_kernels.rotate_store(
        qkv,
        positions,
        slots,
        (cosines, sines),
        norms if normed else None,
        1e-6,
        *pages,
        query_heads=heads,
        pdl=pdl,
    )
    keys, values = (each.codes for each in pages)
    split = qkv.sum(0).to(dtype).view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    expected = []
    for x, weight in zip(split[:2], norms, strict=True):
        if normed:
            x = _norm(x, weight, 1e-6)
        cosine, sine = (torch.cat([t, t], -1)[positions][:, None] for t in (cosines, sines))
        low, high = x.chunk(2, dim=-1)
        expected.append(x * cosine + torch.cat([-high, low], -1) * sine)
    _close(found, expected[0], dtype)
    _close(keys.flatten(0, 1)[slots], expected[1], dtype)
    _close(values.flatten(0, 1)[slots], split[2], dtype)
    others = sorted(set(range(blocks * size)) - set(slots.tolist()))
    assert (keys.flatten(0, 1)[others] == 7).all()
    assert (values.flatten(0, 1)[others] == 7).all()


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("parts", "width"), [(1, 96), (2, 1536)])
def test_silu_mul(parts, width, dtype, pdl):
    gate_up = _random(parts, 3, 2 * width, dtype=torch.float32 if parts > 1 else dtype)
    gate, up = gate_up.sum(0).to(dtype).chunk(2, dim=-1)
    _close(fused_kernels.silu_mul(gate_up, dtype, pdl=pdl), functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("most", [3, 40_000])
def test_the_longest_sequences_come_first_and_equal_ones_as_they_stand(count, most):
    lengths = np.random.default_rng(count).integers(1, most, count, dtype=np.int32)
    out = torch.full((count + 1,), -1, dtype=torch.int32, device=DEVICE)
    order = split_attention.longest_first(torch.from_numpy(lengths).to(DEVICE), out[:count])
    assert order.tolist() == np.argsort(-lengths, kind="stable").tolist()
    assert out[count] == -1


TILINGS = [
    row_linear.Tiling(prefetch=1),
    row_linear.Tiling(block_n=32, parts=2, splits=2, prefetch=2),
    row_linear.Tiling(parts=3, warps=8, prefetch=0),
    row_linear.Tiling(block_n=128, block_k=128, splits=2, warps=8, stages=3, prefetch=2),
]


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("rows", [1, 3, 16, 33])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_row_linear(tiling, rows, gated, pdl):
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    features, width = 208, 512
    if gated and tiling.splits > 1:
        assert not tiling.fits(features, width, gated)
        pytest.skip("a gate needs whole sums")
    assert tiling.fits(features, width, gated)
    weight = _random(2 * features if gated else features, width, dtype=dtype)
    x = _random(rows, width, seed=1, dtype=dtype)
    found = row_linear.row_linear(x, weight, tiling, gated=gated, pdl=pdl)
    assert found.shape == (tiling.splits, rows, features)
    expected = x.double() @ weight.double().T
    if gated:
        gate, up = expected.chunk(2, dim=-1)
        expected = functional.silu(gate) * up
    _close(found.double().sum(0), expected, dtype)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(
    "tiling",
    [row_linear.Tiling(block_n=32, prefetch=1), row_linear.Tiling(splits=4, prefetch=2)],
    ids=str,
)
def test_a_residual_that_products_norm_and_add_to(tiling, rows, pdl):
    """A residual from its opening over a normed product, a sum and another normed product, all against torch.

    Norms that are not rounded are expected: these are rounded once, torch's twice, and the two differ by more than either errs.
    """
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    width, made = 208, 512
    embedding, ids = _random(40, width, dtype=dtype), torch.arange(rows, device=DEVICE) * 7 % 40
    first, second = (1 + 0.1 * _random(width, seed=seed, dtype=dtype) for seed in (1, 2))
    residual, x, squares, arrivals = fused_kernels.open_residual(ids, embedding, first, tiling.tiles(width), 8, pdl=pdl)
    assert torch.equal(residual, embedding[ids])
    reader = _random(96, width, seed=3, dtype=dtype)
    reading = row_linear.Tiling(block_n=32, block_k=16, prefetch=0)
    found = row_linear.row_linear(x, reader, reading, squares=squares, eps=1e-5, pdl=pdl)[0]
    _close(found, _norm(embedding[ids], first.double(), 1e-5) @ reader.double().T, dtype)
    # sums that are cut are there when the last program ends: the second time finds the counters as the first did
    for turn in range(2):
        delta, weight = _random(rows, made, seed=4 + turn, dtype=dtype), _random(width, made, seed=6, dtype=dtype)
        expected = (residual.double() + (delta.double() @ weight.double().T).to(dtype).double()).to(dtype)
        x, squares = row_linear.add_linear(delta, weight, tiling, residual, second, arrivals, pdl=pdl)
        _close(residual, expected, dtype)
        _close(x, residual * second, dtype)
        _close(squares.sum(0), residual.float().pow(2).mean(1), torch.float32)
        assert not arrivals.any()
        found = row_linear.row_linear(x, reader, reading, squares=squares, eps=1e-5, pdl=pdl)[0]
        _close(found, _norm(residual, second.double(), 1e-5) @ reader.double().T, dtype)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("tiling", [whole_rows.PROJECTED, whole_rows.SUMMED], ids=str)
# rows of the weight that fill no program, inputs that fill no step, rows of which no piece can be fetched ahead
@pytest.mark.parametrize(("width", "made"), [(208, 512), (204, 1200), (52, 33)])
def test_whole_rows(width, made, tiling, pdl):
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    weight, delta = _random(width, made, dtype=dtype), _random(1, made, seed=1, dtype=dtype)
    residual, norm = _random(1, width, seed=2, dtype=dtype), 1 + 0.1 * _random(width, seed=3, dtype=dtype)
    product = delta.double() @ weight.double().T
    _close(whole_rows.whole_rows(delta, weight, tiling, pdl=pdl)[0], product, dtype)
    expected = (residual.double() + product.to(dtype).double()).to(dtype)
    x, squares = whole_rows.add_whole_rows(delta, weight, tiling, residual, norm, pdl=pdl)
    assert squares.shape == (tiling.tiles(width), 1)
    _close(residual, expected, dtype)
    _close(x, residual * norm, dtype)
    _close(squares.sum(0), residual.float().pow(2).mean(1), torch.float32)


def test_whole_rows_are_for_devices_that_they_fill():
    assert whole_rows.SUMMED.fills(4096, 132)
    assert whole_rows.PROJECTED.fills(6144, 132)
    # an SM would wait for others, or some programs for a place
    assert not whole_rows.SUMMED.fills(2048, 132)
    assert not whole_rows.SUMMED.fills(5120, 132)
    assert not whole_rows.SUMMED.fills(4096, 96)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize(
    ("parts", "splits", "heads", "kv_heads", "head_dim", "normed", "window", "sinks"),
    [
        (4, 16, 9, 3, 64, True, None, 0),
        (1, 64, 4, 2, 32, False, None, 0),
        (1, 1, 4, 4, 32, False, None, 0),
        (2, 4, 32, 8, 128, True, 33, 4),
    ],
)
def test_attention_from_the_product_on(parts, splits, heads, kv_heads, head_dim, normed, window, sinks, pdl):
    """What one kernel makes is what rotation, storing and attention make one after the other."""
    dtype, size = torch.float32 if INTERPRETED else torch.bfloat16, 16
    lengths = torch.tensor([1, 65, 130, 200], dtype=torch.int32, device=DEVICE)
    gone = torch.tensor([0, 0, 32, 4096] if window else [0] * 4, dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randperm(60, generator=generator)[: 4 * 13].view(4, 13).to(torch.int32).to(DEVICE)
    last = lengths.long() - 1
    slots = blocks[torch.arange(4, device=DEVICE), last // size].long() * size + last % size
    qkv = _random(parts, 4, (heads + 2 * kv_heads) * head_dim, dtype=torch.float32)
    squares = _random(3, 4, seed=5).abs()
    scaled = qkv * torch.rsqrt(squares.sum(0) + 1e-6)[:, None]
    angles = torch.arange(256, device=DEVICE)[:, None] / 10 ** torch.linspace(0, 2, head_dim // 2, device=DEVICE)
    table = (angles.cos().to(dtype), angles.sin().to(dtype))
    norms = tuple(1 + 0.1 * _random(head_dim, seed=seed, dtype=dtype) for seed in (1, 2)) if normed else None
    pages = [_random(60, size, kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (3, 4)]
    own = [side.clone() for side in pages]
    options = {"splits": splits, "dropped": gone, "window": window, "sinks": sinks, "pdl": pdl}
    order = split_attention.longest_first(lengths, torch.empty_like(lengths))
    assert order.tolist() == [3, 2, 1, 0]
    query = fused_kernels.rotate_store(
        scaled, last, slots, table, norms, 1e-6, *map(plain_pages, pages), query_heads=heads, pdl=pdl
    )
    expected = split_attention.split_attention(query, *pages, blocks, lengths, head_dim**-0.5, **options)
    arrivals = torch.zeros(4 * kv_heads, dtype=torch.int32, device=DEVICE)
    # loads ahead or none, the longest first or as they stand
    results = []
    for stages, its in ((1, None), (3, None), (3, order)):
        found = step_attention.step_attention(
            qkv, squares, last, slots, step_attention.Heads(heads, norms, 1e-6, table), *own, blocks, lengths, head_dim**-0.5,
            arrivals, stages=stages, order=its, **options,
        )  # fmt: skip
        _close(found, expected, dtype)
        assert not arrivals.any()
        results.append(found)
    assert torch.equal(results[1], results[2])
    for mine, side in zip(own, pages, strict=True):
        _close(mine.flatten(0, 1)[slots], side.flatten(0, 1)[slots], dtype)
        others = sorted(set(range(60 * size)) - set(slots.tolist()))
        assert torch.equal(mine.flatten(0, 1)[others], side.flatten(0, 1)[others])


def test_a_tiling_that_leaves_a_rest_does_not_fit():
    assert not row_linear.Tiling(block_k=128).fits(256, 192, False)
    assert not row_linear.Tiling(splits=3, prefetch=0).fits(256, 512, False)
    assert not row_linear.Tiling(block_n=64, parts=3).fits(128, 512, False)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("splits", [1, 4, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (9, 3, 64), (32, 8, 128)])
def test_split_attention(heads, kv_heads, head_dim, splits, pdl):
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    size, lengths = 16, [1, 65, 130, 200]
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randperm(60, generator=generator)[: 4 * 13].view(4, 13).to(torch.int32).to(DEVICE)
    query = _random(4, heads, head_dim, dtype=dtype)
    keys, values = (_random(60, size, kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (1, 2))
    found = split_attention.split_attention(
        query, keys, values, blocks, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), head_dim**-0.5,
        splits=splits, pdl=pdl,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        table = blocks[row].long()
        own, its = (tensor[table].flatten(0, 1)[:length].transpose(0, 1)[None].float() for tensor in (keys, values))
        expected = functional.scaled_dot_product_attention(query[row, :, None][None].float(), own, its, enable_gqa=True)
        _close(found[row], expected[0, :, 0], dtype)


@pytest.mark.parametrize(("count", "kv_heads", "head_dim"), [(1, 1, 32), (37, 3, 64)])
def test_gathered_tokens_are_those_of_the_slots(count, kv_heads, head_dim):
    keys, values = (_random(6, 16, kv_heads, head_dim, seed=seed, dtype=torch.float32) for seed in (1, 2))
    slots = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:count].to(DEVICE)
    for found, side in zip(gather_tokens.gather_tokens(keys, values, slots), (keys, values), strict=True):
        assert torch.equal(found, side.flatten(0, 1)[slots])


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("splits", [1, 4, 16])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (33, 0), (64, 4), (100, 20), (500, 3)])
def test_split_attention_with_a_window(window, sinks, splits, pdl):
    """Sequences before their window slides, while it slides inside blocks, and with blocks gone behind the sinks'."""
    dtype, size, heads, kv_heads, head_dim = torch.float32 if INTERPRETED else torch.bfloat16, 16, 8, 2, 32
    lengths, gone = [1, 65, 130, 200], [0, 0, 32, 4096]
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randperm(60, generator=generator)[: 4 * 13].view(4, 13).to(torch.int32).to(DEVICE)
    query = _random(4, heads, head_dim, dtype=dtype)
    keys, values = (_random(60, size, kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (1, 2))
    group = LayerGroup((0,), kv_heads, head_dim, window=window, sinks=sinks)
    counts, dropped = (torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in (lengths, gone))
    found = split_attention.split_attention(
        query, keys, values, blocks, counts, head_dim**-0.5,
        splits=splits, dropped=dropped, window=window, sinks=sinks, pdl=pdl,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        table = blocks[row].long()
        own, its = (tensor[table].flatten(0, 1)[:length].transpose(0, 1)[None].float() for tensor in (keys, values))
        mask = visible(group, 1, length, gone[row], size, query.device)
        expected = functional.scaled_dot_product_attention(
            query[row, :, None][None].float(), own, its, attn_mask=mask, enable_gqa=True
        )
        _close(found[row], expected[0, :, 0], dtype)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (33, 4)])
def test_an_order_changes_no_result(window, sinks, splits, pdl, monkeypatch):
    dtype, heads, kv_heads, head_dim = torch.float32 if INTERPRETED else torch.bfloat16, 8, 2, 32
    lengths = torch.tensor([65, 200, 1, 130, 64], dtype=torch.int32, device=DEVICE)
    blocks = torch.randperm(80, generator=torch.Generator().manual_seed(3))[: 5 * 13].view(5, 13).to(torch.int32)
    query = _random(5, heads, head_dim, dtype=dtype)
    pages = [_random(80, 16, kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (1, 2)]
    order = split_attention.longest_first(lengths, torch.empty_like(lengths))
    assert order.tolist() == [1, 3, 0, 4, 2]

    def attended(places):
        return split_attention.split_attention(
            query, *pages, blocks.to(DEVICE), lengths, head_dim**-0.5, splits=splits, dropped=torch.zeros_like(lengths),
            window=window, sinks=sinks, order=places, pdl=pdl,
        )  # fmt: skip

    expected = attended(None)
    assert torch.equal(attended(order), expected)
    if splits > 1:
        # what nobody stored would be merged below
        return
    # programs take the sequences that it names, and no others
    monkeypatch.setattr(torch, "empty_like", lambda of: torch.full_like(of, float("nan")))
    named = attended(torch.tensor([1, 3, 1, 3, 3], dtype=torch.int32, device=DEVICE))
    assert torch.equal(named[[1, 3]], expected[[1, 3]])
    assert named[[0, 2, 4]].isnan().all()


@pytest.mark.parametrize(
    ("sequences", "splits"), [(1, 64), (16, 4), (17, 2), (33, 2), (45, 2), (46, 1), (64, 1), (128, 1), (1000, 1)]
)
def test_keys_are_cut_until_the_device_is_full(sequences, splits):
    """Of 132 processors and 8 key heads: two programs a processor, or 2.75 of whole sequences."""
    assert split_attention.splits_for(sequences, 8, 132) == splits


@given(st.integers(1, 600), st.sampled_from([1, 2, 3, 8, 32]), st.integers(1, 200))
def test_more_sequences_are_cut_no_finer(sequences, kv_heads, processors):
    splits = split_attention.splits_for(sequences, kv_heads, processors)
    assert splits & (splits - 1) == 0
    assert splits >= split_attention.splits_for(sequences + 1, kv_heads, processors)
    programs = sequences * kv_heads * splits
    assert programs >= 2 * processors or splits == 64
    assert splits > 1 or programs >= 2.75 * processors
