"""What the fused kernels compute, by plain torch: for fused decoders on a CPU, which the kernels themselves do not run on."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kvsuite.nanovllm import cuda_runner


def use_torch_kernels(patch: pytest.MonkeyPatch) -> None:
    """Let `FusedDecoder` compute in torch, and `CudaRunner` fuse what it is given."""
    patch.setattr(cuda_runner, "_interpreted", lambda: True)
    patch.setattr(cuda_runner, "not_fusable", lambda model, config: None)
    kernels = SimpleNamespace(add_norm=_add_norm, rotate_store=_rotate_store, silu_mul=_silu_mul)
    patch.setitem(sys.modules, "kvsuite.nanovllm.fused_kernels", kernels)
    patch.setitem(sys.modules, "kvsuite.nanovllm.row_linear", SimpleNamespace(row_linear=None))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _add_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    if delta is not None:
        residual += delta.sum(0)
    return _norm(residual, weight, eps)


def _silu_mul(gate_up: Tensor, dtype: torch.dtype, *, pdl: bool = False) -> Tensor:
    gate, up = gate_up.sum(0).chunk(2, dim=-1)
    return functional.silu(gate) * up


def _rotate_store(
    qkv: Tensor, positions: Tensor, slots: Tensor, table: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None,
    eps: float, keys: Any, values: Any, *, query_heads: int, out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    kv_heads, head_dim = keys.codes.shape[-2], 2 * table[0].shape[-1]
    vectors = qkv.sum(0).unflatten(-1, (-1, head_dim))
    query, key, value = vectors.split([query_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        query, key = _norm(query, norms[0], eps), _norm(key, norms[1], eps)
    cosines, sines = (side[positions][:, None] for side in table)

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cosines - high * sines, high * cosines + low * sines], dim=-1)

    for pages, stored in ((keys, turned(key)), (values, value)):
        pages.codes.flatten(0, 1)[slots] = stored
    return turned(query) if out is None else out.copy_(turned(query))
