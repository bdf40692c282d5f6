"""A transformers checkpoint as a GGUF file without a tokenizer: token ids go in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsuite.errors import UserError

from .memory_model import FAMILIES
from .model import refused_family

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# the one family whose queries and keys llama.cpp rotates in neighbouring pairs
_PAIRWISE = "llama"
_BLOCK = 32


def write_gguf(model: Any, config: Any, path: Path, kind: str, request: str) -> None:
    """Write the weights of a transformers model.

    Parameters
    ----------
    model
        In float32, on the CPU.
    config
        Of its language model.
    path
        The file.
    kind
        Of matrices: ``f32``, ``f16`` or ``q8_0`` (f16 where a row is no multiple of its blocks); vectors stay float32.
    request
        What the user typed.

    Raises
    ------
    UserError
        For another family, a weight that its GGUF has no place for, or rotary frequencies that are not written here.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    family = str(config.model_type)
    if family not in FAMILIES:
        raise refused_family(request, family)
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    rope = dict(config.rope_parameters)
    writer = GGUFWriter(path, family)
    writer.add_name(path.stem)
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_tokenizer_model("no_vocab")
    if (factors := _frequency_factors(rope, width, request)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, weight in _weights(model, config):
        place = _place(name, request)
        values: NDArray[Any] = weight.float().numpy()
        if family == _PAIRWISE and place.endswith((".attn_q.weight", ".attn_q.bias", ".attn_k.weight", ".attn_k.bias")):
            values = _pairwise(values, heads if ".attn_q." in place else kv_heads)
        if values.ndim == 1 or kind == "f32":
            writer.add_tensor(place, np.ascontiguousarray(values, dtype=np.float32))
        elif kind == "q8_0" and values.shape[-1] % _BLOCK == 0:
            packed = GGMLQuantizationType.Q8_0
            writer.add_tensor(place, quantize(np.ascontiguousarray(values), packed), raw_dtype=packed)
        else:
            writer.add_tensor(place, values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    for name, weight in model.state_dict().items():
        # where they are tied, llama.cpp takes the embedding for both
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            yield name, weight


def _place(name: str, request: str) -> str:
    if name in _TOP:
        return _TOP[name]
    prefix, _, rest = name.removeprefix("model.layers.").partition(".")
    part, _, kind = rest.rpartition(".")
    if prefix.isdigit() and part in _LAYER and not (part.startswith("mlp.") and kind == "bias"):
        return f"blk.{prefix}.{_LAYER[part]}.{kind}"
    raise UserError(
        f"--kv-model={request}: engine llamacpp has no place for the weight {name}; use --kv-engine=hf, or a .gguf of the model"
    )


def _pairwise(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows in the order in which neighbouring ones are rotated together: transformers rotates halves."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _frequency_factors(rope: Mapping[str, Any], width: int, request: str) -> NDArray[np.float32] | None:
    """What rotary frequencies are divided by, ``[width / 2]``; ``None`` for nothing.

    Raises
    ------
    UserError
        For a way to scale them that is not Llama 3's.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(
            f"--kv-model={request}: rotary frequencies scaled by {kind} are not written to GGUF here; use --kv-engine=hf, or a "
            ".gguf of the model"
        )
    factor, low, high, length = (
        float(rope[name])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    found = []
    for pair in range(0, width, 2):
        wave = 2 * math.pi * float(rope["rope_theta"]) ** (pair / width)
        smooth = min(1.0, max(0.0, (length / wave - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)
