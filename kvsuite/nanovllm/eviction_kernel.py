"""The kernel that evicts a token of each of many sequences after a step. Importing this module needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from kvsuite.compression.ranked import ROUNDING, NormRule

# notes that a program looks at together
_NOTES = 1024

#: columns of the facts in front of a sequence's blocks: tokens that it stores, that it has seen, the one that goes. The kernel
#: has them as numbers, since triton compares every constant outside of a kernel at every launch
LENGTH, SEEN, VICTIM, BLOCKS = range(4)


@triton.jit
def _lowest_norms(
    notes, table, norm, length, seen, layer_slots, kv_heads, sign, protected, rounding,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The token of lowest priority of every head of a layer; of equal ones the youngest. The last has ``norm`` and no note."""
    layer = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)
    inside = tl.arange(0, TOKENS)
    # the first position that is protected
    safe = seen - protected
    positions = notes + ((layer * kv_heads + head) * layer_slots)[:, None]
    scores = positions + tl.num_programs(1).to(tl.int64) * kv_heads * layer_slots
    # heads that pad have no other token, and two infinities differ by no number
    last = tl.where((seen - 1 < safe) | (head >= kv_heads), norm * sign, float("inf"))
    least = last
    for at in range(0, length - 1, TOKENS):
        token = at + inside
        present = (token < length - 1)[None, :] & (head < kv_heads)[:, None]
        block = tl.load(table + token // BLOCK_SIZE, mask=token < length - 1, other=0)
        slot = (block * BLOCK_SIZE + token % BLOCK_SIZE)[None, :]
        position = tl.load(positions + slot, mask=present, other=0)
        priority = tl.load(scores + slot, mask=present, other=0).to(tl.float32, bitcast=True) * sign
        least = tl.minimum(least, tl.min(tl.where(present & (position < safe), priority, float("inf")), axis=1))
    # of equal ones the youngest: position and place in one number
    equal = tl.abs(least) * rounding
    best = tl.where((seen - 1 < safe) & (last - least <= equal), (seen.to(tl.int64) << 32) + length - 1, 0)
    for at in range(0, length - 1, TOKENS):
        token = at + inside
        present = (token < length - 1)[None, :] & (head < kv_heads)[:, None]
        block = tl.load(table + token // BLOCK_SIZE, mask=token < length - 1, other=0)
        slot = (block * BLOCK_SIZE + token % BLOCK_SIZE)[None, :]
        position = tl.load(positions + slot, mask=present, other=0)
        priority = tl.load(scores + slot, mask=present, other=0).to(tl.float32, bitcast=True) * sign
        lowest = present & (position < safe) & (priority - least[:, None] <= equal[:, None])
        found = tl.where(lowest, ((position.to(tl.int64) + 1) << 32) + token[None, :], 0)
        best = tl.maximum(best, tl.max(found, axis=1))
    return (best & 0xFFFFFFFF).to(tl.int32)


# neither how many tokens are stored, nor the size of a pool must cost a compilation
@triton.jit(do_not_specialize=["layer_slots", "stride", "sign", "protected"])
def _evict_kernel(
    keys, values, notes, facts, chosen, layer_slots, stride, kv_heads, width, sign, protected, rounding,
    BLOCK_SIZE: tl.constexpr, BY_NORM: tl.constexpr, BY_HEAD: tl.constexpr, NOTES: tl.constexpr,
    HEADS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    layers = tl.num_programs(1)
    head = tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)
    there = head < kv_heads
    present = there[:, None] & (lane < width)[None, :]
    own = facts + sequence * stride
    table = own + 3
    length = tl.load(own)
    seen = tl.load(own + 1)
    source = tl.load(table + (length - 1) // BLOCK_SIZE) * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
    vector = ((layer * layer_slots + source) * kv_heads + head)[:, None] * width + lane[None, :]
    key = tl.load(keys + vector, mask=present, other=0.0)
    value = tl.load(values + vector, mask=present)
    if BY_NORM:
        wide = key.to(tl.float32)
        norm = tl.sqrt_rn(tl.sum(wide * wide, axis=1))
        victim = _lowest_norms(
            notes,
            table,
            norm,
            length,
            seen,
            layer_slots,
            kv_heads,
            sign,
            protected,
            rounding,
            BLOCK_SIZE,
            HEADS,
            TOKENS,
        )
    elif BY_HEAD:
        victim = tl.load(chosen + (sequence * layers + layer) * kv_heads + head, mask=there, other=0).to(tl.int32)
    else:
        victim = tl.load(own + 2) + tl.zeros_like(head)
    target = tl.load(table + victim // BLOCK_SIZE, mask=there, other=0) * BLOCK_SIZE + victim % BLOCK_SIZE
    vector = ((layer * layer_slots + target) * kv_heads + head)[:, None] * width + lane[None, :]
    tl.store(keys + vector, key, mask=present)
    tl.store(values + vector, value, mask=present)
    note = notes + (layer * kv_heads + head) * layer_slots
    if BY_NORM:
        tl.store(note + target, seen - 1, mask=there)
        note += layers.to(tl.int64) * kv_heads * layer_slots
        tl.store(note + target, norm.to(tl.int32, bitcast=True), mask=there)
    else:
        for _ in range(NOTES):
            tl.store(note + target, tl.load(note + source, mask=there), mask=there)
            note += layers.to(tl.int64) * kv_heads * layer_slots


def evict(
    keys: Tensor,
    values: Tensor,
    facts: Tensor,
    *,
    notes: Tensor | None = None,
    chosen: Tensor | None = None,
    rule: NormRule | None = None,
) -> None:
    """Put the last token of each of some sequences in the place of another one.

    Parameters
    ----------
    keys, values
        Pages, ``[layers, num_blocks, block_size, kv_heads, head_dim]``, contiguous.
    facts
        Of each sequence how many tokens it stores and has seen, the index of the one that goes, where that is the same for all
        heads, and its blocks: int32 ``[S, BLOCKS + width]``, contiguous.
    notes
        What moves with the tokens, 32 bits each, ``[kinds, layers, kv_heads, num_blocks * block_size]``, contiguous: positions,
        and where a ``rule`` decides norms.
    chosen
        Index of the token that goes, int64 ``[S, layers, kv_heads]``, contiguous.
    rule
        Finds it by norm: lowest priority goes, of equal ones the youngest. The last token has no notes yet, and gets them where
        it is put.
    """
    layers, blocks, block_size, kv_heads, width = keys.shape
    heads, lanes = triton.next_power_of_2(kv_heads), triton.next_power_of_2(width)
    sign, protected = (0, 0) if rule is None else rule
    _evict_kernel[(len(facts), layers)](
        keys, values, facts if notes is None else notes, facts, facts if chosen is None else chosen,
        blocks * block_size, facts.shape[1], kv_heads, width, sign, protected, ROUNDING,
        BLOCK_SIZE=block_size, BY_NORM=rule is not None, BY_HEAD=chosen is not None, NOTES=0 if notes is None else len(notes),
        HEADS=heads, LANES=lanes, TOKENS=max(16, _NOTES // heads), num_warps=4,
    )  # fmt: skip
