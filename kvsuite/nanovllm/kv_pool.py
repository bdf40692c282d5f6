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
# tokens on their way to other slots, at once: keys or values of as many layers as fit, of one at least
_STAGING_BYTES = 1 << 26


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
        # made by the first that keeps anything, on the stream that does so
        self._staging = self.keys.new_empty(0)

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

    def keys_of(self, slots: Tensor, layers: slice = slice(None)) -> Tensor:
        """Copies of the keys in ``slots`` ``[n]`` of some of the group's layers: ``[layers, kv_heads, n, head_dim]``."""
        return self._vectors(self.keys, slots, layers)

    def values_of(self, slots: Tensor, layers: slice = slice(None)) -> Tensor:
        """Copies of the values in ``slots``, like `keys_of`."""
        return self._vectors(self.values, slots, layers)

    def _vectors(self, tensor: Tensor, slots: Tensor, layers: slice) -> Tensor:
        count, heads, device = tensor.shape[1] * self.block_size, self.group.kv_heads, tensor.device
        layer = torch.arange(len(self.group.layers), device=device)[layers, None, None]
        # one copy, in the order in which heads are looked at
        index = (layer * count + slots) * heads + torch.arange(heads, device=device)[:, None]
        found = tensor.view(-1, self.group.head_dim).index_select(0, index.flatten())
        return found.view(*index.shape, self.group.head_dim)

    @torch.inference_mode()
    def keep(self, source: Tensor, target: Tensor) -> None:
        """Copy tokens from slots ``source`` to slots ``target``, which may overlap.

        Nothing else is read, at most `_STAGING_BYTES` (or one layer) are on their way at a time, and the host does not wait.

        Parameters
        ----------
        source
            int64 ``[k]``, or ``[layers, kv_heads, k]`` where heads keep different tokens.
        target
            int64 ``[k]``, all different.
        """
        layers, heads, width = len(self.group.layers), self.group.kv_heads, self.group.head_dim
        slots, device = self.keys.shape[1] * self.block_size, self.keys.device
        # what moves as one: a token of one head, or of all
        parts = 1 if source.dim() == 1 else heads
        vector, count = heads * width // parts, target.shape[0] * parts
        head = torch.arange(parts, device=device)
        step = min(layers, max(1, _STAGING_BYTES // (count * vector * self.keys.element_size())))
        if self._staging.numel() < step * count * vector:
            self._staging = self.keys.new_empty(step * count * vector)
        for first in range(0, layers, step):
            own = torch.arange(first, min(first + step, layers), device=device)
            base = own[:, None, None] * slots
            chosen = source[None, :, None] if parts == 1 else source[first : first + step].transpose(1, 2)
            taken = ((base + chosen) * parts + head).flatten()
            given = ((base + target[:, None]) * parts + head).flatten()
            staged = self._staging[: given.shape[0] * vector].view(-1, vector)
            for tensor in (self.keys, self.values):
                vectors = tensor.view(-1, vector)
                torch.index_select(vectors, 0, taken, out=staged)
                vectors.index_copy_(0, given, staged)

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
