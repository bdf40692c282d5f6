"""What a layer is, against what transformers' own cache holds after one forward pass."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvsuite.errors import UserError
from kvsuite.models.layers import UnknownLayers, layers_of
from kvsuite.models.presets import PRESETS

# GPT-BigCode's module compiles a function in a way that torch is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ALL_HEADS = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 48, "vocab_size": 64}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "q_lora_rank": 24, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

#: kind, fields, position kind, which layers rotate (``None``: all that attend), learned length, switch length
FAMILIES: list[tuple[str, dict[str, Any], str, list[int] | None, int | None, int | None]] = [
    ("llama", SIZES, "rotary", None, None, None),
    ("llama", SIZES | {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}, "rotary", None, None, 32),
    ("gemma2", SIZES | {"head_dim": 8, "sliding_window": 6}, "rotary", None, None, None),
    ("gemma3_text", SIZES | {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 7}, "rotary", None, None, None),
    ("mistral", SIZES | {"sliding_window": 6}, "rotary", None, None, None),
    ("mistral", SIZES | {"sliding_window": None}, "rotary", None, None, None),
    (
        "qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
        "rotary", None, None, None,
    ),
    ("qwen2", SIZES | {"sliding_window": 6}, "rotary", None, None, None),
    ("phi3", SIZES | {"sliding_window": 6}, "rotary", None, None, None),
    (
        "gpt_oss", SIZES | {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
        "rotary", None, None, None,
    ),
    ("cohere2", SIZES | {"sliding_window": 6}, "rotary", [0, 1, 2], None, None),
    ("exaone4", SIZES | {"sliding_window": 6}, "rotary", [0, 1, 2], None, None),
    ("exaone4", SIZES | {"sliding_window": None, "layer_types": ["full_attention"] * 4}, "rotary", None, None, None),
    ("olmo3", SIZES | {"sliding_window": 6}, "rotary", None, None, None),
    ("smollm3", SIZES, "rotary", [0, 1, 2], None, None),
    ("smollm3", SIZES | {"no_rope_layers": [0, 0, 0, 0]}, "none", [], None, None),
    (
        "llama4_text",
        SIZES | {
            "head_dim": 16, "attention_chunk_size": 6, "intermediate_size_mlp": 32, "num_local_experts": 2,
            "moe_layers": [],
        },
        "rotary", [0, 1, 2], None, None,
    ),
    ("deepseek_v2", SIZES | MLA, "rotary", None, None, None),
    ("deepseek_v3", SIZES | MLA, "rotary", None, None, None),
    ("falcon", ALL_HEADS | {"alibi": True, "multi_query": False}, "alibi", [], None, None),
    ("falcon", ALL_HEADS, "rotary", None, None, None),
    ("falcon", ALL_HEADS | {"new_decoder_architecture": True, "num_kv_heads": 2}, "rotary", None, None, None),
    ("gpt_bigcode", GPT, "learned", [], 48, None),
    ("gpt_bigcode", GPT | {"multi_query": False}, "learned", [], 48, None),
    ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "alibi", [], None, None),
    ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 64}, "alibi", [], None, None),
    ("gpt2", GPT, "learned", [], 48, None),
    ("gptj", GPT | {"rotary_dim": 8}, "rotary", None, 48, None),
    ("codegen", GPT | {"rotary_dim": 8}, "rotary", None, 48, None),
    ("opt", ALL_HEADS | {"ffn_dim": 32, "max_position_embeddings": 40, "word_embed_proj_dim": 64}, "learned", [], 40, None),
    ("gpt_neox", ALL_HEADS, "rotary", None, None, None),
    ("lfm2", SIZES | {"full_attn_idxs": [1, 3]}, "rotary", None, None, None),
    ("mamba", {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, "none", [], None, None),
    ("bamba", SIZES | MAMBA | {"attn_layer_indices": [1, 3]}, "rotary", None, None, None),
    (
        "jamba",
        SIZES | {
            "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2,
            "mamba_d_state": 8,
        },
        "none", [], None, None,
    ),
    ("falcon_h1", SIZES | MAMBA | {"mamba_d_ssm": 128}, "rotary", None, None, None),
    (
        "qwen3_next",
        SIZES | {
            "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        },
        "rotary", None, None, None,
    ),
    (
        "gemma3n_text",
        SIZES | {
            "num_hidden_layers": 10, "num_kv_shared_layers": 2, "head_dim": 8, "sliding_window": 6,
            "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "intermediate_size": [32] * 10,
            "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 10,
        },
        "rotary", None, None, None,
    ),
]  # fmt: skip


def _id(value: Any) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("kind", "fields", "positions", "rotating", "learned", "switch"), FAMILIES, ids=_id)
def test_layers_are_what_the_cache_of_transformers_holds(
    kind: str,
    fields: dict[str, Any],
    positions: str,
    rotating: list[int] | None,
    learned: int | None,
    switch: int | None,
) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        output = model(input_ids=torch.arange(3, 13)[None], use_cache=True)
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    if not hasattr(cache, "layers"):
        pytest.skip(f"transformers {transformers.__version__} keeps {kind} in a cache of its own kind")
    stored = [
        (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], getattr(layer, "sliding_window", None))
        if getattr(layer, "keys", None) is not None
        else None
        for layer in cache.layers
    ]
    # older releases make no entry for a last layer that stores nothing
    stored += [None] * (config.num_hidden_layers - len(stored))
    found = layers_of(config.to_dict())
    assert [
        (layer.kv_heads, layer.key_dim, layer.value_dim, layer.window) if layer.attention else None
        for layer in found.layers
    ] == stored
    attending = [layer.index for layer in found.layers if layer.attention]
    assert [layer.index for layer in found.layers if layer.rotary] == (attending if rotating is None else rotating)
    assert (found.positions, found.learned_length, found.switch_length) == (positions, learned, switch)

    # a configuration of older days lacks what the class fills in
    older = {name: value for name, value in config.to_dict().items() if name not in ("layer_types", "no_rope_layers")}
    if "no_rope_layers" not in fields:
        assert layers_of(json.loads(json.dumps(older))) == found


def test_a_language_model_within_a_multimodal_one_is_read() -> None:
    inner = CONFIG_MAPPING["gemma3_text"](**SIZES).to_dict()
    assert layers_of({"model_type": "gemma3", "text_config": inner}) == layers_of(inner)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_read(preset: str) -> None:
    assert (
        len(layers_of(PRESETS[preset]).layers)
        == (PRESETS[preset].get("text_config") or PRESETS[preset])["num_hidden_layers"]
    )


@pytest.mark.parametrize("family", ["rwkv", "xlstm", "recurrent_gemma", "longcat_flash"])
def test_a_family_that_cannot_be_told_is_said_to_be_so(family: str) -> None:
    with pytest.raises(UnknownLayers, match=family):
        layers_of(SIZES | {"model_type": family})


def test_a_word_that_nobody_knows_is_named() -> None:
    with pytest.raises(UnknownLayers, match="spiral_attention"):
        layers_of(SIZES | {"model_type": "llama", "layer_types": ["full_attention"] * 3 + ["spiral_attention"]})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", -1), ("num_hidden_layers", 2.5), ("num_attention_heads", 0), ("num_key_value_heads", 3),
        ("layer_types", "full"), ("layer_types", ["full_attention"]), ("head_dim", "8"), ("sliding_window", -7),
        ("layer_types", [1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_nonsense_is_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        layers_of(SIZES | {"model_type": "mistral", field: value})


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=4) | st.dictionaries(st.text(max_size=3), _SCALARS, max_size=2)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted({kind for kind, *_ in FAMILIES})),
    st.dictionaries(
        st.sampled_from(
            [
                "layer_types", "sliding_window", "sliding_window_pattern", "max_window_layers", "no_rope_layers", "head_dim",
                "num_hidden_layers", "rope_parameters", "rope_scaling", "attn_layer_indices", "full_attn_idxs",
                "num_kv_shared_layers", "attention_types", "per_layer_config", "kv_lora_rank", "attn_config",
                "attn_layer_offset", "layer_rope_theta", "text_config",
            ]
        ),
        _VALUES,
        max_size=3,
    ),
)  # fmt: skip
def test_whatever_a_configuration_holds_it_is_read_or_refused(kind: str, fields: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        layers_of(SIZES | {"model_type": kind, "n_layer": 4, "n_layers": 4, "n_head": 4, "n_heads": 4} | fields)
