"""A zoo: tiny models of random weights in the architectures that people have, each with a tokenizer of bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_checkpoint import byte_tokenizer

# what is refused, as the message has it
HOLDS_NONE = "holds no keys and values"
ENCODER = "an encoder, no causal language model"
SEQ2SEQ = "encoder-decoder, no causal language model"
OWN_CACHE = "a cache of its own"
ELSEWHERE = "layers attend through transformers' attention interface"
OUTSIDE = "its tokens meet outside of attention"

#: the length of prompt and continuation is past every window, chunk and switch of the zoo
WINDOW, SWITCH = 16, 24
_VOCABULARY: dict[str, Any] = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
# pad_token_id: several architectures put their own outside of so small a vocabulary
_BASE: dict[str, Any] = _VOCABULARY | {
    "pad_token_id": 0, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 512,
}  # fmt: skip
_HEAD: dict[str, Any] = {"head_dim": 16}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = _EXPERTS | {
    "n_routed_experts": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_STATE: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
_SLIDING_FULL = ["sliding_attention", "full_attention"] * 2


def _gpt2(**config: Any) -> dict[str, Any]:
    """Sizes under the names of GPT-2."""
    return (
        _VOCABULARY | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.15} | config
    )


@dataclass(frozen=True)
class Architecture:
    """One of the zoo.

    Parameters
    ----------
    name
        Of the row.
    kind
        transformers' class names begin with it.
    config
        What its configuration is made from.
    hf, nano
        What the engine refuses it with (a piece of the message); ``None``: it is measured.
    head
        What the name of the model's class ends with.
    configuration
        The name of the configuration's class, ``<kind>Config`` if empty.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(hash=False)
    hf: str | None = None
    nano: str | None = None
    head: str = "ForCausalLM"
    configuration: str = ""

    def configured(self) -> Any:
        """The configuration."""
        import transformers

        return getattr(transformers, self.configuration or f"{self.kind}Config")(**self.config)

    def save(self, folder: Path) -> Path:
        """Make the model, the same one every time, and save it with a tokenizer."""
        import torch
        import transformers

        with torch.random.fork_rng():
            torch.manual_seed(3)
            getattr(transformers, self.kind + self.head)(self.configured()).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder


