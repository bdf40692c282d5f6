"""Norms of keys, where they lie in their pages. Importing this module needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# elements that a program reads at a time
_ELEMENTS = 8192


@triton.jit
def norms_in_pages(
    keys, slots, layer, tokens, layer_slots, kv_heads, width,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of a program's tokens in a layer: which of all they are, their heads and slots, whether there is one, and its norm."""
    # the heads of a token lie side by side
    row = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0) * TOKENS + row // HEADS
    head = row % HEADS
    lane = tl.arange(0, LANES)
    present = (token < tokens) & (head < kv_heads)
    slot = tl.load(slots + token, mask=present, other=0)
    source = keys + ((layer * layer_slots + slot) * kv_heads + head)[:, None] * width + lane[None, :]
    key = tl.load(source, mask=present[:, None] & (lane < width)[None, :], other=0.0).to(tl.float32)
    return token, head, slot, present, tl.sqrt_rn(tl.sum(key * key, axis=1))


# neither the number of tokens nor the size of a pool must cost a compilation
@triton.jit(do_not_specialize=["tokens", "layer_slots"])
def _key_norms_kernel(
    keys,
    slots,
    out,
    tokens,
    layer_slots,
    kv_heads,
    width,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    token, head, _, present, norm = norms_in_pages(
        keys, slots, layer, tokens, layer_slots, kv_heads, width, TOKENS, HEADS, LANES
    )
    tl.store(out + (layer * kv_heads + head) * tokens + token, norm, mask=present)


def paged_key_norms(pages: Tensor, slots: Tensor) -> Tensor:
    """L2 norm of every key of some tokens, float32 ``[layers, kv_heads, n]``.

    Parameters
    ----------
    pages
        Keys of some layers, ``[layers, num_blocks, block_size, kv_heads, head_dim]``, contiguous.
    slots
        ``block * block_size + offset`` of the tokens, int64 ``[n]``, contiguous.
    """
    layers, blocks, block_size, kv_heads, width = pages.shape
    count = slots.shape[0]
    out = torch.empty((layers, kv_heads, count), dtype=torch.float32, device=pages.device)
    heads, lanes = triton.next_power_of_2(kv_heads), triton.next_power_of_2(width)
    tokens = max(1, _ELEMENTS // (heads * lanes))
    _key_norms_kernel[(triton.cdiv(count, tokens), layers)](
        pages, slots, out, count, blocks * block_size, kv_heads, width,
        TOKENS=tokens, HEADS=heads, LANES=lanes, num_warps=4,
    )  # fmt: skip
    return out
