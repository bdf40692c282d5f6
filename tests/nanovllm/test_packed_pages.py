"""Pages in a cache format: what is read back is what `pack` and `unpack` make of what was written, whatever moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvsuite.cache_formats.cache_format import CacheFormat, SideFormat
from kvsuite.cache_formats.pack import pack, unpack
from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.block_pool import PoolFullError
from kvsuite.nanovllm.block_table import BlockTables, tables_for
from kvsuite.nanovllm.decode_eviction import DecodeEviction
from kvsuite.nanovllm.groups import LayerGroup, unpaged
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.limits import Limits

FORMATS = (
    "auto", "int8", "int4", "fp8_e4m3", "fp8_e4m3(group=4)", "int8:int4(group=4)", "int4+hadamard:int8", "int8:auto",
)  # fmt: skip
LAYERS, HEADS, DIM, SIZE, BLOCKS, ROWS = 2, 2, 8, 3, 9, 3
CPU = torch.device("cpu")


def vectors(token: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[layers, heads, dim]`` of a token."""
    made = torch.randn(2, LAYERS, HEADS, DIM, generator=torch.Generator().manual_seed(token))
    return made[0] * 3, made[1]


def pool_of(name: str, dtype: torch.dtype = torch.float32) -> KVPool:
    group = LayerGroup((0, 3), HEADS, DIM, format=CacheFormat.parse(name))
    return KVPool(group, num_blocks=BLOCKS, block_size=SIZE, device=CPU, dtype=dtype)


def sides(pool: KVPool) -> tuple[SideFormat, SideFormat]:
    chosen = pool.group.format
    return (SideFormat("auto"),) * 2 if chosen is None else (chosen.keys, chosen.values)


def through(side: SideFormat, x: Tensor, dtype: torch.dtype) -> Tensor:
    return unpack(side, pack(side, x), dtype) if side.is_packed else x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_pages_have_the_form_and_the_bytes_of_the_format(name: str, dtype: torch.dtype) -> None:
    pool = pool_of(name, dtype)
    key, value = (torch.randn(4, HEADS, DIM, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    slots = torch.tensor([7, 3, 22, 5])
    pool.store(1, slots, key, value)
    key_pages, value_pages = pool.layer(1)
    for side, pages, given in zip(sides(pool), (key_pages, value_pages), (key, value), strict=True):
        assert pages.side == side
        stored = pages.codes.flatten(0, 1)[slots]
        if side.is_packed:
            packed = pack(side, given)
            assert torch.equal(stored, packed.codes)
            assert torch.equal(pages.scales.flatten(0, 1)[slots], packed.scales)
        else:
            assert torch.equal(stored, given)
    assert [t.shape[:3] for t in (key_pages.codes, key_pages.scales)] == [(BLOCKS + 1, SIZE, HEADS)] * 2
    token = sum(side.bytes(DIM, HEADS, dtype.itemsize) for side in sides(pool)) * LAYERS
    assert pool.block_bytes == token * SIZE
    assert pool.nbytes == (BLOCKS + 1) * pool.block_bytes
    read = pool.read(1, slots)
    whole = pool.read_blocks(1, torch.tensor([[2, 1], [7, 0]]))
    for side, own, blocks, given in zip(sides(pool), read, whole, (key, value), strict=True):
        expected = through(side, given, dtype)
        assert own.dtype == dtype
        assert torch.equal(own, expected)
        assert torch.equal(blocks[0, 0, 1], expected[0])
        assert torch.equal(blocks[1, 0, 1], expected[2])
    # the other layer has seen nothing
    assert not pool.layer(0)[0].codes.any()


class PackedPages(RuleBasedStateMachine):
    """Sequences that share blocks, write, fork, are compressed and evict, each head its own tokens."""

    @initialize(name=st.sampled_from(FORMATS))
    def make(self, name: str) -> None:
        self.pool = pool_of(name)
        group = self.pool.group
        limits = Limits(max_model_len=SIZE * BLOCKS, max_num_seqs=ROWS, max_num_batched_tokens=64, block_size=SIZE)
        self.tables: BlockTables = tables_for(group, limits, BLOCKS)
        self.eviction = DecodeEviction(None, group, self.tables, self.pool)
        #: tokens by row, layer and head
        self.held: dict[int, np.ndarray] = {}
        self.made: list[tuple[Tensor, Tensor]] = []

    def write(self, row: int, count: int) -> None:
        try:
            self.pool.copy_blocks(self.tables.reserve(row, count))
        except PoolFullError:
            return
        slots = torch.from_numpy(self.tables.slots(row, count))
        first = len(self.made)
        self.made += [vectors(token) for token in range(first, first + count)]
        for layer in range(LAYERS):
            self.pool.store(
                layer,
                slots,
                *(torch.stack([token[side][layer] for token in self.made[first:]]) for side in (0, 1)),
            )
        self.tables.commit(row, count)
        new = np.broadcast_to(np.arange(first, first + count), (LAYERS, HEADS, count))
        self.held[row] = np.concatenate([self.held[row], new], axis=-1)

    @precondition(lambda self: len(self.held) < ROWS)
    @rule(count=st.integers(1, 7))
    def add(self, count: int) -> None:
        row = next(row for row in range(ROWS) if row not in self.held)
        self.held[row] = np.empty((LAYERS, HEADS, 0), dtype=np.int64)
        self.write(row, count)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 4))
    def append(self, data: st.DataObject, count: int) -> None:
        self.write(self.row(data), count)

    @precondition(lambda self: self.held and len(self.held) < ROWS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row = self.row(data)
        target = next(row for row in range(ROWS) if row not in self.held)
        self.tables.fork(row, target)
        self.held[target] = self.held[row]

    @precondition(lambda self: self.held and len(self.held) < ROWS)
    @rule(data=st.data(), count=st.integers(1, 3))
    def find_prefix(self, data: st.DataObject, count: int) -> None:
        row = self.row(data)
        full = self.tables.row_blocks(row)[: min(count, self.held[row].shape[-1] // SIZE)]
        target = next(row for row in range(ROWS) if row not in self.held)
        self.tables.adopt(target, full)
        self.held[target] = self.held[row][..., : len(full) * SIZE]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), by_head=st.booleans())
    def compress(self, data: st.DataObject, by_head: bool) -> None:
        row = self.row(data)
        tokens = self.held[row].shape[-1]
        if not tokens:
            return
        kept = data.draw(st.integers(1, tokens))
        some = st.sets(st.integers(0, tokens - 1), min_size=kept, max_size=kept).map(sorted)
        shape = (LAYERS, HEADS, kept) if by_head else (kept,)
        keep = np.array([data.draw(some) for _ in range(LAYERS * HEADS if by_head else 1)]).reshape(shape)
        try:
            self.eviction.select(row, torch.from_numpy(keep))()
        except PoolFullError:
            return
        self.held[row] = np.take_along_axis(self.held[row], np.broadcast_to(keep, (LAYERS, HEADS, kept)), -1)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), by_head=st.booleans())
    def evict_one(self, data: st.DataObject, by_head: bool) -> None:
        row = self.row(data)
        tokens = self.held[row].shape[-1]
        if tokens < 2:
            return
        shape = (LAYERS, HEADS) if by_head else ()
        drawn = [data.draw(st.integers(0, tokens - 1)) for _ in range(LAYERS * HEADS if by_head else 1)]
        victim = np.array(drawn).reshape(shape)
        for index in np.unique(victim // SIZE).tolist():
            try:
                self.pool.copy_blocks(self.tables.own(row, index))
            except PoolFullError:
                return
        slots = torch.from_numpy(self.tables.stored_slots(row))
        self.pool.move(slots[torch.from_numpy(victim)][None], slots[-1:])
        self.tables.shrink(row, tokens - 1)
        after = self.held[row].copy()
        np.put_along_axis(after, np.broadcast_to(victim, (LAYERS, HEADS))[..., None], after[..., -1:], -1)
        self.held[row] = after[..., :-1]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        row = self.row(data)
        self.tables.release(row)
        del self.held[row]

    def row(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.held)))

    @invariant()
    def every_sequence_reads_what_was_packed(self) -> None:
        for row, tokens in getattr(self, "held", {}).items():
            slots = torch.from_numpy(self.tables.stored_slots(row))
            assert len(slots) == tokens.shape[-1]
            if not len(slots):
                continue
            for number, found in enumerate((self.pool.keys_of(slots), self.pool.values_of(slots))):
                all_vectors = torch.stack([made[number] for made in self.made], 2)
                index = torch.from_numpy(tokens)[..., None].expand(-1, -1, -1, DIM)
                expected = through(sides(self.pool)[number], all_vectors.gather(2, index), torch.float32)
                assert torch.equal(found, expected)
                for layer in range(LAYERS):
                    assert torch.equal(self.pool.read(layer, slots)[number].transpose(0, 1), expected[layer])