ZOO: tuple[Architecture, ...] = (
    Architecture("Llama", "Llama", _BASE),
    Architecture(
        "Llama, dynamic rope", "Llama",
        _BASE | {
            "max_position_embeddings": SWITCH,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    Architecture("Mistral, window", "Mistral", _BASE | {"sliding_window": WINDOW}),
    Architecture(
        "Ministral, window", "Ministral",
        _BASE | _HEAD | {"sliding_window": WINDOW, "layer_types": _SLIDING_FULL},
    ),
    Architecture(
        "Mixtral", "Mixtral",
        _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    Architecture("Qwen2", "Qwen2", _BASE),
    Architecture(
        "Qwen2, window", "Qwen2",
        _BASE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    Architecture("Qwen3", "Qwen3", _BASE | _HEAD),
    Architecture("Qwen3-MoE", "Qwen3Moe", _BASE | _HEAD | _EXPERTS | {"num_experts": 4}),
    Architecture(
        "Qwen3-Next", "Qwen3Next",
        _BASE | _HEAD | _EXPERTS | {
            "num_experts": 4, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
        nano=ELSEWHERE,
    ),
    Architecture("Gemma", "Gemma", _BASE | _HEAD),
    Architecture(
        "Gemma 2", "Gemma2",
        _BASE | _HEAD | {"sliding_window": WINDOW, "query_pre_attn_scalar": 16},
        nano="its attention takes softcap",
    ),
    Architecture(
        "Gemma 3", "Gemma3",
        _BASE | _HEAD | {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": _SLIDING_FULL},
        configuration="Gemma3TextConfig",
    ),
    Architecture("Phi", "Phi", _BASE),
    Architecture("Phi-3, window", "Phi3", _BASE | {"sliding_window": WINDOW}),
    Architecture(
        "Phi-3, longrope", "Phi3",
        _BASE | {
            "original_max_position_embeddings": SWITCH,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
                "original_max_position_embeddings": SWITCH, "factor": 512 / SWITCH,
            },
        },
    ),
    Architecture(
        "gpt-oss", "GptOss",
        _BASE | _HEAD | {
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        nano="its attention takes s_aux",
    ),
    Architecture("Cohere", "Cohere", _BASE),
    Architecture("Cohere 2", "Cohere2", _BASE | {"sliding_window": WINDOW, "layer_types": _SLIDING_FULL}),
    Architecture("EXAONE 4", "Exaone4", _BASE | {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    Architecture("SmolLM3", "SmolLM3", _BASE | {"no_rope_layer_interval": 2}),
    Architecture(
        "Llama 4", "Llama4",
        _BASE | _HEAD | {
            "attention_chunk_size": WINDOW, "intermediate_size_mlp": 96, "num_local_experts": 2,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attn_temperature_tuning": False,
        },
        configuration="Llama4TextConfig", nano="chunked attention",
    ),
    Architecture("DeepSeek V2", "DeepseekV2", _BASE | _LATENT, nano="keys and values differ in shape"),
    Architecture("DeepSeek V3", "DeepseekV3", _BASE | _LATENT, nano="keys and values differ in shape"),
    Architecture("OLMo 2", "Olmo2", _BASE),
    Architecture("Granite", "Granite", _BASE),
    Architecture("StableLM", "StableLm", _BASE),
    Architecture("StarCoder2", "Starcoder2", _BASE | {"sliding_window": None}),
    Architecture("OLMo 3, window", "Olmo3", _BASE | {"sliding_window": WINDOW, "layer_types": _SLIDING_FULL}),
    Architecture("GLM-4", "Glm4", _BASE | _HEAD),
    Architecture("Nemotron", "Nemotron", _BASE | {"norm_eps": 1e-5}),
    Architecture(
        "Gemma 3n", "Gemma3n",
        _BASE | _HEAD | {
            "sliding_window": WINDOW, "layer_types": _SLIDING_FULL, "num_kv_shared_layers": 1, "laurel_rank": 8,
            "vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 16,
            "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2,
        },
        configuration="Gemma3nTextConfig",
    ),
    Architecture(
        "GPT-Neo, local attention", "GPTNeo",
        _VOCABULARY | {
            "hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW, "max_position_embeddings": 128, "initializer_range": 0.15,
        },
        nano=ELSEWHERE,
    ),
    Architecture(
        "XGLM", "XGLM",
        _VOCABULARY | {
            "d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 128,
            "pad_token_id": 0, "init_std": 0.15,
        },
        nano=ELSEWHERE,
    ),
    Architecture("GPT-2", "GPT2", _gpt2(), head="LMHeadModel"),
    Architecture("GPT-NeoX", "GPTNeoX", _BASE),
    Architecture("GPT-J", "GPTJ", _gpt2(rotary_dim=8), nano=ELSEWHERE),
    Architecture("CodeGen", "CodeGen", _gpt2(rotary_dim=8), nano=ELSEWHERE),
    Architecture("GPT-BigCode, multi-query", "GPTBigCode", _gpt2(multi_query=True)),
    Architecture(
        "OPT", "OPT",
        _VOCABULARY | {
            "pad_token_id": 0, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 128, "word_embed_proj_dim": 64, "init_std": 0.15,
        },
    ),
    Architecture(
        "BLOOM", "Bloom",
        _VOCABULARY | {"hidden_size": 64, "n_layer": 3, "n_head": 4, "initializer_range": 0.15},
        nano=ELSEWHERE,
    ),
    Architecture(
        "MPT", "Mpt",
        _VOCABULARY | {"d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "initializer_range": 0.15},
        nano=ELSEWHERE,
    ),
    Architecture(
        "Falcon, multi-query", "Falcon",
        _BASE | {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
        nano=ELSEWHERE,
    ),
    Architecture(
        "Falcon, new", "Falcon",
        _BASE | {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
        nano=ELSEWHERE,
    ),
    Architecture(
        "Falcon, ALiBi", "Falcon",
        _BASE | {"multi_query": False, "new_decoder_architecture": False, "alibi": True},
        nano=ELSEWHERE,
    ),
    Architecture(
        "LFM2", "Lfm2",
        _BASE | {
            "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16, "block_auto_adjust_ff_dim": False,
        },
        nano=ELSEWHERE,
    ),
    Architecture(
        "Mamba", "Mamba",
        _VOCABULARY | {"pad_token_id": 0, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 3},
        hf=HOLDS_NONE, nano=HOLDS_NONE,
    ),
    Architecture("Bamba", "Bamba", _BASE | _STATE | {"attn_layer_indices": [1, 3]}, nano=ELSEWHERE),
    Architecture("Falcon-H1", "FalconH1", _BASE | _STATE | _HEAD | {"mamba_d_ssm": 128}, nano=OUTSIDE),
    Architecture(
        "Jamba", "Jamba",
        _BASE | {
            "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8,
        },
        nano=ELSEWHERE,
    ),
    Architecture(
        "Zamba 2", "Zamba2",
        _BASE | {
            "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_expand": 2, "mamba_headdim": 32,
            "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "attention_head_dim": 32,
            "attention_hidden_size": 128,
        },
        nano=ELSEWHERE,
    ),
    Architecture(
        "MiniMax", "MiniMax",
        _BASE | _HEAD | {
            "layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 2,
            "num_experts_per_tok": 1, "block_size": 16,
        },
        hf=OWN_CACHE, nano=ELSEWHERE,
    ),
    Architecture(
        "RecurrentGemma", "RecurrentGemma",
        _BASE | _HEAD | {
            "attention_window_size": WINDOW, "lru_width": 64, "block_types": ["recurrent", "attention"],
            "w_init_variance_scale": 0.5,
        },
        hf=HOLDS_NONE, nano=HOLDS_NONE,
    ),
    Architecture(
        "Mamba 2", "Mamba2",
        _VOCABULARY | {
            "pad_token_id": 0, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 3, "num_heads": 4,
            "head_dim": 32, "n_groups": 1,
        },
        hf=HOLDS_NONE, nano=HOLDS_NONE,
    ),
    Architecture(
        "RWKV", "Rwkv",
        _VOCABULARY | {
            "hidden_size": 64, "num_hidden_layers": 3, "attention_hidden_size": 64, "context_length": 128,
        },
        hf=HOLDS_NONE, nano=HOLDS_NONE,
    ),
    Architecture(
        "BERT", "Bert",
        _BASE | {"max_position_embeddings": 128},
        head="ForMaskedLM", hf=ENCODER, nano=ENCODER,
    ),
    Architecture(
        "T5", "T5",
        {
            "vocab_size": 258, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 257,
        },
        head="ForConditionalGeneration", hf=SEQ2SEQ, nano=SEQ2SEQ,
    ),
)  # fmt: skip
