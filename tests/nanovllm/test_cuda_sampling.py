"""Draws by the kernel against draws by torch. On a CUDA device, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED
from scipy.stats import chisquare

from kvsuite.nanovllm import sampling
from kvsuite.nanovllm.fused_sampling import draw
from kvsuite.nanovllm.sampling import SamplingParameters, sample

pytestmark = pytest.mark.gpu


def _keys(count, drawn):
    return torch.from_numpy(sampling._keys([SamplingParameters(seed=seed).stream for seed in range(count)], drawn)).to(
        DEVICE
    )


@pytest.mark.parametrize("vocabulary", [37, 5000, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_draws_what_torch_draws(vocabulary, dtype):
    count = 3 if INTERPRETED else 200
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(count + 1, vocabulary, generator=generator)).to(DEVICE, dtype)
    rows = torch.randperm(count + 1, generator=generator)[:count].to(DEVICE)
    temperatures = (0.2 + 2 * torch.rand(count, generator=generator)).to(DEVICE)
    keys = _keys(count, [3] * count)
    scores = logits[rows].float() / temperatures[:, None]
    scores -= sampling._exponential(keys, vocabulary).log()
    found = draw(logits, rows, temperatures, keys)
    chosen = scores.gather(1, found[:, None])[:, 0]
    # two of nearly equal score may change places by rounding
    torch.testing.assert_close(chosen, scores.max(dim=1).values, atol=5e-5, rtol=5e-6)
    assert (found == scores.argmax(dim=1)).double().mean() > 0.98


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_frequencies_follow_the_softmax(temperature):
    """Chi-square over successive draws of one seed, and over seeds: p is fixed by the seeds, and not small."""
    logits = torch.tensor([2.0, 1.5, 0.8, -0.3, 0.0, -1.0, 1.1], device=DEVICE)
    expected = (logits.double() / temperature).softmax(-1).cpu().numpy()
    count = 100 if INTERPRETED else 50_000
    repeated = logits.expand(count, -1).contiguous()
    rows, temperatures = torch.arange(count, device=DEVICE), torch.full((count,), temperature, device=DEVICE)
    one = torch.from_numpy(sampling._keys([SamplingParameters(seed=11).stream] * count, range(count))).to(DEVICE)
    for keys in (_keys(count, [0] * count), one):
        found = draw(repeated, rows, temperatures, keys).bincount(minlength=len(expected)).cpu().numpy()
        assert chisquare(found, expected * count).pvalue > 1e-3


def test_every_token_of_a_large_vocabulary_can_win():
    """A token far ahead wins wherever it lies: at both ends of every program's span, and at the very end."""
    vocabulary = 16 * 1024 + 5
    span = -(-vocabulary // 16)
    places = [at for part in range(16) for at in (part * span, min((part + 1) * span, vocabulary) - 1)]
    logits = torch.zeros(len(places), vocabulary, device=DEVICE, dtype=torch.bfloat16)
    logits[torch.arange(len(places)), torch.tensor(places)] = 80.0
    ones = torch.ones(len(places), device=DEVICE)
    found = draw(logits, torch.arange(len(places), device=DEVICE), ones, _keys(len(places), [5] * len(places)))
    assert found.tolist() == places


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
    drawn = [SamplingParameters(temperature=0.7, seed=seed) for seed in range(8)]
    whole = sample(logits, drawn, [4] * 8)
    order = [5, 2, 7, 0]
    assert sample(logits[order], [drawn[row] for row in order], [4] * 4).tolist() == whole[order].tolist()
    # the seeds matter, and so does the count
    assert sample(logits[:1].expand(8, -1).contiguous(), drawn, [4] * 8).unique().numel() > 1
    assert sample(logits[:1].expand(8, -1).contiguous(), drawn[:1] * 8, range(8)).unique().numel() > 1
