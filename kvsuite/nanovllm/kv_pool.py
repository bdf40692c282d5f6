"""Keys and values of every layer, in blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsuite.cache_formats.cache_format import AUTO, SideFormat
from kvsuite.cache_formats.pack import refuse_vectors
from kvsuite.errors import UserError

from .groups import LayerGroup
from .layer_pages import LayerPages
from .limits import Limits
from .pages import Pages, take_rows, wide
from .token_notes import TokenNotes

_OWN = SideFormat(AUTO)

#: block that no sequence owns: padding reads and writes it
SCRATCH_BLOCK = 0
_CPU_SHARE_BYTES = 1 << 30
# tokens on their way to other slots, at once: keys or values of as many layers as fit, of one at least
_STAGING_BYTES = 1 << 26


class KVPool:
    """Keys and values of one layer group, in the group's format: `Pages` of ``num_blocks + 1`` blocks each.

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
        #: of what is read
        self.dtype = dtype
        self.device = device
        #: what a policy notes of stored tokens, which moves with them
        self.notes: TokenNotes | None = None
        self._block_bytes = group.token_bytes(dtype.itemsize) * block_size
        chosen = group.format
        sides = (_OWN, _OWN) if chosen is None else (chosen.keys, chosen.values)
        try:
            self._keys, self._values = (
                Pages(side, group, blocks=num_blocks + 1, block_size=block_size, device=device, dtype=dtype)
                for side in sides
            )
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            needed = (num_blocks + 1) * self._block_bytes
            raise UserError(
                f"num_blocks={num_blocks}: the pool needs {needed / 2**30:.2f} GiB, which {device} does not have free; "
                "give fewer num_blocks, pool_bytes or memory_share"
            ) from error
        # ``[layers, slots, kv_heads, width]``, in numbers that are moved fast
        self._by_slot = [wide(each.flatten(1, 2)) for each in self._tensors]
        # made by the first that keeps anything, on the stream that does so
        self._staging = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def keys(self) -> Tensor:
        """Keys ``[layers, num_blocks + 1, block_size, kv_heads, head_dim]``, or their codes (`Pages.codes`)."""
        return self._keys.codes

    @property
    def values(self) -> Tensor:
        """Values, like `keys`."""
        return self._values.codes

    @property
    def is_packed(self) -> bool:
        """Whether anything but the model's own numbers is stored."""
        return self.group.format is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers of the group."""
        return self._block_bytes

    def layer(self, index: int) -> tuple[LayerPages, LayerPages]:
        """Keys and values of the group's ``index``-th layer."""
        return self._keys.layers[index], self._values.layers[index]

    def store(self, index: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values ``[n, kv_heads, head_dim]`` of the group's ``index``-th layer in ``slots`` ``[n]``."""
        self._keys.store(index, slots, key)
        self._values.store(index, slots, value)

    def read(self, index: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as attention sees those in ``slots`` ``[n]`` of a layer, each ``[n, kv_heads, head_dim]``."""
        return self._keys.read(index, slots), self._values.read(index, slots)

    def read_blocks(self, index: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole ``blocks`` ``[...]``, each ``[..., block_size, kv_heads, head_dim]``."""
        return self._keys.read_blocks(index, blocks), self._values.read_blocks(index, blocks)

    def unpacked_shape(self, blocks: int) -> tuple[int, int, int, int]:
        """Shape of the keys, or the values, of so many blocks of a layer as they are read."""
        return (blocks, self.block_size, self.group.kv_heads, self.group.head_dim)

    def refuse_vectors(self) -> None:
        """Refuse what was stored since the last call and has no number in the pool's format; waits for the device.

        Raises
        ------
        CaseInvalid
            If there was any.
        """
        if self.group.format is None:
            return
        refused = self._keys.refused | self._values.refused
        self._keys.refused.zero_()
        self._values.refused.zero_()
        refuse_vectors(refused, str(self.group.format))

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self._keys.tensors, *self._values.tensors]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks ``(source, target)`` in all layers, all at the same time; targets are distinct."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, dtype=torch.int64, device=self.device).T
        for tensor in self._tensors:
            tensor.index_copy_(1, target, tensor.index_select(1, source))
        if self.notes is not None:
            self.notes.copy_blocks(source, target)

    def keys_of(self, slots: Tensor, layers: slice = slice(None)) -> Tensor:
        """The keys in ``slots`` ``[n]`` of some of the group's layers as they are read: ``[layers, kv_heads, n, head_dim]``."""
        return self._keys.vectors(slots, layers)

    def values_of(self, slots: Tensor, layers: slice = slice(None)) -> Tensor:
        """The values in ``slots``, like `keys_of`."""
        return self._values.vectors(slots, layers)

    @torch.inference_mode()
    def put(self, slots: Tensor, layers: slice, keys: Tensor, values: Tensor) -> None:
        """Store keys and values ``[layers, kv_heads, n, head_dim]`` of some of the group's layers in ``slots`` ``[n]``."""
        for tensor, vectors in ((self.keys, keys), (self.values, values)):
            tensor[layers].flatten(1, 2).index_copy_(1, slots, vectors.transpose(1, 2))

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
        if not len(target):
            return
        layers, heads = len(self.group.layers), self.group.kv_heads
        slots = self.keys.shape[1] * self.block_size
        # what moves as one: a token of one head, or of all
        parts = 1 if source.dim() == 1 else heads
        head = torch.arange(parts, device=self.device)
        # rows of one tensor: what moves as one, side by side
        rows = [wide(tensor.view(-1, heads * tensor.shape[-1] // parts)) for tensor in self._tensors]
        widest = target.shape[0] * parts * max(each.shape[1] * each.element_size() for each in rows)
        step = min(layers, max(1, _STAGING_BYTES // widest))
        if self._staging.numel() < step * widest:
            self._staging = self._staging.new_empty(step * widest)
        for first in range(0, layers, step):
            own = torch.arange(first, min(first + step, layers), device=self.device)
            base = own[:, None, None] * slots
            chosen = source[None, :, None] if parts == 1 else source[first : first + step].transpose(1, 2)
            taken = ((base + chosen) * parts + head).flatten()
            given = ((base + target[:, None]) * parts + head).flatten()
            for vectors in rows:
                count, width = given.shape[0], vectors.shape[1]
                staged = self._staging[: count * width * vectors.element_size()].view(vectors.dtype).view(count, width)
                take_rows(vectors, taken, staged)
                vectors.index_copy_(0, given, staged)
        if self.notes is not None:
            self.notes.keep(source, target)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy one token of each of some sequences over another one: the last over an evicted one.

        Parameters
        ----------
        source
            Slots that are written, int64 ``[S]``, or ``[S, layers, kv_heads]`` where heads evict different tokens.
        target
            Slots of the last tokens, int64 ``[S]``.
        """
        for tensor in self._by_slot:
            last = tensor.index_select(1, target)
            if source.dim() == 1:
                tensor.index_copy_(1, source, last)
            else:
                tensor.scatter_(1, source.transpose(0, 1)[..., None].expand(-1, -1, -1, tensor.shape[-1]), last)
        if self.notes is not None:
            self.notes.move(source, target)


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
