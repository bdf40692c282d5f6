"""Attention of prompts on Hopper: gathered keys and pages give the same, for whole prompts and for chunks behind a prefix."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("the kernels need a CUDA device", allow_module_level=True)
pytest.importorskip("flashinfer")

from torch.nn import functional  # noqa: E402

from kvsuite.nanovllm.flashinfer_libraries import FA3, flashinfer_module, libraries_for  # noqa: E402
from kvsuite.nanovllm.groups import LayerGroup  # noqa: E402
from kvsuite.nanovllm.kv_pool import KVPool  # noqa: E402
from kvsuite.nanovllm.prompt_attention import HopperPrompts, PromptRows, starts_of  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 8, 2, 128, 16
LENGTHS = [70, 200, 33]


@pytest.fixture(scope="module")
def pool():
    pool = KVPool(
        LayerGroup((0,), KV_HEADS, HEAD_DIM), num_blocks=40, block_size=BLOCK, device=DEVICE, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    for side in (pool.keys, pool.values):
        for layer in side:
            layer.normal_()
    return pool


def _attention(pool):
    if libraries_for([pool], build=False).prompts != FA3:
        pytest.skip("FlashInfer's fa3 is not built here")
    workspace = torch.zeros(64 << 20, dtype=torch.uint8, device=DEVICE)
    return HopperPrompts(flashinfer_module(), pool, HEADS, workspace)


@pytest.mark.parametrize("counts", [[70, 200, 33], [50, 60, 33], [2, 3, 5]], ids=["whole", "chunks", "few of many"])
@pytest.mark.parametrize("scale", [HEAD_DIM**-0.5, 0.05])
def test_a_query_sees_its_own_and_all_earlier_tokens(counts, scale, pool):
    attention = _attention(pool)
    order = np.random.default_rng(1).permutation(40)[: 3 * 13] + 1
    tables = order.reshape(3, 13).astype(np.int32)
    attention.plan(PromptRows(starts_of(np.array(counts)), np.array(LENGTHS), tables))
    query = torch.randn(sum(counts), HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    found = attention.attend(query, *pool.layer(0), scale)
    assert found.shape == query.shape
    start = 0
    for table, length, count in zip(torch.from_numpy(tables).long(), LENGTHS, counts, strict=True):
        own, its = (side.codes[table].flatten(0, 1)[:length].transpose(0, 1)[None].float() for side in pool.layer(0))
        seen = torch.ones(count, length, dtype=torch.bool, device=DEVICE).tril(length - count)
        expected = functional.scaled_dot_product_attention(
            query[start : start + count].transpose(0, 1)[None].float(), own, its, seen, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
        part = found[start : start + count].float()
        assert ((part - expected).norm() / expected.norm()).item() < 1e-2
        start += count
