"""The fields of a configuration that memory depends on: each is checked once, here, where it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible

#: what a family calls a field, by the name that most have; the first that is there counts
ALIASES: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx"),
}

# sizes, each with more than any model has
_SIZES = {
    "num_hidden_layers": 10_000, "hidden_size": 1 << 24, "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16,
    "num_kv_heads": 1 << 16, "head_dim": 1 << 16, "attention_head_dim": 1 << 16, "kv_channels": 1 << 16,
    "global_head_dim": 1 << 16, "num_global_key_value_heads": 1 << 16, "v_head_dim": 1 << 16, "qk_rope_head_dim": 1 << 16,
    "swa_num_key_value_heads": 1 << 16, "swa_head_dim": 1 << 16, "swa_v_head_dim": 1 << 16, "kv_n_heads": 1 << 16,
    "vocab_size": 1 << 28, "patch_size": 1 << 16, "image_size": 1 << 20, "prefill_chunk_size": 1 << 30,
    "tensor_parallel_shards": 1 << 16, "pipeline_parallel_stages": 1 << 16, "full_attention_interval": 10_000,
    "attn_layer_period": 10_000, "no_rope_layer_interval": 10_000, "attention_chunk_size": 1 << 40, "window_size": 1 << 40,
}  # fmt: skip
# sizes that may be 0
_COUNTS = {
    "num_kv_shared_layers": 10_000, "max_window_layers": 10_000, "attn_layer_offset": 10_000, "qk_nope_head_dim": 1 << 16,
    "kv_lora_rank": 1 << 24, "q_lora_rank": 1 << 24,
}  # fmt: skip
# 0 and -1 stand for none
_LENGTHS = ("max_position_embeddings", "sliding_window", "context_window_size", "sliding_window_size")
_LONGEST = 1 << 40
_FLAGS = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "multi_query", "new_decoder_architecture",
    "alibi", "is_encoder_decoder", "is_decoder", "attention_k_eq_v", "force_rope", "use_mem_rope",
)  # fmt: skip
_WORDS = ("layer_types", "layers_block_type", "attention_layers", "architectures")
_NUMBERS = ("full_attn_idxs", "attn_layer_indices", "no_rope_layers")
_OBJECTS = ("text_config", "vision_config", "attn_config", "rope_scaling", "rope_parameters", "per_layer_config")
_WIDEST = 1 << 26
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")

Check = Callable[[Any], bool]


def _between(least: int, most: int) -> Check:
    return lambda value: _is_whole(value) and least <= value <= most


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _all(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _checks() -> dict[str, tuple[Check, str]]:
    """By field: what it must be, and that in words. ``null`` is as good as no field."""
    found: dict[str, tuple[Check, str]] = {}
    for name, most in _SIZES.items():
        found[name] = _between(1, most), f"a whole number from 1 to {most}"
    for name, most in _COUNTS.items():
        found[name] = _between(0, most), f"a whole number from 0 to {most}"
    for name in _LENGTHS:
        found[name] = _between(-1, _LONGEST), f"a whole number from 1 to {_LONGEST}, or null, 0 or -1 for none"
    for name in _FLAGS:
        found[name] = (lambda value: isinstance(value, bool)), "true or false"
    for name in _WORDS:
        found[name] = _all(lambda value: isinstance(value, str)), "a list of words"
    for name in _NUMBERS:
        found[name] = _all(_is_whole), "a list of whole numbers"
    for name in _OBJECTS:
        found[name] = (lambda value: isinstance(value, Mapping)), "an object"
    wide = _between(1, _WIDEST)
    found["intermediate_size"] = (
        lambda value: wide(value) or (_all(wide)(value) and bool(value)),
        f"a whole number from 1 to {_WIDEST}, or a list of them, one a layer",
    )
    for name in ("model_type", "quantization"):
        found[name] = (
            (lambda value: isinstance(value, str) and _NAME.fullmatch(value) is not None),
            "a name of letters, digits, _, - and ., a letter first",
        )
    for name, others in ALIASES.items():
        found |= dict.fromkeys(others, found[name])
    return found


_CHECKS = _checks()


def checked(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A configuration whose fields are what they must be, those of `ALIASES` also under the name that most families have.

    Parameters
    ----------
    fields
        Of a ``config.json``, or of a part of one.
    origin
        The file, for messages.

    Raises
    ------
    UserError
        Naming file, field and value.
    """
    for name, value in fields.items():
        check, must = _CHECKS.get(name, (None, ""))
        if check is not None and value is not None and not check(value):
            raise unreadable(origin, f"{name}={_shown(value)} must be {must}")
    found = dict(fields)
    for name, others in ALIASES.items():
        if found.get(name) is None:
            found[name] = next((fields[other] for other in others if fields.get(other) is not None), None)
    return found


def unreadable(origin: str, what: object) -> UserError:
    """The one line for a configuration that cannot be used."""
    return UserError(f"--kv-model={origin}: its configuration cannot be read ({what}); correct it there")


def positive(value: int | None) -> int | None:
    """A length, ``None`` where it says none."""
    return value if value is not None and value > 0 else None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return visible(value, VALUE_LIMIT)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
