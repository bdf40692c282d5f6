"""Models as strangers have them, made and measured as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from synthetic_session import ENVIRONMENT
from tiny_checkpoint import byte_tokenizer

from kvsuite.engines.registry import SessionPool
from kvsuite.measure.runner import CaseRunner
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.record import Record
from kvsuite.suites.registry import cases_of, suite_named

BASE: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 512, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 0,
}  # fmt: skip
TEXT = (
    "The harbour town grew slowly around the old customs house, and each winter the fishermen repaired their nets beneath "
    "its arches. A clock with one hand told them when the tide would turn. In the year of the great frost the sea froze as "
    "far as the second buoy; children walked out to touch it, and came back with blue fingers and many stories. "
)
IDS = list(TEXT.encode()[:121])
SMALL = {"max_tokens": "65", "prompt_tokens": "48", "max_new_tokens": "4"}
POINT = {
    "context_window_size": "64",
    "prefill_chunk_size": "64",
    "max_batch_size": "1",
    "eval_tokens": "100",
    "max_new_tokens": "4",
}
WINDOWS = {"max_length": "64", "stride": "32", "eval_tokens": "100", "prompt_tokens": "48", "max_new_tokens": "4"}


def save(folder: Path, kind: str, **config: Any) -> Path:
    """A model of random weights with a tokenizer of bytes."""
    torch.manual_seed(3)
    made = getattr(transformers, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")(**config)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(made)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def measured(folder: Path, suite: str, name: str, engine: str = "hf", **options: str) -> Record:
    """The record of one case of a suite."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    given = {
        "model": str(folder), "device": "cpu", "engine": engine, "rounds": "1", "num_warmup": "0", "threads": "1",
        "corpus": str(text), "dataset": str(text),
    }  # fmt: skip
    resolved = default_options(**(given | options))
    sessions = SessionPool(threads=1)
    runner = CaseRunner(
        options=resolved, registry=MetricRegistry(), environment=ENVIRONMENT, sessions=sessions, suite=suite_named
    )
    [case] = [case for case in cases_of(suite, resolved) if case.name == name or case.name.endswith(f"-{name}")]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvsuite.meters.bandwidth.copy_bandwidth", lambda device: 1e10)
            return runner.run(case, f"tests::{case.id}").record
    finally:
        sessions.close()
