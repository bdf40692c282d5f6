"""The kernel for greedy tokens against torch.argmax. On a CUDA device, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import DEVICE, INTERPRETED

from kvsuite.nanovllm import greedy_tokens as module
from kvsuite.nanovllm.greedy_tokens import greedy_tokens

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# few different ones, so that there are equals; the smallest is no zero in any of the three
NUMBERS = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 6.0e-8, -6.0e-8, 60000.0]


@settings(max_examples=40 if INTERPRETED else 200, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 4),
    vocabulary=st.integers(1, 300),
    beside=st.integers(0, 3),
    numbers=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    programs=st.sampled_from([1, 12, 1000]),
)
def test_the_kernel_finds_what_torch_finds(seed, rows, vocabulary, beside, numbers, dtype, programs):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(numbers), (rows, vocabulary + beside), generator=generator)
    logits = torch.tensor(numbers)[drawn].to(DEVICE, dtype)[:, :vocabulary]
    arrivals = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        # several parts, and several looks at one of them
        patch.setattr(module, "_TOKENS", 16)
        patch.setattr(module, "_PARTS", 8)
        patch.setattr(module, "_PROGRAMS", programs)
        found = greedy_tokens(logits, arrivals)
    # torch's answer on the CPU is the first of equals, as its documentation says
    assert found.tolist() == logits.cpu().argmax(dim=-1).tolist()
    assert found.dtype == torch.int64
    assert not arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [512, 50_257, 151_936, 262_145])
@pytest.mark.parametrize("rows", [1, 3] if INTERPRETED else [1, 3, 64, 1100])
def test_vocabularies_of_models(rows, vocabulary, dtype):
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
    arrivals = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    top = logits.float().amax(dim=-1)
    for _ in range(1 if INTERPRETED else 20):
        found = greedy_tokens(logits, arrivals)
        assert torch.equal(logits.float().gather(1, found[:, None])[:, 0], top)
        assert torch.equal(found, (logits.float() == top[:, None]).int().argmax(dim=-1))
    # behind the last whole block, and in the first and the last place
    for place in (0, vocabulary - 1):
        logits[:, place] = 100.0
        assert greedy_tokens(logits).tolist() == [place] * rows
        logits[:, place] = -100.0
