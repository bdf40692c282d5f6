"""What each layer of a model is: what it attends to, whether it rotates, and what transformers' cache stores for it.

Read from the configuration alone, without torch. Engines, memory models and policies ask here; nothing else reads
``layer_types``, ``sliding_window`` and their like.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvsuite.errors import UserError

Attention = Literal["full", "sliding", "chunked"]
Positions = Literal["rotary", "alibi", "learned", "none"]


class UnknownLayers(UserError):
    """A family whose layers cannot be told from its configuration; the message says why."""


@dataclass(frozen=True)
class Layer:
    """One layer as its cache sees it.

    Parameters
    ----------
    index
        Counted from 0.
    attention
        What a query may see: everything before it, the last `window` positions, or its chunk of `window` positions.
        ``None`` for a layer that stores no keys and values which grow: linear attention, convolution, state space, or one
        that reads those of another layer.
    window
        Positions a query sees, its own included (sliding); length of a chunk (chunked); else ``None``.
    rotary
        Whether queries and keys are rotated here.
    kv_heads, key_dim, value_dim
        Of what transformers' cache stores; 0 where it stores nothing.
    what
        transformers' word for the layer, for messages.
    recurrent
        Whether it carries a state of its own, beside keys and values or instead of them.
    latent
        Whether what is stored are compressed latents (MLA), not keys and values.
    """

    index: int
    attention: Attention | None
    window: int | None
    rotary: bool
    kv_heads: int
    key_dim: int
    value_dim: int
    what: str
    recurrent: bool = False
    latent: bool = False

    def stored(self, tokens: int) -> int:
        """Tokens that transformers' cache holds of ``tokens``: of a window those that the next query sees beside itself."""
        if self.attention is None:
            return 0
        # GPT-Neo masks its local layers and stores everything
        bounded = self.window is not None and self.window > 1 and self.what != "local"
        return min(tokens, self.window - 1) if bounded and self.window else tokens


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model, and how it knows the order of its tokens.

    Parameters
    ----------
    layers
        In order.
    positions
        ``rotary`` if any layer rotates; ``learned`` also for fixed tables that are added to the embeddings.
    switch_length
        Dynamic NTK and longrope: a longer sequence changes the frequencies of all its positions. ``None`` for others.
    learned_length
        Rows of a table of positions: a longer text has no row. ``None`` where there is no such table.
    """

    layers: tuple[Layer, ...]
    positions: Positions
    switch_length: int | None = None
    learned_length: int | None = None

    @property
    def windows(self) -> tuple[Layer, ...]:
        """Layers that see less than the whole text."""
        return tuple(layer for layer in self.layers if layer.window is not None)

    @property
    def plain(self) -> bool:
        """Whether every layer stores keys and values of one shape, for the whole text, and nothing else."""
        shapes = {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in self.layers}
        return len(shapes) == 1 and all(
            layer.attention == "full" and not layer.recurrent and not layer.latent for layer in self.layers
        )

    def kv_bytes(self, tokens_per_layer: Sequence[int], element_bytes: int) -> int:
        """Bytes of that many tokens in each layer: the sum of ``kv_heads * (key_dim + value_dim) * tokens * element_bytes``.

        The one formula for what is stored, planned and predicted.
        """
        pairs = zip(self.layers, tokens_per_layer, strict=True)
        return element_bytes * sum(
            layer.kv_heads * (layer.key_dim + layer.value_dim) * tokens for layer, tokens in pairs
        )


def layers_of(config: Mapping[str, Any]) -> ModelLayers:
    """Read the layers of a model.

    Parameters
    ----------
    config
        A ``config.json`` or transformers' ``config.to_dict()``; of a multimodal model, its language part is read.

    Raises
    ------
    UnknownLayers
        If the family's layers cannot be told.
    UserError
        If a field holds nonsense; the message names field and value.
    """
    try:
        return _read(config.get("text_config") or config)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"the layers of the model cannot be read ({error}); check config.json") from error


def _read(fields: Mapping[str, Any]) -> ModelLayers:
    family = str(fields.get("model_type") or "")
    if family in _UNTOLD:
        raise UnknownLayers(f"model_type {family!r}: {_UNTOLD[family]}")
    words = _words(fields, family)
    overrides = fields.get("per_layer_config") or {}
    layers = []
    for index, word in enumerate(words):
        own = dict(fields) | dict(overrides.get(str(index)) or overrides.get(index) or {})
        layers.append(_layer(own, family, index, word, words))
    attending = [layer for layer in layers if layer.attention]
    return ModelLayers(
        layers=tuple(layers),
        positions=_positions(fields, family, attending),
        switch_length=_switch_length(fields),
        learned_length=_learned_length(fields, family),
    )


#: families whose cache, or whose number of attentions, the configuration does not tell
_UNTOLD = {
    "hrm_text": "its layers are run several times, each with a cache of its own",
    "longcat_flash": "each of its layers has two attentions",
    "openai-gpt": "its class caches nothing",
    "recurrent_gemma": "it holds no keys and values in a cache, but states in its modules",
    "reformer": "it stores buckets of hashes",
    "rwkv": "it holds no keys and values, but states",
    "xlnet": "it stores hidden states",
    "xlstm": "it holds no keys and values, but states",
    "zamba": "its attention layers share weights and read a width of their own",
}
#: words of `layer_types` whose cache is stored in other forms than keys and values of a token each
_UNTOLD_WORDS = (
    "indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention", "compressed_sparse_attention",
    "heavily_compressed_attention", "minimax_m3_sparse", "reference_sliding_attention", "window_attention",
)  # fmt: skip

_FULL, _SLIDING, _CHUNKED, _LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
_ATTENTION: dict[str, Attention | None] = {
    _FULL: "full", "attention": "full", "global": "full", "hybrid": "full",
    _SLIDING: "sliding", "local": "sliding", "hybrid_sliding": "sliding",
    _CHUNKED: "chunked",
    _LINEAR: None, "mamba": None, "mamba2": None, "recurrent": None, "conv": None, "moe": None, "mlp": None,
}  # fmt: skip
_RECURRENT = (_LINEAR, "mamba", "mamba2", "recurrent", "conv", "hybrid", "hybrid_sliding")
_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba")

#: period of full attention among sliding layers, where the configuration does not say
_PERIODS = {
    "gemma2": 2, "gpt_oss": 2, "vaultgemma": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "exaone4": 4, "exaone_moe": 4,
    "olmo3": 4, "afmoe": 4, "gemma3n_text": 5, "gemma4_text": 6, "gemma4_unified_text": 6,
}  # fmt: skip
#: families that slide only with `use_sliding_window`, and then from layer `max_window_layers` on
_WINDOW_IS_A_CHOICE = (
    "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
#: of them, those whose windows, where used, are in all layers: the class has no `layer_types`
_WINDOW_IN_ALL = ("qwen2_moe", "qwen3_moe")

#: families that rotate in sliding layers alone
_ROTARY_WHERE_SLIDING = ("cohere2", "cohere2_moe", "afmoe")
#: families without positions in attention: their recurrent layers know the order
_NO_POSITIONS = ("jamba", "nemotron_h", "kimi_linear", *_STATE_SPACE)
_LEARNED = {
    "gpt2": "n_positions", "gpt_bigcode": "n_positions", "gpt_neo": "max_position_embeddings", "openai-gpt": "n_positions",
    "opt": "max_position_embeddings", "biogpt": "max_position_embeddings", "ctrl": "n_positions",
}  # fmt: skip
_SINUSOIDAL = ("xglm",)
#: rotary families whose rotations are a table of fixed length
_ROTARY_TABLE = {"gptj": "n_positions", "codegen": "n_positions"}
_ROTARY_TABLE_DEFAULT = 2048
_LEARNED_DEFAULTS = {"openai-gpt": 512, "gpt_neo": 2048, "opt": 2048, "ctrl": 256}

#: families whose keys and values have as many heads as the queries, whatever else the configuration says
_ALL_HEADS = (
    "bloom", "mpt", "gpt2", "gptj", "codegen", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "opt", "biogpt", "xglm", "persimmon",
    "openai-gpt", "ctrl",
)  # fmt: skip


def _words(fields: Mapping[str, Any], family: str) -> list[str]:
    """transformers' word for each layer."""
    for name in ("layer_types", "layers_block_type", "attention_layers"):
        given = fields.get(name)
        if given is None:
            continue
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(w, str) for w in given):
            raise UserError(f"{name}={given!r} must be a list of words, one a layer; check config.json")
        if family != "nemotron_h":
            count = _count(fields)
            if len(given) != count:
                raise UserError(f"{name} has {len(given)} entries for {count} layers; check config.json")
        return [_known(word, name) for word in given]
    if family == "nemotron_h":
        return _nemotron(fields)
    count = _count(fields)
    if family in _FAMILY_WORDS:
        return _FAMILY_WORDS[family](fields, count)
    if family in _STATE_SPACE:
        return [_LINEAR] * count
    if family == "zamba2":
        raise UnknownLayers(f"model_type {family!r}: its configuration lacks layers_block_type")
    if family in _WINDOW_IS_A_CHOICE:
        return _chosen_windows(fields, family, count)
    period = fields.get("sliding_window_pattern") or _PERIODS.get(family)
    if family == "afmoe":
        period = fields.get("global_attn_every_n_layers") or period
    if period and fields.get("sliding_window", 1) is not None:
        return _alternating(period, count)
    # transformers' own rule for classes without `layer_types`
    if _length(fields, "sliding_window"):
        return [_SLIDING] * count
    return [_CHUNKED if _length(fields, "attention_chunk_size") else _FULL] * count


