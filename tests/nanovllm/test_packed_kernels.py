"""Kernels on packed pages against the reference that packs. On a CUDA device, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED

from kvsuite.cache_formats.cache_format import CacheFormat, SideFormat
from kvsuite.cache_formats.pack import Packed, pack, unpack
from kvsuite.nanovllm import fused_kernels, packed_split_attention, packed_vectors
from kvsuite.nanovllm.layer_pages import LayerPages, plain_pages

pytestmark = pytest.mark.gpu
# the interpreter multiplies bfloat16 by their bits
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
SIDES = ["fp8_e4m3", "int8", "int4", "fp8_e4m3(group=16)", "int8(group=32)", "int4(group=16)+hadamard", "int8+hadamard"]
BLOCKS, SIZE, HEADS = 9, 4, 2


def _side(name):
    found = CacheFormat.parse(name)
    return SideFormat("auto") if found is None else found.keys


def _adversarial(head_dim, dtype, tokens=21):
    """Vectors of very different sizes; constant, tiny, of one sign, with one outlier."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.exp2(torch.randint(-12, 8, (tokens, HEADS, 1), generator=generator).float())
    x = torch.randn(tokens, HEADS, head_dim, generator=generator) * sizes
    x[0], x[1], x[2], x[7] = 0, 1, 0, 600
    x[2, :, 5], x[3], x[4], x[5] = 3, x[3] * 1e-9, x[4].abs(), -x[5].abs()
    return x.to(dtype)


def _empty_pages(side, head_dim, dtype):
    if not side.is_packed:
        return plain_pages(torch.full((BLOCKS, SIZE, HEADS, head_dim), 7.0, dtype=dtype, device=DEVICE))
    columns = head_dim // (side.group or head_dim) * side.numbers_of_group
    return LayerPages(
        torch.full((BLOCKS, SIZE, HEADS, side.width(head_dim)), 99, dtype=torch.uint8, device=DEVICE),
        torch.full((BLOCKS, SIZE, HEADS, columns), 7.0, dtype=torch.float16, device=DEVICE),
        torch.zeros((), dtype=torch.bool, device=DEVICE),
        side,
    )


def _expect_stored(pages, slots, packed):
    """The codes and scales of ``packed`` in ``slots``, and nothing else written."""
    codes, scales = torch.full_like(pages.codes.cpu(), 99), torch.full_like(pages.scales.cpu(), 7.0)
    codes.flatten(0, 1)[slots] = packed.codes
    scales.flatten(0, 1)[slots] = packed.scales
    # zeros of either sign are one least value
    assert torch.equal(pages.scales.cpu(), scales)
    # the interpreter's float8 lose the carry of a rounding
    if not (INTERPRETED and pages.side.number == "fp8_e4m3"):
        assert torch.equal(pages.codes.cpu(), codes)


@pytest.mark.parametrize("name", SIDES)
def test_stored_bits_are_the_references(name):
    side, head_dim = _side(name), 64
    vectors = _adversarial(head_dim, DTYPE)
    slots = torch.randperm(BLOCKS * SIZE, generator=torch.Generator().manual_seed(1))[: len(vectors)]
    pages = _empty_pages(side, head_dim, DTYPE)
    packed_vectors.store_packed(vectors.to(DEVICE), slots.to(DEVICE), pages)
    _expect_stored(pages, slots, pack(side, vectors))
    assert not pages.refused


# numpy warns of it, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["fp8_e4m3", "int8", "int4(group=16)"])
@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_is_noted(name, wrong):
    vectors = torch.randn(5, HEADS, 64).to(DTYPE)
    pages = _empty_pages(_side(name), 64, DTYPE)
    slots = torch.arange(5, device=DEVICE)
    packed_vectors.store_packed(vectors.to(DEVICE), slots, pages)
    assert not pages.refused
    vectors[3, 1, 7] = wrong
    packed_vectors.store_packed(vectors.to(DEVICE), slots, pages)
    assert pages.refused


