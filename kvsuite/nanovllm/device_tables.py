"""Block tables on the device: they stay there, and every step brings only what has changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_table import BlockTables, Ints

# changes are sent in powers of two of them, so that steps keep their shapes
_FEWEST_CHANGES = 64


class DeviceTables:
    """The block tables of one layer group on the device.

    Steps are computed in the order in which they are sent, so a table may change while an earlier step still waits.

    Parameters
    ----------
    tables
        On the host.
    device
        Where the copy lies.
    """

    def __init__(self, tables: BlockTables, device: torch.device) -> None:
        self.tables = tables
        shape = tables.table.shape
        # one entry more than there are: what pads the changes goes there
        self._flat = torch.zeros(tables.table.size + 1, dtype=torch.int32, device=device)
        self._table = self._flat[:-1].view(shape)

    def changes(self) -> tuple[Ints, NDArray[np.int32]]:
        """What `update` has yet to bring: places int64 ``[n]`` in the flattened table, and blocks int32 ``[n]``."""
        changed, table = self.tables.changes(), self.tables.table
        # most steps of few sequences change nothing
        count = _FEWEST_CHANGES if len(changed) else 0
        while count < len(changed):
            count *= 2
        places, blocks = np.full(count, table.size, dtype=np.int64), np.zeros(count, dtype=np.int32)
        if len(changed):
            places[: len(changed)] = changed
            blocks[: len(changed)] = table.ravel()[places[: len(changed)]]
        return places, blocks

    def update(self, places: Tensor, blocks: Tensor) -> None:
        """Apply `changes`, which are on the device by now."""
        if len(places):
            self._flat.index_copy_(0, places, blocks)
        self.tables.forget_changes()

    def pick(self, rows: Tensor, width: int) -> GatheredRows:
        """The first ``width`` entries of int64 ``rows`` ``[S]`` on the device, to be gathered before the next `update`."""
        return GatheredRows(self._table, rows, width)


@dataclass(frozen=True)
class GatheredRows:
    """The first ``width`` entries of the rows ``rows`` ``[S]`` of ``table``, where they lie."""

    table: Tensor
    rows: Tensor
    width: int

    def gather(self) -> Tensor:
        """The rows one behind the other, int32 ``[S, width]``."""
        return self.table[:, : self.width].index_select(0, self.rows)


@dataclass(frozen=True)
class TableRows:
    """The block tables of a step's sequences.

    Parameters
    ----------
    tables
        Of the layer group.
    rows
        The sequences' rows, int64 ``[S]``.
    """

    tables: DeviceTables
    rows: Ints

    @property
    def width(self) -> int:
        """Blocks of the longest sequence."""
        return int(self.tables.tables.blocks[self.rows].max())

    def read(self) -> NDArray[np.int32]:
        """The rows on the host, as they are now: int32 ``[S, width]``."""
        return self.tables.tables.rows(self.rows)
