"""Checkpoints that nothing can be measured on: every suite says so, in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from strangers import BASE, POINT, SMALL, WINDOWS, measured
from tiny_checkpoint import byte_tokenizer

from kvsuite.errors import UserError

SUITES = {
    "compression": ("baseline", "hf", SMALL),
    "perplexity": ("none", "hf", WINDOWS),
    "dse": ("none-ctx64-pc64-bs01-swoff-sink0", "nano", POINT),
}


def llama(folder: Path, change: Callable[[Any], object], **config: Any) -> Path:
    """A small Llama whose weights are changed before they are saved."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(BASE | config)))
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def one_nan(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight[5, 7] = torch.nan


def near_the_largest_half(model: Any) -> None:
    """All weights are numbers in float16, and no product of theirs is."""
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.mul_(6e4 / weight.abs().max())


def enormous_logits(model: Any) -> None:
    model.lm_head.weight.mul_(1e5)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("change", "config", "options", "reason"),
    [
        (one_nan, {}, {}, "weight model.layers.2.mlp.up_proj.weight is not finite in float32: the checkpoint is damaged"),
        (near_the_largest_half, {}, {"dtype": "float16"}, "losses are not finite: the model overflows in float16; give"),
        (enormous_logits, {}, {}, "nats has no exponential: the model's logits are far too large; check the checkpoint"),
        (lambda model: None, {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}, {}, "embedding has 100 rows: the toke"),
    ],
    ids=["NaN weight", "overflow", "no exponential", "small vocabulary"],
)  # fmt: skip
def test_every_suite_says_why_there_is_no_number(
    change: Callable[[Any], object],
    config: dict[str, Any],
    options: dict[str, str],
    reason: str,
    suite: str,
    tmp_path: Path,
) -> None:
    name, engine, sizes = SUITES[suite]
    record = measured(llama(tmp_path, change, **config), suite, name, engine, **(sizes | options))
    assert record.status == "invalid", record.error
    assert reason in str(record.reason)
    assert record.metrics == {}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_needs_a_tokenizer_to_score_a_text(suite: str, tmp_path: Path) -> None:
    name, engine, sizes = SUITES[suite]
    folder = llama(tmp_path, lambda model: None)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"^--kv-model: the model has no tokenizer, so no text can be scored; give"):
        measured(folder, suite, name, engine, **sizes)