def _alternating(period: int | str, count: int) -> list[str]:
    """Sliding layers with full attention in every ``period``-th; Exaone writes one letter a layer of a period."""
    step = len(period) if isinstance(period, str) else period
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise UserError(f"sliding_window_pattern={period!r} must be a whole number from 1; check config.json")
    return [_SLIDING if (i + 1) % step else _FULL for i in range(count)]


def _chosen_windows(fields: Mapping[str, Any], family: str, count: int) -> list[str]:
    if not fields.get("use_sliding_window") or not _length(fields, "sliding_window"):
        return [_FULL] * count
    first = 0 if family in _WINDOW_IN_ALL else int(fields.get("max_window_layers", 28))
    if family == "smollm3":
        return [_FULL if rotates else _SLIDING for rotates in _rotating(fields, count)]
    return [_SLIDING if i >= first else _FULL for i in range(count)]


def _every(name: str, period: int) -> Callable[[Mapping[str, Any], int], list[str]]:
    """Linear layers with full attention in every n-th."""

    def words(fields: Mapping[str, Any], count: int) -> list[str]:
        step = _size(fields, name, default=period)
        return [_LINEAR if (i + 1) % step else _FULL for i in range(count)]

    return words


def _jamba(fields: Mapping[str, Any], count: int) -> list[str]:
    period, offset = _size(fields, "attn_layer_period", default=8), int(fields.get("attn_layer_offset", 4))
    return [_FULL if i % period == offset else _LINEAR for i in range(count)]


