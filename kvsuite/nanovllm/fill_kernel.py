"""A decode step's rows put into static tensors in one launch for each layer group. Importing needs triton.

One after another the copies, the padding, the gathered block tables and the tokens in flight are some fifteen kernels, between
two captured steps of which each takes less time than its launch. `static_batch` says in torch what this kernel does.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from .batch import StepBatch
from .kv_pool import SCRATCH_BLOCK

# entries of a block table that a program copies
_ENTRIES = 1024


# neither sequences of a step nor their blocks must cost a compilation
@triton.jit(do_not_specialize=["count", "width", "table_stride", "own_stride"])
def _fill_rows_kernel(
    fed,
    in_flight,
    positions,
    slots,
    kv_lengths,
    dropped,
    table,
    table_rows,
    own_ids,
    own_positions,
    own_slots,
    own_kv_lengths,
    own_dropped,
    own_tables,
    count,
    width,
    table_stride,
    own_stride,
    SCRATCH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    own_table = own_tables + row.to(tl.int64) * own_stride
    first = tl.program_id(1) == 0
    if row < count:
        blocks = tl.load(
            table + tl.load(table_rows + row) * table_stride + entries, mask=entries < width, other=SCRATCH
        )
        tl.store(own_table + entries, blocks, mask=entries < width)
        if first:
            token = tl.load(fed + row)
            # a token in flight, by its row of the step before
            if token < 0:
                token = tl.load(in_flight + (-1 - token))
            tl.store(own_ids + row, token)
            tl.store(own_positions + row, tl.load(positions + row))
            tl.store(own_slots + row, tl.load(slots + row))
            tl.store(own_kv_lengths + row, tl.load(kv_lengths + row))
            tl.store(own_dropped + row, tl.load(dropped + row))
    elif first:
        tl.store(own_ids + row, 0)
        tl.store(own_positions + row, 0)
        tl.store(own_slots + row, SCRATCH)
        tl.store(own_kv_lengths + row, 1)
        tl.store(own_dropped + row, 0)
        tl.store(own_table, SCRATCH)


def fill_rows(static: StepBatch, batch: StepBatch, count: int) -> None:
    """Put the first ``count`` sequences of a decode step into the first rows of a static one, and padding into the others."""
    for own, given in zip(static.groups, batch.groups, strict=True):
        # a step that brings its tables has them row by row
        table, rows = (
            (given.tables, static.sample_rows)
            if isinstance(given.tables, Tensor)
            else (given.tables.table, given.tables.rows)
        )
        _fill_rows_kernel[(static.sequences, max(1, triton.cdiv(given.width, _ENTRIES)))](
            batch.fed,
            # without any in flight no id is negative
            batch.fed if batch.in_flight is None else batch.in_flight,
            batch.positions,
            given.slots,
            given.kv_lengths,
            given.dropped,
            table,
            rows,
            static.fed,
            static.positions,
            own.slots,
            own.kv_lengths,
            own.dropped,
            own.block_tables,
            count,
            given.width,
            table.stride(0),
            own.block_tables.stride(0),
            SCRATCH=SCRATCH_BLOCK,
            ENTRIES=_ENTRIES,
            num_warps=4,
        )
