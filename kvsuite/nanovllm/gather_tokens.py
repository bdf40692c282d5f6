"""Keys and values of some tokens, copied out of their pages. Importing this module needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# elements that a program copies at a time
_ELEMENTS = 4096


# the number of tokens must not cost a compilation
@triton.jit(do_not_specialize=["tokens"])
def _gather_kernel(keys, values, slots, out, tokens, width, TOKENS: tl.constexpr, LANES: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, LANES)
    present = (token < tokens)[:, None] & (lane < width)[None, :]
    row = tl.load(slots + token, mask=token < tokens, other=0)
    source = row[:, None] * width + lane[None, :]
    target = token.to(tl.int64)[:, None] * width + lane[None, :]
    key = tl.load(keys + source, mask=present)
    value = tl.load(values + source, mask=present)
    tl.store(out + target, key, mask=present)
    tl.store(out + tokens.to(tl.int64) * width + target, value, mask=present)


def gather_tokens(keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[T, kv_heads, head_dim]`` of tokens.

    Parameters
    ----------
    keys, values
        Pages ``[num_blocks, block_size, kv_heads, head_dim]``, contiguous.
    slots
        ``block * block_size + offset`` of each token, int64 ``[T]``.
    """
    count, shape = slots.shape[0], keys.shape[2:]
    width = shape.numel()
    out = torch.empty(2, count, *shape, dtype=keys.dtype, device=keys.device)
    lanes = triton.next_power_of_2(width)
    tokens = max(1, _ELEMENTS // lanes)
    _gather_kernel[(triton.cdiv(count, tokens),)](
        keys, values, slots, out, count, width, TOKENS=tokens, LANES=lanes, num_warps=4
    )
    return out[0], out[1]
