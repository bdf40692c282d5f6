"""The kernel that evicts a token of each of many sequences after a step. Importing this module needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import numpy as np
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from numpy.typing import NDArray
from torch import Tensor

from kvsuite.compression.ranked import ROUNDING, NormRule

from .block_table import Ints
from .uploads import StepTable

# notes that a program looks at together
_NOTES = 1024


@triton.jit
def _noted(positions, scores, table, token, length, head, kv_heads, sign, BLOCK_SIZE: tl.constexpr):
    """Of some tokens of every head: which have a note, that is all but the last; positions and priorities."""
    there = token < length - 1
    present = there[None, :] & (head < kv_heads)[:, None]
    block = tl.load(table + token // BLOCK_SIZE, mask=there, other=0)
    slot = (block * BLOCK_SIZE + token % BLOCK_SIZE)[None, :]
    position = tl.load(positions + slot, mask=present, other=0)
    priority = tl.load(scores + slot, mask=present, other=0).to(tl.float32, bitcast=True) * sign
    return present, position, priority


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
        present, position, priority = _noted(
            positions, scores, table, token, length, head, kv_heads, sign, BLOCK_SIZE
        )  # fmt: skip
        least = tl.minimum(least, tl.min(tl.where(present & (position < safe), priority, float("inf")), axis=1))
    # of equal ones the youngest: position and place in one number
    equal = tl.abs(least) * rounding
    best = tl.where((seen - 1 < safe) & (last - least <= equal), (seen.to(tl.int64) << 32) + length - 1, 0)
    for at in range(0, length - 1, TOKENS):
        token = at + inside
        present, position, priority = _noted(
            positions, scores, table, token, length, head, kv_heads, sign, BLOCK_SIZE
        )  # fmt: skip
        lowest = present & (position < safe) & (priority - least[:, None] <= equal[:, None])
        found = tl.where(lowest, ((position.to(tl.int64) + 1) << 32) + token[None, :], 0)
        best = tl.maximum(best, tl.max(found, axis=1))
    return (best & 0xFFFFFFFF).to(tl.int32)


# neither how many tokens are stored, nor the size of a pool must cost a compilation
@triton.jit(do_not_specialize=["length", "layer_slots", "stride", "sign", "protected"])
def _evict_kernel(
    keys, values, notes, facts, chosen, length, layer_slots, stride, kv_heads, width, sign, protected, rounding,
    BY_NORM: tl.constexpr, BY_HEAD: tl.constexpr, NOTES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    layers = tl.num_programs(1)
    head = tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)
    there = head < kv_heads
    present = there[:, None] & (lane < width)[None, :]
    fact = tl.load(facts + sequence * stride)
    table = facts + sequence * stride + 1
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
            fact,
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
        victim = fact + tl.zeros_like(head)
    target = tl.load(table + victim // BLOCK_SIZE, mask=there, other=0) * BLOCK_SIZE + victim % BLOCK_SIZE
    vector = ((layer * layer_slots + target) * kv_heads + head)[:, None] * width + lane[None, :]
    tl.store(keys + vector, key, mask=present)
    tl.store(values + vector, value, mask=present)
    note = notes + (layer * kv_heads + head) * layer_slots
    if BY_NORM:
        tl.store(note + target, fact - 1, mask=there)
        note += layers.to(tl.int64) * kv_heads * layer_slots
        tl.store(note + target, norm.to(tl.int32, bitcast=True), mask=there)
    else:
        for _ in range(NOTES):
            tl.store(note + target, tl.load(note + source, mask=there), mask=there)
            note += layers.to(tl.int64) * kv_heads * layer_slots


class EvictionKernel:
    """Puts the last token of each of some sequences in the place of another one.

    Parameters
    ----------
    keys, values
        Pages, ``[layers, num_blocks, block_size, kv_heads, head_dim]``, contiguous.
    notes
        What moves with the tokens, 32 bits each, ``[kinds, layers, kv_heads, num_blocks * block_size]``, contiguous: positions,
        and where a rule decides norms.
    rows, blocks
        Sequences, and blocks of one, at most.
    """

    def __init__(self, keys: Tensor, values: Tensor, notes: Tensor | None, *, rows: int, blocks: int) -> None:
        layers, all_blocks, block_size, kv_heads, width = keys.shape
        heads, lanes = triton.next_power_of_2(kv_heads), triton.next_power_of_2(width)
        self._layers = layers
        self._pages = keys, values, keys if notes is None else notes
        self._slots = all_blocks * block_size
        self._sizes = kv_heads, width
        self._shapes = 0 if notes is None else len(notes), block_size, heads, lanes, max(16, _NOTES // heads)
        # by sequence what is to be known, and its blocks
        self._facts = StepTable(keys.device, rows * (1 + blocks))
        # what triton compiled where nothing but numbers changes from launch to launch: it need not look at the arguments again
        self._compiled: dict[bool, Any] = {}

    def evict(self, length: int, blocks: NDArray[np.int32], victim: Ints | Tensor) -> None:
        """Evict the token of each sequence that somebody has chosen.

        Parameters
        ----------
        length
            Tokens that each of the sequences stores.
        blocks
            Their blocks, ``[S, width]``.
        victim
            Index of the token that goes, ``[S]``, or on the device where heads differ, int64 ``[S, layers, kv_heads]``.
        """
        if isinstance(victim, Tensor):
            self._launch(length, 0, blocks, chosen=victim.contiguous())
        else:
            self._launch(length, victim, blocks)

    def evict_by_norm(self, length: int, blocks: NDArray[np.int32], seen: Ints, rule: NormRule) -> None:
        """Evict the token of lowest priority of every head, of equal ones the youngest; ``seen`` ``[S]`` tokens were seen.

        The last token has no notes yet, and gets them where it is put.
        """
        self._launch(length, seen, blocks, rule=rule)

    def _launch(
        self,
        length: int,
        fact: Ints | int,
        blocks: NDArray[np.int32],
        *,
        chosen: Tensor | None = None,
        rule: NormRule | None = None,
    ) -> None:
        count, width = blocks.shape
        table = self._facts.table(count, 1 + width)
        table[:, 0], table[:, 1:] = fact, blocks
        facts = self._facts.send()
        by_norm, by_head = rule is not None, chosen is not None
        sign, protected = (0, 0) if rule is None else rule
        grid = count, self._layers, 1
        arguments = (
            *self._pages, facts, facts if chosen is None else chosen, length, self._slots, 1 + width, *self._sizes,
            sign, protected, ROUNDING, by_norm, by_head, *self._shapes,
        )  # fmt: skip
        if by_norm in self._compiled and not by_head:
            self._compiled[by_norm][grid](*arguments)
            return
        compiled = _evict_kernel[grid](*arguments, num_warps=4)
        # the interpreter compiles nothing
        if compiled is not None and not by_head:
            self._compiled[by_norm] = compiled
