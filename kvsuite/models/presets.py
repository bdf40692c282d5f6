"""Architectures for ``dummy:<preset>``: the published configurations, without weights."""

from __future__ import annotations

import copy
from typing import Any

from kvsuite.errors import UserError


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | scaling


_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(1_000_000.0),
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}

_TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _rope(10_000.0),
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PRESETS: dict[str, dict[str, Any]] = {
    # meta-llama/Meta-Llama-3-8B
    "Llama-3-8B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(500_000.0),
        "tie_word_embeddings": False,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    # meta-llama/Meta-Llama-3-70B
    "Llama-3-70B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(500_000.0),
        "tie_word_embeddings": False,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    # meta-llama/Llama-3.2-1B
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(
            500_000.0,
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        "tie_word_embeddings": True,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    # mistralai/Mistral-7B-v0.3: unlike v0.1 it has no sliding window
    "Mistral-7B": {
        "model_type": "mistral",
        "vocab_size": 32_768,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(1_000_000.0),
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # Qwen/Qwen3-0.6B, Qwen/Qwen3-8B, Qwen/Qwen3-32B
    "Qwen3-0.6B": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Qwen3-32B": _QWEN3
    | {
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    # EleutherAI/pythia-2.8b
    "Pythia-2.8B": {
        "model_type": "gpt_neox",
        "vocab_size": 50_304,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "rope_parameters": _rope(10_000.0, partial_rotary_factor=0.25),
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    # llava-hf/llava-1.5-7b-hf: Vicuna-7B v1.5 behind CLIP ViT-L/14 at 336 pixels
    "LLaVA-1.5-7B": {
        "model_type": "llava",
        "image_token_index": 32_000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": 576,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32_064,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10_000.0),
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32_000,
        },
    },
    # ours, for tests: 4 layers of Llama, 2 KV heads
    "tiny": _TINY,
    # ours, for tests: the same behind a CLIP of one layer, 4 tokens an image
    "tiny-llava": {
        "model_type": "llava",
        "image_token_index": 510,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": 4,
        "tie_word_embeddings": False,
        "text_config": _TINY,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 32,
            "vocab_size": 32_000,
        },
    },
}


def preset_name(text: str) -> str:
    """Return the preset's own spelling of ``text`` (case does not matter).

    Raises
    ------
    UserError
        If there is no such preset; the message lists them.
    """
    for name in PRESETS:
        if name.lower() == text.lower():
            return name
    raise UserError(f"--kv-model=dummy:{text}: unknown preset; choose one of {', '.join(PRESETS)}")


def build_config(preset: str, **overrides: Any) -> Any:
    """Build the transformers configuration of a preset.

    Parameters
    ----------
    preset
        Name of a preset, in any case.
    overrides
        Fields to replace. A dict given for a nested configuration (``text_config``, ``vision_config``) or for
        ``rope_parameters`` is merged into the published one.

    Returns
    -------
    transformers.PreTrainedConfig
        A fresh object.

    Raises
    ------
    UserError
        If the preset is unknown.
    TypeError
        If an override is no field of the configuration: transformers itself would take it and use it nowhere.
    """
    from transformers import AutoConfig

    fields = copy.deepcopy(PRESETS[preset_name(preset)])
    model_type = fields.pop("model_type")
    known = AutoConfig.for_model(model_type).to_dict().keys() | fields.keys()
    if unknown := sorted(overrides.keys() - known):
        raise TypeError(f"{preset}: no such configuration field: {', '.join(unknown)}")
    for name, value in overrides.items():
        merged = isinstance(value, dict) and isinstance(fields.get(name), dict)
        fields[name] = fields[name] | value if merged else value
    return AutoConfig.for_model(model_type, **fields)
