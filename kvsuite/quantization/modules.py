"""Linear and embedding modules over packed weights: the matrix is dequantised inside the product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .packed import PackedWeight

# elements of a dequantised block: on a CPU it stays in the caches
_BLOCK = 1 << 20


class GroupLinear(nn.Module):
    """`nn.Linear` over a packed weight.

    Parameters
    ----------
    packed
        Weight ``[out_features, in_features]``.
    bias
        ``[out_features]`` or ``None``.
    """

    packed: PackedWeight
    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, packed.rows
        self.packed = packed
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        flat = x.reshape(-1, self.in_features)
        return product(flat, self.packed, self.bias).view(*x.shape[:-1], self.out_features)


class GroupEmbedding(nn.Module):
    """`nn.Embedding` over a packed table ``[num_embeddings, embedding_dim]``, which lies row by row."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.rows, packed.columns
        self.packed = packed

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., embedding_dim]`` in the compute dtype."""
        return self.packed.gather(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for ``x`` ``[tokens, columns]``, in the dtype of ``x``."""
    if x.is_cuda:
        from .triton_kernels import group_matmul

        return group_matmul(x, weight, bias)
    return _blockwise_product(x, weight, bias)


def _blockwise_product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    # CPUs without half-precision instructions multiply float16 an order of magnitude slower than float32, and with
    # float16 sums; a GPU adds up in float32 as well
    wide = torch.float32
    operand = x.to(wide)
    step = max(1, _BLOCK // weight.columns)
    blocks = []
    for start in range(0, weight.rows, step):
        part = slice(start, min(start + step, weight.rows))
        block = weight.dense(part.start, part.stop).to(wide)
        blocks.append(F.linear(operand, block, None if bias is None else bias[part].to(wide)).to(x.dtype))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
