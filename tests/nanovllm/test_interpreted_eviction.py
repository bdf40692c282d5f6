"""Requests and books with the kernel that evicts, on the CPU with TRITON_INTERPRET=1; test_cuda_compression.py has CUDA."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the pool is on the CPU", allow_module_level=True)

from hypothesis import settings  # noqa: E402
from test_decode_eviction import LowestNorms, OldestBehindSinks  # noqa: E402
from test_policies_together import POLICIES, served  # noqa: E402

from kvsuite.compression import get_policy  # noqa: E402
from kvsuite.nanovllm import decode_eviction  # noqa: E402
from kvsuite.nanovllm.eviction_kernel import EvictionKernel  # noqa: E402


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize(
    ("name", "own"),
    [*POLICIES[::4], POLICIES[5], ("l2_compress", {"keep_ratio": 0.9, "prune_after": 9, "mode": "every_token"})],
)
def test_requests_get_the_tokens_and_store_the_keys_of_torch(name, own, positions, caching, monkeypatch):
    found, launched = [], []
    launch = EvictionKernel._launch
    monkeypatch.setattr(EvictionKernel, "_launch", lambda *given, **named: launched.append(launch(*given, **named)))
    for kernels in (True, False):
        monkeypatch.setattr(decode_eviction, "has_kernels", lambda device, kernels=kernels: kernels)
        policy = get_policy(name, positions=positions, **own)
        found.append(served(policy, [20, 6, 12, 13], forked=7, preempted=[5, 11], caching=caching))
        assert launched
    for (tokens, keys), (expected, expected_keys) in zip(*found, strict=True):
        assert tokens == expected
        assert len(keys) == len(expected_keys)
        assert all(map(torch.equal, keys, expected_keys))


def _by_kernel(machine):
    """The machine whose pool the interpreted kernel works on."""

    class ByKernel(machine):
        def __init__(self) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decode_eviction, "has_kernels", lambda device: True)
                super().__init__()

    ByKernel.TestCase.settings = settings(max_examples=8, stateful_step_count=12)
    return ByKernel.TestCase


TestOldestByKernel, TestLowestNormsByKernel = _by_kernel(OldestBehindSinks), _by_kernel(LowestNorms)