def _bamba(fields: Mapping[str, Any], count: int) -> list[str]:
    chosen = fields.get("attn_layer_indices") or ()
    return [_FULL if i in chosen else _LINEAR for i in range(count)]


def _lfm2(fields: Mapping[str, Any], count: int) -> list[str]:
    chosen = fields.get("full_attn_idxs")
    return [_FULL if chosen is None or i in chosen else "conv" for i in range(count)]


def _gpt_neo(fields: Mapping[str, Any], count: int) -> list[str]:
    pairs = fields.get("attention_types") or [[["global", "local"], count // 2]]
    words = [word for kinds, times in pairs for _ in range(times) for word in kinds]
    if len(words) != count:
        raise UserError(f"attention_types={pairs!r} names {len(words)} layers of {count}; check config.json")
    return words


def _llama4(fields: Mapping[str, Any], count: int) -> list[str]:
    return [_CHUNKED if rotates else _FULL for rotates in _rotating(fields, count)]


def _nemotron(fields: Mapping[str, Any]) -> list[str]:
    letters = {"M": _LINEAR, "E": "moe", "*": _FULL, "-": "mlp"}
    pattern = fields.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or set(pattern) - set(letters):
        raise UserError(f"hybrid_override_pattern={pattern!r} must be letters of M, E, *, -; check config.json")
    return [letters[letter] for letter in pattern]


_FAMILY_WORDS: dict[str, Callable[[Mapping[str, Any], int], list[str]]] = {
    "jamba": _jamba,
    "bamba": _bamba,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2,
    "gpt_neo": _gpt_neo,
    "llama4_text": _llama4,
    "falcon_h1": lambda fields, count: ["hybrid"] * count,
    "granitemoehybrid": lambda fields, count: [_LINEAR] * count,
    "granite_swa": lambda fields, count: [_SLIDING if i % 4 else _FULL for i in range(count)],
    "granitemoe_swa": lambda fields, count: [_SLIDING if i % 4 else _FULL for i in range(count)],
    "cwm": lambda fields, count: [_SLIDING if i % 4 else _FULL for i in range(count)],
    "minimax": lambda fields, count: [_LINEAR if i % 2 else _FULL for i in range(count)],
    "qwen3_next": _every("full_attention_interval", 4),
    "qwen3_5_text": _every("full_attention_interval", 4),
    "qwen3_5_moe_text": _every("full_attention_interval", 4),
    "olmo_hybrid": _every("full_attention_interval", 4),
}


def _known(word: str, name: str) -> str:
    if word in _UNTOLD_WORDS:
        raise UnknownLayers(f"{name} names {word!r}: its cache is no key and value a token")
    if word not in _ATTENTION:
        raise UnknownLayers(f"{name} names {word!r}, which is not known")
    return word


def _layer(fields: Mapping[str, Any], family: str, index: int, word: str, words: list[str]) -> Layer:
    attention = _ATTENTION[word]
    what = {"mamba": _LINEAR, "mamba2": _LINEAR, "attention": _FULL}.get(word, word)
    shared = int(fields.get("num_kv_shared_layers") or 0)
    recurrent = word in _RECURRENT
    if shared and index >= len(words) - shared:
        # it reads keys and values of an earlier layer
        return Layer(index, None, None, False, 0, 0, 0, f"{what}, keys and values of another layer", recurrent)
    if attention is None:
        return Layer(index, None, None, False, 0, 0, 0, what, recurrent)
    window = None
    if attention != "full":
        name = (
            "attention_chunk_size" if attention == "chunked" else "window_size" if word == "local" else "sliding_window"
        )
        defaults = {"gpt_neo": 256, "gpt_oss": 128, "llama4_text": 8192, "gemma3n_text": 512, "gemma4_text": 512}
        window = _size(fields, name, default=defaults.get(family, 4096))
    heads, key_dim, value_dim = _shape(fields, family, word, words)
    return Layer(
        index,
        attention,
        window,
        _rotates(fields, family, index, word, len(words)),
        heads,
        key_dim,
        value_dim,
        what,
        recurrent,
        latent=bool(fields.get("kv_lora_rank")) and _stores_latents(),
    )


def _shape(fields: Mapping[str, Any], family: str, word: str, words: list[str]) -> tuple[int, int, int]:
    """KV heads, width of a stored key, width of a stored value."""
    heads = _size(fields, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    if fields.get("kv_lora_rank"):
        rank, rope = _size(fields, "kv_lora_rank"), _size(fields, "qk_rope_head_dim")
        if _stores_latents():
            return 1, rank, rope
        return heads, _size(fields, "qk_nope_head_dim") + rope, _size(fields, "v_head_dim")
    if family == "mimo_v2_flash":
        prefix = "swa_" if word == _SLIDING else ""
        return (
            _size(fields, f"{prefix}num_key_value_heads", "num_key_value_heads"),
            _size(fields, f"{prefix}head_dim", "head_dim"),
            _size(fields, f"{prefix}v_head_dim", "v_head_dim"),
        )
    width = _own(fields, "head_dim", "attention_head_dim", "kv_channels")
    if width is None:
        hidden = _size(fields, "hidden_size", "n_embd", "d_model", "dim")
        if hidden % heads:
            raise UserError(
                f"hidden size {hidden} is no multiple of {heads} attention heads, and no head_dim is given; check config.json"
            )
        width = hidden // heads
    if family in ("gemma4_text", "gemma4_unified_text") and word == _FULL and "per_layer_config" not in fields:
        width = _size(fields, "global_head_dim", default=512)
        if fields.get("attention_k_eq_v") and fields.get("num_global_key_value_heads"):
            return _size(fields, "num_global_key_value_heads"), width, width
    return _kv_heads(fields, family, heads), width, width


def _kv_heads(fields: Mapping[str, Any], family: str, heads: int) -> int:
    if family in _ALL_HEADS:
        return heads
    if family == "falcon":
        # the new architecture stores every key head as often as queries share it
        many = fields.get("new_decoder_architecture") or not fields.get("multi_query", True)
        return heads if many else 1
    if family == "gpt_bigcode":
        return 1 if fields.get("multi_query", True) else heads
    if family == "dbrx":
        return _size(fields.get("attn_config") or {}, "kv_n_heads", default=1)
    found = _own(fields, "num_key_value_heads")
    if found is None:
        return heads
    if heads % found:
        raise UserError(f"num_attention_heads={heads} cannot share num_key_value_heads={found}; check config.json")
    return found


def _rotates(fields: Mapping[str, Any], family: str, index: int, word: str, count: int) -> bool:
    if _alibi(fields, family) or family in _LEARNED or family in _SINUSOIDAL or family in _NO_POSITIONS:
        return False
    if family in ("exaone4", "exaone_moe"):
        return word == _SLIDING or not _length(fields, "sliding_window")
    if family in _ROTARY_WHERE_SLIDING and not fields.get("force_rope"):
        return word == _SLIDING
    if family in ("smollm3", "llama4_text"):
        return _rotating(fields, count)[index]
    if family == "granitemoehybrid":
        return fields.get("position_embedding_type") == "rope"
    if family == "zamba2":
        return bool(fields.get("use_mem_rope"))
    if family == "olmo_hybrid" and fields.get("rope_parameters", 0) is None:
        return False
    thetas = fields.get("layer_rope_theta")
    if thetas:
        return bool(thetas[index])
    rope = fields.get("rope_parameters")
    # one entry a layer type, ``None`` for one without rotations
    return not (isinstance(rope, Mapping) and word in rope and rope[word] is None)


def _rotating(fields: Mapping[str, Any], count: int) -> list[bool]:
    """Which layers rotate, of families that say it in `no_rope_layers` (1: rotates)."""
    given = fields.get("no_rope_layers")
    if given:
        if len(given) != count:
            raise UserError(f"no_rope_layers has {len(given)} entries for {count} layers; check config.json")
        return [bool(value) for value in given]
    interval = _size(fields, "no_rope_layer_interval", default=4)
    return [bool((i + 1) % interval) for i in range(count)]


def _alibi(fields: Mapping[str, Any], family: str) -> bool:
    if family == "mpt":
        return bool((fields.get("attn_config") or {}).get("alibi", True))
    return family == "bloom" or bool(fields.get("alibi"))


def _positions(fields: Mapping[str, Any], family: str, attending: list[Layer]) -> Positions:
    if not attending:
        return "none"
    if _alibi(fields, family):
        return "alibi"
    if any(layer.rotary for layer in attending):
        return "rotary"
    return "learned" if family in _LEARNED or family in _SINUSOIDAL else "none"


def _learned_length(fields: Mapping[str, Any], family: str) -> int | None:
    if name := _LEARNED.get(family):
        return _size(fields, name, default=_LEARNED_DEFAULTS.get(family, 1024))
    if name := _ROTARY_TABLE.get(family):
        return _size(fields, name, default=_ROTARY_TABLE_DEFAULT)
    if family == "mpt" and not _alibi(fields, family):
        return _size(fields, "max_seq_len", default=2048)
    return None


def _switch_length(fields: Mapping[str, Any]) -> int | None:
    """The shortest length at which frequencies change."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return None
    found = []
    for each in (rope, *rope.values()):
        if not isinstance(each, Mapping):
            continue
        kind = str(each.get("rope_type") or each.get("type") or "default")
        if "dynamic" in kind:
            found.append(_size(fields, "max_position_embeddings", default=2048))
        elif kind in ("longrope", "su"):
            name = "original_max_position_embeddings"
            found.append(_size(each if each.get(name) else fields, name, "max_position_embeddings", default=4096))
    return min(found, default=None)


def _stores_latents() -> bool:
    """Whether the installed transformers caches an MLA model's latents; earlier ones cached the expanded keys and values."""
    return _version(importlib.metadata.version("transformers")) >= _LATENTS_SINCE


_LATENTS_SINCE = (5, 15)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _count(fields: Mapping[str, Any]) -> int:
    return _size(fields, "num_hidden_layers", "n_layer", "n_layers", "num_layers", most=10_000)


def _own(fields: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that is given."""
    for name in names:
        if fields.get(name) is not None:
            return _size(fields, name)
    return None


def _length(fields: Mapping[str, Any], name: str) -> int | None:
    """A length of which 0, -1 and ``null`` mean none."""
    value = fields.get(name)
    if value is None or value in (0, -1):
        return None
    return _size(fields, name)


def _size(fields: Mapping[str, Any], *names: str, default: int | None = None, most: int = 1 << 40) -> int:
    """The first of these fields that is given, a whole number from 1."""
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise UserError(f"{name}={value!r} must be a whole number from 1 to {most}; check config.json")
        return value
    if default is None:
        raise UserError(f"the configuration lacks {' or '.join(names)}; give a complete config.json")
    return default
