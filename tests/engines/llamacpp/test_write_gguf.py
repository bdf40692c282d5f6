"""Checkpoints written to GGUF: llama.cpp computes what transformers does, from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llamacpp_sessions import needs_library

from kvsuite.cache_formats.ggml_format import GgmlFormat
from kvsuite.engines.llamacpp.context import Context, ContextSettings
from kvsuite.engines.llamacpp.library import library
from kvsuite.engines.llamacpp.model import Model
from kvsuite.engines.llamacpp.scoring import logits_of
from kvsuite.engines.llamacpp.write_gguf import write_gguf
from kvsuite.errors import UserError
from kvsuite.models.presets import build_config

TOKENS = [(7 * index + index * index) % 512 for index in range(40)]
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def made(family: str, **given: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(SHAPE | {"tie_word_embeddings": False} | given))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def losses_of(path: Path, tokens: list[int]) -> torch.Tensor:
    model = Model(library(), path, str(path))
    settings = ContextSettings(
        tokens=64, batch=16, micro_batch=16, format=GgmlFormat("f32", "f32"), flash_attention="off", threads=1
    )
    context = Context(model, model.of_layers, settings)
    try:
        return torch.cat(list(logits_of(context, tokens, len(tokens)))).log_softmax(-1)
    finally:
        context.close()
        model.close()


@needs_library
@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "attention_bias": True}),
        ("qwen2", {"head_dim": 16}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "llama3, tied, with biases", "qwen2", "qwen3, tied"],
)
def test_llama_cpp_computes_what_transformers_does(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = made(family, **given)
    for name, weight in model.named_parameters():
        # vectors are 0 or 1 when they are made, and would hide what is left out
        if weight.ndim == 1:
            weight.data.uniform_(0.5, 1.5) if "norm" in name else weight.data.uniform_(-1, 1)
    write_gguf(model, model.config, tmp_path / "one.gguf", "f32", family)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    torch.testing.assert_close(losses_of(tmp_path / "one.gguf", TOKENS), expected, rtol=0, atol=1e-3)


@needs_library
def test_eight_bit_and_half_weights_are_near_and_smaller(tmp_path: Path) -> None:
    model = made("llama")
    for kind in ("f32", "f16", "q8_0"):
        write_gguf(model, model.config, tmp_path / f"{kind}.gguf", kind, "llama")
    sizes = {kind: (tmp_path / f"{kind}.gguf").stat().st_size for kind in ("f32", "f16", "q8_0")}
    assert sizes["q8_0"] < sizes["f16"] < sizes["f32"]
    exact = losses_of(tmp_path / "f32.gguf", TOKENS)
    errors = {
        kind: float((losses_of(tmp_path / f"{kind}.gguf", TOKENS) - exact).abs().max()) for kind in ("f16", "q8_0")
    }
    assert 0 < errors["f16"] < errors["q8_0"] < 0.1


@pytest.mark.parametrize(
    ("family", "given", "reason"),
    [
        ("mistral", {"sliding_window": None}, "this is mistral; use --kv-engine=hf"),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "linear"}}, "scaled by linear are not written"),
        ("llama", {"mlp_bias": True}, "no place for the weight model.layers.0.mlp.gate_proj.bias"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(
    family: str, given: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = made(family, **given)
    with pytest.raises(UserError, match=reason):
        write_gguf(model, model.config, tmp_path / "one.gguf", "f32", family)


def test_presets_of_other_families_are_refused_before_weights_are_made(tmp_path: Path) -> None:
    from kvsuite.engines.llamacpp.source import gguf_source

    assert build_config("Pythia-2.8B").model_type == "gpt_neox"
    with pytest.raises(UserError, match="families llama, qwen2, qwen3, and this is gpt_neox"):
        gguf_source("dummy:Pythia-2.8B", "f16", seed=0, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
