"""Prompts over pages: where a step's tokens are, and on a GPU torch's attention over them against the exact one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.prompt_attention import PromptRows, TorchPrompts

# bfloat16 keeps 8 bits
BOUND = 8e-3


def rows_of(lengths: list[int], counts: list[int], block_size: int, seed: int = 0) -> PromptRows:
    """Sequences whose blocks lie anywhere among twice as many, and whose last ``counts`` tokens are a step's."""
    used = [-(-length // block_size) for length in lengths]
    blocks = 1 + np.random.default_rng(seed).permutation(2 * sum(used))[: sum(used)]
    tables = np.zeros((len(lengths), max(used) + 1), dtype=np.int32)
    at = 0
    for row, count in enumerate(used):
        tables[row, :count] = blocks[at : at + count]
        at += count
    starts = np.cumsum([0, *counts]).astype(np.int32)
    return PromptRows(starts, np.array(lengths), tables)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), block_size=st.sampled_from([1, 4, 16]))
def test_every_token_is_found_in_its_block(lengths: list[int], block_size: int) -> None:
    rows = rows_of(lengths, lengths, block_size)
    blocks, tokens = rows.blocks(block_size), rows.tokens(block_size)
    expected = [
        (rows.tables[row, place // block_size], place % block_size)
        for row, length in enumerate(lengths)
        for place in range(length)
    ]
    assert [(blocks[token // block_size], token % block_size) for token in tokens] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [None, "int8"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_torchs_attention_is_the_exact_one(packed: str | None, head_dim: int) -> None:
    """Whole prompts, the end of one whose beginning is stored, and one new token among them."""
    if packed is not None:
        pytest.importorskip("triton")
    device, heads, kv_heads = torch.device("cuda:0"), 8, 2
    lengths, counts = [37, 100, 64, 5], [37, 30, 1, 5]
    rows = rows_of(lengths, counts, 16)
    form = None if packed is None else CacheFormat.parse(packed)
    group: Any = LayerGroup((0,), kv_heads, head_dim, format=form)
    pool = KVPool(group, num_blocks=2 * 20, block_size=16, device=device, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(head_dim)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    every = torch.arange((pool.num_blocks + 1) * 16, device=device)
    pool.store(0, every, drawn(len(every), kv_heads, head_dim), drawn(len(every), kv_heads, head_dim))
    query = drawn(sum(counts), heads, head_dim)
    attention = TorchPrompts(pool)
    attention.plan(rows)
    found = attention.attend(query, *pool.layer(0), 0.3 * head_dim**-0.5).float()
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        places = torch.arange(length)
        slots = (torch.from_numpy(rows.tables[row]).long()[places // 16] * 16 + places % 16).to(device)
        keys, values = (side.float().repeat_interleave(heads // kv_heads, dim=1) for side in pool.read(0, slots))
        own = slice(rows.starts[row], rows.starts[row + 1])
        scores = torch.einsum("qhd,khd->hqk", query[own].float(), keys) * (0.3 * head_dim**-0.5)
        seen = places[None, :] <= torch.arange(length - count, length)[:, None]
        weights = scores.masked_fill(~seen.to(device), float("-inf")).softmax(dim=-1)
        expected = torch.einsum("hqk,khd->qhd", weights, values)
        error = (found[own] - expected).norm() / expected.norm()
        assert error < BOUND, (row, error)
