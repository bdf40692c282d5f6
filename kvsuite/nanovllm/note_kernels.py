"""What a policy of every token does with what is noted of tokens, a launch each. Importing this module needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from .paged_norms import norms_in_pages

# elements that a program moves or reads at a time
_ELEMENTS = 4096
# tokens of a head that a program looks at together
_TOKENS = 128


# neither the number of tokens, nor the size of a pool, nor where in one upload a table begins must cost a compilation
@triton.jit(do_not_specialize=["tokens", "layer_slots"], do_not_specialize_on_alignment=["slots", "positions"])
def _note_kernel(
    keys,
    slots,
    positions,
    notes,
    tokens,
    layer_slots,
    kv_heads,
    width,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    token, head, slot, present, norm = norms_in_pages(
        keys, slots, layer, tokens, layer_slots, kv_heads, width, TOKENS, HEADS, LANES
    )
    place = notes + (layer * kv_heads + head) * layer_slots + slot
    tl.store(place, tl.load(positions + token, mask=present, other=0).to(tl.int32), mask=present)
    scores = place + tl.num_programs(1).to(tl.int64) * kv_heads * layer_slots
    tl.store(scores, norm.to(tl.int32, bitcast=True), mask=present)


def note_norms(pages: Tensor, slots: Tensor, positions: Tensor, notes: Tensor) -> None:
    """Note positions and norms of the keys of some tokens.

    Parameters
    ----------
    pages
        Keys, ``[layers, num_blocks, block_size, kv_heads, head_dim]``, contiguous.
    slots, positions
        ``block * block_size + offset`` and logical position of the tokens, int64 ``[n]``, contiguous.
    notes
        Positions, and norms in the bits of int32, ``[2, layers, kv_heads, num_blocks * block_size]``, contiguous.
    """
    layers, _, _, kv_heads, width = pages.shape
    heads, lanes = triton.next_power_of_2(kv_heads), triton.next_power_of_2(width)
    count = slots.shape[0]
    tokens = max(1, _ELEMENTS // (heads * lanes))
    _note_kernel[(triton.cdiv(count, tokens), layers)](
        pages, slots, positions, notes, count, notes.shape[3], kv_heads, width,
        TOKENS=tokens, HEADS=heads, LANES=lanes, num_warps=4,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["length", "layer_slots", "blocks_stride", "protected"],
    do_not_specialize_on_alignment=["blocks", "seen"],
)
def _least_kernel(
    notes,
    blocks,
    seen,
    out,
    length,
    layer_slots,
    blocks_stride,
    protected,
    sign,
    rounding,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    table = blocks + sequence.to(tl.int64) * blocks_stride
    positions = notes + head * layer_slots
    scores = positions + heads * layer_slots.to(tl.int64)
    # the first position that is protected
    safe = tl.load(seen + sequence) - protected
    inside = tl.arange(0, TOKENS)
    least = tl.full((), float("inf"), dtype=tl.float32)
    for at in range(0, length, TOKENS):
        token = at + inside
        present = token < length
        slot = tl.load(table + token // BLOCK_SIZE, mask=present, other=0) * BLOCK_SIZE + token % BLOCK_SIZE
        position = tl.load(positions + slot, mask=present, other=0)
        priority = tl.load(scores + slot, mask=present, other=0).to(tl.float32, bitcast=True) * sign
        priority = tl.where(present & (position < safe), priority, float("inf"))
        least = tl.minimum(least, tl.min(priority, axis=0))
    # of equal ones the youngest: position and place in one number
    best = tl.full((), 0, dtype=tl.int64)
    for at in range(0, length, TOKENS):
        token = at + inside
        present = token < length
        slot = tl.load(table + token // BLOCK_SIZE, mask=present, other=0) * BLOCK_SIZE + token % BLOCK_SIZE
        position = tl.load(positions + slot, mask=present, other=0)
        priority = tl.load(scores + slot, mask=present, other=0).to(tl.float32, bitcast=True) * sign
        lowest = present & (position < safe) & (priority - least <= tl.abs(least) * rounding)
        found = tl.where(lowest, ((position.to(tl.int64) + 1) << 32) + token, 0)
        best = tl.maximum(best, tl.max(found, axis=0))
    tl.store(out + sequence.to(tl.int64) * heads + head, best & 0xFFFFFFFF)


def least_norms(
    notes: Tensor,
    blocks: Tensor,
    seen: Tensor,
    length: int,
    block_size: int,
    *,
    sign: int,
    protected: int,
    rounding: float,
) -> Tensor:
    """The token of lowest priority of each head; of equal ones the youngest. int64 ``[S, layers, kv_heads]``.

    Parameters
    ----------
    notes
        As `note_norms` has them.
    blocks
        Of some sequences, int64 ``[S, width]``, their numbers side by side.
    seen
        How many tokens each of them has seen, int64 ``[S]``.
    length, block_size
        Tokens that each of them stores, and those of a block.
    sign
        Priority of a norm: 1 or -1 times the norm.
    protected
        Youngest positions that cannot go.
    rounding
        Priorities that are nearer than this times the lowest are equal to it.
    """
    _, layers, kv_heads, layer_slots = notes.shape
    out = torch.empty((len(blocks), layers, kv_heads), dtype=torch.int64, device=notes.device)
    _least_kernel[(len(blocks), layers * kv_heads)](
        notes, blocks, seen, out, length, layer_slots, blocks.stride(0), protected, float(sign), rounding,
        BLOCK_SIZE=block_size, TOKENS=_TOKENS, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["layer_slots", "blocks_stride"], do_not_specialize_on_alignment=["blocks", "last", "chosen"]
)
def _move_kernel(
    keys,
    values,
    notes,
    blocks,
    last,
    chosen,
    layer_slots,
    blocks_stride,
    kv_heads,
    width,
    BLOCK_SIZE: tl.constexpr,
    NOTES: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    layers = tl.num_programs(1)
    head = tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)
    there = head < kv_heads
    victim = tl.load(chosen + (sequence * layers + layer) * kv_heads + head, mask=there, other=0)
    block = tl.load(blocks + sequence * blocks_stride + victim // BLOCK_SIZE, mask=there, other=0)
    target = block * BLOCK_SIZE + victim % BLOCK_SIZE
    source = tl.load(last + sequence)
    of = layer * layer_slots
    present = there[:, None] & (lane < width)[None, :]
    given = ((of + source) * kv_heads + head)[:, None] * width + lane[None, :]
    taken = ((of + target) * kv_heads + head)[:, None] * width + lane[None, :]
    key = tl.load(keys + given, mask=present)
    value = tl.load(values + given, mask=present)
    tl.store(keys + taken, key, mask=present)
    tl.store(values + taken, value, mask=present)
    for kind in range(NOTES):
        base = notes + ((kind * layers + layer) * kv_heads + head) * layer_slots
        note = tl.load(base + source, mask=there)
        tl.store(base + target, note, mask=there)


def move_last(keys: Tensor, values: Tensor, notes: Tensor, blocks: Tensor, last: Tensor, chosen: Tensor) -> None:
    """Put the last token of each of some sequences in the place of another one, which every head chooses.

    Parameters
    ----------
    keys, values
        Pages, ``[layers, num_blocks, block_size, kv_heads, head_dim]``, contiguous.
    notes
        What moves with them, 32 bits each, ``[kinds, layers, kv_heads, num_blocks * block_size]``, contiguous.
    blocks
        Of the sequences, int64 ``[S, width]``, their numbers side by side.
    last
        Slots of the last tokens, int64 ``[S]``, contiguous.
    chosen
        Index of the token that goes, int64 ``[S, layers, kv_heads]``, contiguous.
    """
    layers, _, block_size, kv_heads, width = keys.shape
    heads, lanes = triton.next_power_of_2(kv_heads), triton.next_power_of_2(width)
    _move_kernel[(len(blocks), layers)](
        keys, values, notes, blocks, last, chosen, notes.shape[3], blocks.stride(0), kv_heads, width,
        BLOCK_SIZE=block_size, NOTES=len(notes), HEADS=heads, LANES=lanes, num_warps=4,
    )  # fmt: skip
