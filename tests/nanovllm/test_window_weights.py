"""Mean attention of the last queries by the kernel and by the reference. On CUDA, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("the kernel needs a CUDA device", allow_module_level=True)

from kvsuite.compression import get_policy  # noqa: E402
from kvsuite.compression.prompt_view import PromptObservation, PromptView, attention_weights  # noqa: E402
from kvsuite.nanovllm.window_weights import mean_weights  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter multiplies bfloat16 by their bits
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16


def _made(heads, kv_heads, window, length, head_dim):
    generator = torch.Generator().manual_seed(heads + window + length)
    query = torch.randn(heads, window, head_dim, generator=generator).mul(2).to(DTYPE)
    keys = torch.randn(kv_heads, length, head_dim, generator=generator).to(DTYPE)
    # a token that everybody looks at: the weights of the others are small
    keys[:, 0] = query.float().mean(dim=(0, 1)).to(DTYPE)
    return query.to(DEVICE), keys.to(DEVICE)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "length", "head_dim"),
    [
        (4, 1, 64, 300, 128), (6, 2, 5, 131, 64), (2, 2, 16, 16, 16), (2, 1, 1, 129, 32), (3, 1, 100, 257, 64),
        (2, 1, 7, 8, 256), (2, 1, 64, 300, 256),
    ],
)  # fmt: skip
def test_it_is_the_mean_of_the_weights(heads, kv_heads, window, length, head_dim):
    query, keys = _made(heads, kv_heads, window, length, head_dim)
    found = mean_weights(query, keys, head_dim**-0.5)
    exact = attention_weights(query.double().cpu(), keys.double().cpu(), head_dim**-0.5, length - window).mean(dim=1)
    assert found.shape == (heads, length)
    torch.testing.assert_close(found.cpu(), exact.float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(heads, device=DEVICE))


def test_snapkv_ranks_by_it():
    query, keys = _made(8, 2, 16, 200, 64)
    policy = get_policy("snapkv", window=16, keep_ratio=0.4)
    observed = PromptObservation(policy.needs)
    observed.add(query.repeat(1, 2, 1), lambda: keys, 64**-0.5)
    positions = torch.arange(200, device=DEVICE).expand(2, 200)
    plain, fused = (
        policy.prompt_score(PromptView(positions, 199, keys=keys, values=keys, observed=observed, mean_weights=weights))
        for weights in (None, mean_weights)
    )
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-7)
