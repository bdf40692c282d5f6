"""Seeded draws: right frequencies, and nothing else in the batch matters."""

from __future__ import annotations

import math

import pytest
import torch
from decoders import greedy, loaded, prompts, text
from serving import serving

from kvsuite.errors import UserError
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.sampling import SamplingParameters, sample


def draws(logits: torch.Tensor, count: int, **parameters: float | int) -> list[int]:
    chosen = SamplingParameters(**parameters)  # type: ignore[arg-type]
    return [int(sample(logits[None], [chosen], [i])[0]) for i in range(count)]


def test_frequencies_are_those_of_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -9.0])
    temperature, count = 0.7, 4000
    expected = (logits / temperature).softmax(-1)
    found = torch.tensor(draws(logits, count, temperature=temperature, seed=3)).bincount(minlength=5) / count
    # four standard deviations of a binomial count
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()


def test_successive_draws_and_seeds_are_independent() -> None:
    logits = torch.zeros(2)
    bits = torch.tensor([draws(logits, 300, temperature=1.0, seed=seed) for seed in range(20)]).float()
    for pair in ((bits[:, 1:], bits[:, :-1]), (bits[1:], bits[:-1])):
        agreement = (pair[0] == pair[1]).float().mean()
        assert abs(float(agreement) - 0.5) < 4 * 0.5 / math.sqrt(pair[0].numel())


def test_first_tokens_of_50000_neighbouring_seeds_are_independent() -> None:
    """The tokens have their probabilities, and neighbours agree as often as strangers; every statistic in sigmas."""
    seeds, vocabulary, temperature = 50_000, 512, 0.5
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([
        sample(
            logits.expand(1000, vocabulary),
            [SamplingParameters(temperature=temperature, seed=first + k) for k in range(1000)],
            [0] * 1000,
        )
        for first in range(0, seeds, 1000)
    ])  # fmt: skip
    p = (logits.double() / temperature).softmax(-1)
    # tokens that are expected less than five times are one cell
    often = p * seeds >= 5
    counts, expected = tokens.bincount(minlength=vocabulary).double(), p * seeds
    rest = torch.stack([counts[~often].sum(), expected[~often].sum()])
    observed, expected = torch.cat([counts[often], rest[:1]]), torch.cat([expected[often], rest[1:]])
    freedom = len(observed) - 1
    assert abs(float(((observed - expected) ** 2 / expected).sum()) - freedom) < 4 * math.sqrt(2 * freedom)
    same = float((p**2).sum())
    for lag in (1, 2, 3, 4, 8, 16, 256, 4096):
        agreeing = int((tokens[lag:] == tokens[:-lag]).sum())
        pairs = seeds - lag
        assert abs(agreeing - pairs * same) < 4 * math.sqrt(pairs * same * (1 - same)), lag


def test_truncation() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, 300, temperature=1.0, top_k=2)) == {0, 1}
    assert set(draws(logits, 300, temperature=1.0, top_p=0.5)) == {0}
    assert set(draws(logits, 300, temperature=1.0, top_p=0.51)) == {0, 1}
    assert set(draws(logits, 400, temperature=1.0, top_k=3, top_p=0.9)) == {0, 1, 2}
    assert set(draws(logits, 30, temperature=1.0, top_k=1)) == {0}


def test_a_row_is_drawn_without_regard_to_others() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    chosen = [
        SamplingParameters(temperature=0.9, seed=1),
        SamplingParameters(),
        SamplingParameters(temperature=1.5, seed=1, top_k=20),
        SamplingParameters(temperature=0.2, seed=7, top_p=0.8),
        SamplingParameters(),
        SamplingParameters(temperature=3.0, seed=9),
    ]
    drawn = [0, 4, 2, 2, 0, 77]
    together = sample(logits, chosen, drawn).tolist()
    order = [3, 5, 0, 2, 4, 1]
    assert sample(logits[order], [chosen[i] for i in order], [drawn[i] for i in order]).tolist() == [
        together[i] for i in order
    ]
    alone = [int(sample(logits[i : i + 1], chosen[i : i + 1], drawn[i : i + 1])[0]) for i in range(6)]
    assert alone == together
    assert [together[1], together[4]] == [int(logits[1].argmax()), int(logits[4].argmax())]


def test_a_request_draws_the_same_alone_in_company_and_after_preemption() -> None:
    of = loaded("llama")
    chosen = SamplingParameters(max_new_tokens=20, temperature=0.8, top_p=0.95, seed=11, ignore_eos=True)
    with serving(of) as runtime:
        [alone] = runtime.run([Request(text(20), chosen)])
    with serving(of, block_size=4, num_blocks=24, prefix_caching=False) as runtime:
        others = [greedy(prompt, 20) for prompt in prompts((9, 13, 17))]
        same = Request(text(20), chosen)
        another = Request(text(20), SamplingParameters(max_new_tokens=20, temperature=0.8, top_p=0.95, seed=12))
        runtime.run([*others, same, another])
        assert same.preemptions > 0
    assert same.output == alone.output
    assert another.output != alone.output


def test_forks_go_different_ways() -> None:
    of = loaded("llama")
    with serving(of, block_size=4) as runtime:
        first = runtime.add(greedy(text(10), 12))
        runtime.step()
        forks = [
            runtime.fork(first, SamplingParameters(max_new_tokens=12, temperature=2.0, seed=seed, ignore_eos=True))
            for seed in range(3)
        ]
        # 3 blocks, the last of them half full: shared until the next token
        assert runtime.tables[0].pool.used == 3
        runtime.step()
        assert runtime.tables[0].pool.used == 2 + 4
        runtime.run()
    with serving(of) as runtime:
        [alone] = runtime.run([greedy(text(10), 12)])
    assert first.output == alone.output
    assert len({tuple(fork.output) for fork in forks}) == 3
    assert all(fork.output[:1] == first.output[:1] and fork.output_length == 12 for fork in forks)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option}="):
        SamplingParameters(**{option: value})  # type: ignore[arg-type]
