"""Without triton nothing that compresses imports our kernels, on CUDA either: the exact reference does what they do."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kvsuite.nanovllm import pages
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.pooled_prompt import attention_sums_of, has_weight_kernels, paged_norms


@pytest.mark.parametrize("installed", [False, True])
def test_kernels_are_asked_for_where_triton_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    pages._has_triton.cache_clear()
    group = LayerGroup((0,), 2, 16, compressed=True)
    pool = KVPool(group, num_blocks=2, block_size=4, device=torch.device("cpu"), dtype=torch.float16)
    try:
        assert not pages.has_kernels(torch.device("cpu"))
        assert pages.has_kernels(torch.device("cuda")) == installed
        # what is said of the pool's device, whatever it is
        pool.device = torch.device("cuda")
        assert has_weight_kernels(pool) == installed
        if not installed:
            assert attention_sums_of(pool) is None
            assert paged_norms(pool, torch.arange(3), slice(None)) is None
    finally:
        pages._has_triton.cache_clear()