TestPackedPages = PackedPages.TestCase
TestPackedPages.settings = settings(max_examples=20, stateful_step_count=15)


@pytest.mark.parametrize("shape", [(0,), (LAYERS, HEADS, 0)], ids=["tokens", "by_head"])
def test_keeping_no_token_moves_nothing(shape: tuple[int, ...]) -> None:
    pool = pool_of("int4")
    key, value = (torch.ones(2, HEADS, DIM) for _ in range(2))
    pool.store(0, torch.tensor([4, 5]), key, value)
    before = [pages.clone() for pages in (pool.keys, pool.values)]
    pool.keep(torch.empty(shape, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert all(map(torch.equal, (pool.keys, pool.values), before))


def test_what_has_no_number_in_the_format_is_refused_once() -> None:
    pool = pool_of("int8:fp8_e4m3")
    key, value = (torch.ones(1, HEADS, DIM) for _ in range(2))
    pool.store(0, torch.tensor([4]), key, value)
    pool.refuse_vectors()
    value[0, 1, 2] = float("inf")
    pool.store(0, torch.tensor([4]), key, value)
    with pytest.raises(CaseInvalid, match=r"^--kv-cache-dtype=int8:fp8_e4m3: a key or a value is not finite"):
        pool.refuse_vectors()
    pool.refuse_vectors()


@pytest.mark.parametrize(
    ("name", "why"),
    [("int4(residual=8)", "residual window"), ("int8_channel", "per channel"), ("kivi_int4", "per channel")],
)
def test_formats_of_several_tokens_are_nothing_for_pages(name: str, why: str) -> None:
    chosen = CacheFormat.parse(name)
    assert chosen is not None
    assert why in str(unpaged(chosen))
