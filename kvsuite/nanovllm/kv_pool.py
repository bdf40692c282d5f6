"""Keys and values of every layer, in blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsuite.errors import UserError

from .groups import LayerGroup
from .limits import Limits

#: block that no sequence owns: padding reads and writes it
SCRATCH_BLOCK = 0
_CPU_SHARE_BYTES = 1 << 30


class KVPool:
    """Keys and values of one layer group: ``[layers, num_blocks + 1, block_size, kv_heads, head_dim]`` each.

    Block 0 is scratch: no sequence owns it, and what padding writes there means nothing.

    Parameters
    ----------
    group
        Layers and the shape of their tokens.
    num_blocks
        Blocks that sequences can own.
    block_size
        Tokens a block.
    device, dtype
        Of the tensors.

    Raises
    ------
    UserError
        If the device has no room for it.
    """

    def __init__(
        self, group: LayerGroup, *, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.group = group
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (len(group.layers), num_blocks + 1, block_size, group.kv_heads, group.head_dim)
        try:
            # zeros: attention may read a padded slot before anything is written there, and 0 * NaN is NaN
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            needed = 2 * torch.Size(shape).numel() * dtype.itemsize
            raise UserError(
                f"num_blocks={num_blocks}: the pool needs {needed / 2**30:.2f} GiB, which {device} does not have free; "
                "give fewer num_blocks, pool_bytes or memory_share"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers of the group."""
        return self.group.token_bytes(self.keys.element_size()) * self.block_size

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the group's ``index``-th layer, each ``[num_blocks + 1, block_size, kv_heads, head_dim]``."""
        return self.keys[index], self.values[index]

    def _by_slot(self) -> tuple[Tensor, Tensor]:
        return self.keys.flatten(1, 2), self.values.flatten(1, 2)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks ``(source, target)`` in all layers, all at the same time; targets are distinct."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, dtype=torch.int64, device=self.keys.device).T
        for tensor in (self.keys, self.values):
            tensor.index_copy_(1, target, tensor.index_select(1, source))

    def gather_keys(self, slots: Tensor) -> Tensor:
        """Copies of the keys in ``slots`` ``[n]``: ``[layers, kv_heads, n, head_dim]``."""
        return self._by_slot()[0].index_select(1, slots.to(self.keys.device)).transpose(1, 2)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the tokens in ``slots`` ``[n]``: keys and values ``[layers, kv_heads, n, head_dim]``."""
        slots = slots.to(self.keys.device)
        keys, values = (tensor.index_select(1, slots).transpose(1, 2) for tensor in self._by_slot())
        return keys, values

    def scatter(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write tokens ``[layers, kv_heads, n, head_dim]`` to ``slots`` ``[n]``, all different."""
        slots = slots.to(self.keys.device)
        for tensor, new in zip(self._by_slot(), (keys, values), strict=True):
            tensor.index_copy_(1, slots, new.transpose(1, 2).to(tensor.dtype))

    def move(self, source: Tensor, target: int) -> None:
        """Copy one token of each head: slots ``source`` ``[layers, kv_heads]`` (or one int64) from slot ``target``.

        The token in slot ``target`` (the last of its sequence) takes the place of an evicted one.
        """
        for tensor in self._by_slot():
            last = tensor[:, target]
            if source.dim() == 0:
                tensor[:, int(source)] = last
            else:
                index = source.to(tensor.device)[:, None, :, None].expand(-1, 1, -1, tensor.shape[-1])
                tensor.scatter_(1, index, last[:, None])


def blocks_that_fit(limits: Limits, groups: Sequence[LayerGroup], device: torch.device, dtype: torch.dtype) -> int:
    """Number of blocks (for every group) that the limits allow.

    Raises
    ------
    UserError
        If that is less than one, or more than is free.
    """
    if limits.num_blocks is not None:
        return limits.num_blocks
    block_bytes = limits.block_size * sum(group.token_bytes(dtype.itemsize) for group in groups)
    enough = limits.max_num_seqs * limits.blocks_per_sequence
    if limits.pool_bytes is not None:
        option, room = f"pool_bytes={limits.pool_bytes}", limits.pool_bytes
    elif device.type == "cuda":
        share = 0.9 if limits.memory_share is None else limits.memory_share
        # what the allocator caches but nobody uses is free for the pool as well
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        option, room = f"memory_share={share}", int(free * share)
    elif limits.memory_share is not None:
        option, room = f"memory_share={limits.memory_share}", int(_free_host_bytes() * limits.memory_share)
    else:
        option, room = f"pool of {_CPU_SHARE_BYTES} bytes", _CPU_SHARE_BYTES
    # one more block than sequences own: the scratch block
    blocks = room // block_bytes - 1
    if blocks < 1:
        raise UserError(
            f"{option}: {room} bytes do not hold one block of {limits.block_size} tokens and the scratch block "
            f"({block_bytes} bytes each); give more, or a smaller block_size"
        )
    return int(min(blocks, enough))


def _free_host_bytes() -> int:
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
