"""What a cache really holds: numbers by hand for well-known models, and tensors of transformers for every kind of layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvsuite.__main__ import main
from kvsuite.engines.mlc.memory_model import MlcMemory
from kvsuite.engines.nano.memory_model import NanoMemory
from kvsuite.errors import UserError
from kvsuite.memory_model.config import Architecture, read_fields
from kvsuite.memory_model.design_point import DesignPoint

CONFIGURATIONS = Path(__file__).parents[1] / "data" / "configurations"
#: of the published configurations: bytes of a token in 16 bits, by hand; tokens of a long text, and layers that hold them all
KNOWN: dict[str, tuple[int, int, int]] = {
    # latents of 512 and rotated keys of 64, in 61 layers; expanded they would be 61 * 128 * (192 + 128) * 2, 71 times as much
    "DeepSeek-V3": (61 * (512 + 64) * 2, 100_000, 61),
    # 8 of 40 heads; three of four layers attend within chunks of 8,192
    "Llama-4-Scout": (48 * 8 * 2 * 128 * 2, 100_000, 12),
    # five of six layers slide over 1,024
    "Gemma-3-27B": (62 * 16 * 2 * 128 * 2, 100_000, 10),
    # 12 of 48 layers attend, the others are linear
    "Qwen3-Next-80B-A3B": (12 * 2 * 2 * 256 * 2, 100_000, 12),
    "Mistral-7B-v0.1": (32 * 8 * 2 * 128 * 2, 20_000, 0),
    # one head for all 71
    "Falcon-7B": (32 * 1 * 2 * 64 * 2, 2_000, 32),
    # every other layer slides over 128
    "gpt-oss-20b": (24 * 8 * 2 * 64 * 2, 100_000, 12),
    "Phi-3-mini-4k": (32 * 32 * 2 * 96 * 2, 4_000, 0),
}  # fmt: skip
WINDOWS = {
    "Llama-4-Scout": 8192,
    "Gemma-3-27B": 1024,
    "Mistral-7B-v0.1": 4096,
    "gpt-oss-20b": 128,
    "Phi-3-mini-4k": 2047,
}
POINT = DesignPoint("none", 4096, 1024, 1)


def published(name: str) -> Architecture:
    path = CONFIGURATIONS / f"{name}.json"
    return read_fields(json.loads(path.read_text()), label=name, origin=str(path))


@pytest.mark.parametrize("name", KNOWN)
def test_bytes_of_well_known_models(name: str) -> None:
    model = published(name)
    token, long, whole = KNOWN[name]
    assert (model.kv_bytes_per_token(2), model.kv_bytes_per_token(4)) == (token, 2 * token)
    # a short text is in all layers
    assert model.kv_bytes(100, 2) == 100 * token
    assert not isinstance(model.cache, str)
    storing = [layer for layer in model.cache.layers if layer.attention]
    bounded = len(storing) - whole
    # a layer with a window holds the window, or one less: the next token brings its own
    window = WINDOWS.get(name, 0)
    layer = token // len(storing)
    bounds = [layer * (whole * long + bounded * (window - one)) for one in (0, 1)]
    assert model.kv_bytes(long, 2) in bounds


@pytest.mark.parametrize("name", KNOWN)
def test_they_are_predicted_or_the_reason_is_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((CONFIGURATIONS / f"{name}.json").read_text())
    for engine in ("nano", "mlc"):
        assert main(["predict", "--model", str(tmp_path), "--engine", engine, "--space", "ctx=1024"]) == 0
        out = capsys.readouterr().out
        assert "1 points in" in out
        if name in ("DeepSeek-V3", "Qwen3-Next-80B-A3B", "Llama-4-Scout"):
            assert "n/a" in out.split("keys and values  ")[1].split("\n")[0]
            assert f": {KNOWN[name][0] / 1024:g} KiB a token in transformers' cache in 16 bits" in out


@pytest.mark.parametrize(
    ("name", "nano", "mlc"),
    [
        ("DeepSeek-V3", "attends to latents", "latent attention"),
        ("Qwen3-Next-80B-A3B", "(linear_attention) is not one of keys and values of its own", "layers that differ"),
        (
            "Llama-4-Scout",
            "attends by chunks",
            "layers that differ is not modelled (chunked_attention, full_attention)",
        ),
        ("Gemma-3-27B", None, "layers with different windows"),
        ("Mistral-7B-v0.1", None, None),
    ],
)
def test_what_an_engine_does_not_store_like_this_has_a_reason(name: str, nano: str | None, mlc: str | None) -> None:
    model = published(name)
    pools = (NanoMemory(model), POINT, nano), (MlcMemory.of(model), DesignPoint("q4f16_1", 4096, 1024, 1), mlc)
    for predictor, point, reason in pools:
        found = predictor.predict(point)
        (term,) = [term for term in found.terms if term.name == "keys and values"]
        if reason is None:
            assert found.allocation is not None
            assert found.allocation.block_bytes == 16 * model.kv_bytes_per_token(2)
        else:
            assert (term.bytes, found.allocation, found.needed) == (None, None, None)
            assert reason in str(term.reason)


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "q_lora_rank": 24, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 48, "vocab_size": 64}
FALCON = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", SIZES),
    "latent": ("deepseek_v3", SIZES | MLA),
    "multi-query of Falcon": ("falcon", FALCON),
    "all heads of Falcon": ("falcon", FALCON | {"multi_query": False}),
    "new Falcon": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "multi-query of StarCoder": ("gpt_bigcode", GPT),
    "GPT-2": ("gpt2", GPT),
    "sliding": ("mistral", SIZES | {"sliding_window": 6}),
    "sliding and full": ("gemma3_text", SIZES | {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 7}),
    "chunked and full": (
        "llama4_text",
        SIZES | {
            "head_dim": 16, "attention_chunk_size": 6, "intermediate_size_mlp": 32, "num_local_experts": 2, "moe_layers": [],
        },
    ),
    "convolution": ("lfm2", SIZES | {"full_attn_idxs": [1, 3]}),
    "linear": (
        "qwen3_next",
        SIZES | {
            "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "shared": (
        "gemma3n_text",
        SIZES | {
            "head_dim": 16, "sliding_window": 6, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_is_what_the_tensors_take(kind: str, tokens: int) -> None:
    import torch

    family, fields = KINDS[kind]
    config = CONFIG_MAPPING[family](**fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        cache = model(input_ids=torch.arange(tokens)[None] % 60 + 3, use_cache=True).past_key_values
    stored = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    real = sum(part.numel() * part.element_size() for layer in stored for part in (layer.keys, layer.values))
    predicted = read_fields(json.loads(config.to_json_string(use_diff=False)), label="x", origin="x")
    assert predicted.kv_bytes(tokens, 4) == real


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "rwkv"}, "what the layers store is not known: model_type 'rwkv'"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "it is encoder-decoder, no causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "it is an encoder"),
    ],
)
def test_what_has_no_cache_that_is_known_has_a_reason_and_no_number(fields: dict[str, Any], reason: str) -> None:
    model = read_fields(SIZES | fields, label="x", origin="x")
    assert reason in str(model.cache)
    with pytest.raises(UserError, match=r"it is|what the layers"):
        model.kv_bytes_per_token(2)
    for predictor in (NanoMemory(model), MlcMemory.of(model, 1024)):
        found = predictor.predict(DesignPoint("q4f16_1", 4096, 1024, 1))
        assert found.part("kv_cache") is None
        assert any(reason in said for said in found.reasons)