@pytest.mark.parametrize("name", SIDES)
def test_unpacked_blocks_are_the_references(name):
    side, vectors = _side(name), _adversarial(64, DTYPE, BLOCKS * SIZE)
    packed = pack(side, vectors.view(BLOCKS, SIZE, HEADS, 64))
    pages = LayerPages(packed.codes.to(DEVICE), packed.scales.to(DEVICE), torch.zeros(()), side)
    blocks = torch.tensor([7, 0, 3, 7], dtype=torch.int32)
    out = torch.full((4, SIZE, HEADS, 64), float("nan"), dtype=DTYPE, device=DEVICE)
    packed_vectors.unpack_pages(pages, blocks.to(DEVICE), out)
    expected = unpack(side, Packed(packed.codes[blocks], packed.scales[blocks]), DTYPE)
    assert torch.equal(out.cpu().view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(
    ("name", "parts", "normed"),
    [("fp8_e4m3", 1, True), ("int8", 2, False), ("int4(group=16)+hadamard", 2, True)],
)
def test_the_fused_write_packs_what_the_plain_one_writes(name, parts, normed):
    # launch attributes do nothing in the interpreter
    pdl = not INTERPRETED
    side, auto, rows, heads, head_dim = _side(name), _side("auto"), 5, 4, 64
    generator = torch.Generator().manual_seed(0)
    shape = (parts, rows, (heads + 2 * HEADS) * head_dim)
    qkv = torch.randn(shape, generator=generator).to(DEVICE, torch.float32 if parts > 1 else DTYPE)
    positions, slots = (torch.tensor(numbers, device=DEVICE) for numbers in ([0, 3, 11, 4, 7], [5, 4, 15, 9, 8]))
    table = tuple(torch.randn(16, head_dim // 2, generator=generator).to(DEVICE, DTYPE) for _ in range(2))
    norms = tuple(torch.randn(head_dim, generator=generator).to(DEVICE, DTYPE) for _ in range(2)) if normed else None

    def written(keys, values):
        pages = [_empty_pages(each, head_dim, DTYPE) for each in (keys, values)]
        query = fused_kernels.rotate_store(
            qkv, positions, slots, table, norms, 1e-6, *pages, query_heads=heads, pdl=pdl
        )  # fmt: skip
        return query, *pages

    # with a packed side in both, so that sums are not fused with products in either
    query, keys, packed_values = written(auto, side)
    same, packed_keys, values = written(side, auto)
    assert torch.equal(query, same)
    for plain, packed in ((keys, packed_keys), (values, packed_values)):
        vectors = plain.codes.flatten(0, 1)[slots].cpu()
        _expect_stored(packed, slots.cpu(), pack(side, vectors))


def _attention(query, keys, values, tables, lengths, scale, seen):
    """In float64, over what is stored."""
    keys, values = keys.double().flatten(0, 1), values.double().flatten(0, 1)
    out = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths):
        at = torch.arange(length)
        at = at[seen(at, length)]
        slots = tables[row].long()[at // SIZE] * SIZE + at % SIZE
        for head in range(query.shape[1]):
            scores = keys[slots, head // group] @ query[row, head].double() * scale
            out[row, head] = scores.softmax(0) @ values[slots, head // group]
    return out


@pytest.mark.parametrize(
    ("keys", "values", "splits"),
    [
        ("fp8_e4m3", "fp8_e4m3", 1), ("int8", "int8", 1), ("int8", "int8", 4), ("int4", "int4", 4), ("auto", "int4", 4),
        ("int8", "auto", 4), ("fp8_e4m3(group=16)", "int8(group=32)", 4), ("int8+hadamard", "int4+hadamard", 1),
        ("int4(group=16)+hadamard", "int4(group=16)+hadamard", 4),
    ],
)  # fmt: skip
def test_split_attention_over_packed_pages(keys, values, splits):
    _check_attention(keys, values, splits, 64, 3)


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_numbers_of_any_size_keep_their_precision(name, size):
    """Weights times scales go through float16, which ends at 65504 and 6e-8."""
    _check_attention(name, name, 4, 64, 3, size=size)


def test_a_window_and_sinks():
    seen = lambda at, length: (at >= length - 7) | (at < 2)  # noqa: E731
    _check_attention("int8", "int4", 2, 64, 4, seen=seen, window=7, sinks=2)


@pytest.mark.parametrize("splits", [1, 4])
def test_an_order_of_sequences_changes_no_result(splits):
    order = torch.tensor([1, 2, 0], dtype=torch.int32, device=DEVICE)
    found, ordered = (_check_attention("int8", "int4", splits, 64, 3, order=its) for its in (None, order))
    assert torch.equal(found, ordered)


def test_programs_take_the_sequences_that_an_order_names(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda of: torch.full_like(of, float("nan")))
    order = torch.tensor([1, 1, 1], dtype=torch.int32, device=DEVICE)
    found = _check_attention("int8", "int4", 1, 64, 3, order=order, rows=[1])
    assert found[[0, 2]].isnan().all()


def _check_attention(
    keys, values, splits, head_dim, group, size=1.0, seen=None, order=None, rows=slice(None), **window
):
    generator = torch.Generator().manual_seed(1)
    lengths = [33, 5, 1]
    query = torch.randn(3, HEADS * group, head_dim, generator=generator).to(DTYPE)
    tables = (1 + torch.randperm(40, generator=generator)[:27]).view(3, 9).int()
    sides = []
    for name in (keys, values):
        side = _side(name)
        vectors = (torch.randn(41, SIZE, HEADS, head_dim, generator=generator) * (size if name == values else 1)).to(
            DTYPE
        )
        if side.is_packed:
            packed = pack(side, vectors)
            # what the kernel multiplies is not rounded to the dtype, unless scales have groups
            read = unpack(side, packed, torch.float32)
            pages = LayerPages(packed.codes.to(DEVICE), packed.scales.to(DEVICE), torch.zeros(()), side)
        else:
            read, pages = vectors, plain_pages(vectors.to(DEVICE))
        sides.append((pages, read))
    # what an earlier call left must not pass for a result
    poison = torch.full((1 << 20,), float("nan"), device=DEVICE)
    del poison
    dropped = torch.zeros(3, dtype=torch.int32, device=DEVICE) if window else None
    found = packed_split_attention.packed_split_attention(
        query.to(DEVICE), sides[0][0], sides[1][0], tables.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE), head_dim**-0.5, splits=splits, dropped=dropped,
        order=order, tokens=16, assembly=not INTERPRETED, **window,
    )  # fmt: skip
    everything = lambda at, length: at >= 0  # noqa: E731
    expected = _attention(query, sides[0][1], sides[1][1], tables, lengths, head_dim**-0.5, seen or everything)
    error = ((found.cpu().double() - expected)[rows].norm() / expected[rows].norm()).item()
    assert error < (1e-3 if INTERPRETED else 4e-3)
    return found
