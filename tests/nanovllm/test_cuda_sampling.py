"""Draws by the kernel against draws by torch. On a CUDA device, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("the kernels need a CUDA device", allow_module_level=True)

from kvsuite.nanovllm import sampling  # noqa: E402
from kvsuite.nanovllm.fused_sampling import draw  # noqa: E402
from kvsuite.nanovllm.sampling import SamplingParameters, sample  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("vocabulary", [37, 5000, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_draws_what_torch_draws(vocabulary, dtype):
    count = 3 if INTERPRETED else 200
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(count + 1, vocabulary, generator=generator)).to(DEVICE, dtype)
    rows = torch.randperm(count + 1, generator=generator)[:count].to(DEVICE)
    temperatures = (0.2 + 2 * torch.rand(count, generator=generator)).to(DEVICE)
    keys = torch.tensor([sampling._key(seed, 3) for seed in range(count)], device=DEVICE)
    scores = logits[rows].float() / temperatures[:, None]
    scores -= sampling._exponential(keys, vocabulary).log()
    found = draw(logits, rows, temperatures, keys)
    chosen = scores.gather(1, found[:, None])[:, 0]
    # two of nearly equal score may change places by rounding
    torch.testing.assert_close(chosen, scores.max(dim=1).values, atol=2e-5, rtol=2e-6)
    assert (found == scores.argmax(dim=1)).double().mean() > 0.98


def test_frequencies_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], device=DEVICE)
    count = 200 if INTERPRETED else 20_000
    logits = probabilities.log()[None].expand(count, -1).contiguous()
    keys = torch.tensor([sampling._key(seed, 0) for seed in range(count)], device=DEVICE)
    found = draw(logits, torch.arange(count, device=DEVICE), torch.ones(count, device=DEVICE), keys)
    shares = torch.bincount(found, minlength=4).double() / count
    assert (shares - probabilities).abs().max() < 4 * (0.25 / count) ** 0.5


@pytest.mark.skipif(INTERPRETED, reason="the choice between kernel and torch is that of CUDA")
def test_rows_of_all_kinds_side_by_side_equal_rows_alone():
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(8, 1000, generator=generator)).to(DEVICE)
    kinds = [
        SamplingParameters(),
        SamplingParameters(temperature=0.7, seed=5),
        SamplingParameters(temperature=1.3, seed=6, top_k=20),
        SamplingParameters(temperature=1.0, seed=7, top_p=0.8),
    ] * 2
    together = sample(logits, kinds, list(range(8)))
    for row, chosen in enumerate(kinds):
        assert sample(logits[row : row + 1], [chosen], [row]).tolist() == [together[row].item()]
