"""What memory depends on, read from a preset, a ``config.json`` or an ``mlc-chat-config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible
from kvsuite.models import smollm2
from kvsuite.models.presets import PRESETS
from kvsuite.models.resolve import ModelSpec, resolve_model

from .published import find_published
from .weights import WeightShapes, weight_shapes

# of the file that the default model is converted from
_SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_NEEDED = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip

# sizes that may stand in a configuration, each with more than any model has
_SIZES = {
    "num_hidden_layers": 10_000, "hidden_size": 1 << 24, "intermediate_size": 1 << 26, "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16, "head_dim": 1 << 16, "vocab_size": 1 << 28, "patch_size": 1 << 16, "image_size": 1 << 20,
    "prefill_chunk_size": 1 << 30, "tensor_parallel_shards": 1 << 16, "pipeline_parallel_stages": 1 << 16,
}  # fmt: skip
# 0 and -1 stand for none
_LENGTHS = ("max_position_embeddings", "sliding_window")
_LONGEST = 1 << 40


@dataclass(frozen=True)
class Architecture:
    """A decoder as far as its memory goes.

    Parameters
    ----------
    label
        Short name of the model.
    model_type
        transformers' name of the language model's family.
    layers, hidden, intermediate, query_heads, kv_heads, head_dim, vocabulary
        Of the language model.
    weights
        Shapes of all weights, or the reason why they are not known.
    trained_length
        Positions that the configuration promises, ``None`` if it does not say.
    window
        The model's own sliding window, ``None`` for none.
    reads_images
        Whether there is an image encoder.
    is_dummy
        Whether weights are random.
    json_chunk
        ``prefill_chunk_size`` of the model's ``mlc-chat-config.json``, ``None`` if there is none.
    quantization
        Format of MLC weights, ``None`` for others.
    """

    label: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    weights: WeightShapes | str
    trained_length: int | None = None
    window: int | None = None
    reads_images: bool = False
    is_dummy: bool = False
    json_chunk: int | None = None
    quantization: str | None = None

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


def architecture_of(request: str, *, cache_dir: Path | None = None) -> Architecture:
    """Read the architecture of a model; no weights are read or downloaded.

    Parameters
    ----------
    request
        As ``--kv-model`` takes it.
    cache_dir
        Where converted models lie.

    Raises
    ------
    UserError
        If the request is no model, or its configuration cannot be had or lacks a field.
    """
    spec = resolve_model(request, cache_dir=cache_dir)
    if spec.kind == "dummy":
        return replace(read_fields(PRESETS[spec.source], label=spec.source, origin=request), is_dummy=True)
    if spec.kind == "mlc":
        return _mlc(spec)
    if spec.kind == "gguf":
        raise UserError(f"--kv-model={request}: memory is predicted from a config.json; give the folder that holds it")
    path = Path(spec.source) / "config.json"
    if spec.kind == "hub":
        path = _from_hub(spec, "config.json")
    if spec.kind == "smollm2" and not path.is_file():
        # not converted yet, and its shapes are no secret
        return read_fields(_SMOLLM2, label=smollm2.NAME, origin=request)
    label = smollm2.NAME if spec.kind == "smollm2" else spec.label
    return read_fields(_load(path), label=label, origin=str(path))


def read_fields(fields: Mapping[str, Any], *, label: str, origin: str) -> Architecture:
    """Read the fields of a ``config.json``.

    Parameters
    ----------
    fields
        The file's content.
    label
        Name for people.
    origin
        Where it comes from, for messages.

    Raises
    ------
    UserError
        If a field is missing, no number, or a number that no model can have.
    """
    text: Mapping[str, Any] = fields.get("text_config") or fields
    for part in (text, fields.get("vision_config") or {}):
        _require_sizes(part, origin)
    missing = [name for name in _NEEDED if text.get(name) is None]
    if missing:
        raise UserError(
            f"--kv-model={origin}: its configuration lacks {', '.join(missing)}; give a complete config.json"
        )
    try:
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} cannot share num_key_value_heads={kv_heads}")
        if text.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, and no head_dim is given"
            )
        trained, window = text.get("max_position_embeddings"), text.get("sliding_window")
        # Qwen's configurations name a window and say elsewhere that it is off
        uses = text.get("use_sliding_window", True)
        return Architecture(
            label=label,
            model_type=str(text["model_type"]),
            layers=int(text["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(text["intermediate_size"]),
            query_heads=heads,
            kv_heads=kv_heads,
            head_dim=int(text.get("head_dim") or hidden // heads),
            vocabulary=int(text["vocab_size"]),
            weights=weight_shapes(fields),
            trained_length=_positive(trained),
            window=_positive(window) if uses else None,
            reads_images=bool(fields.get("vision_config")),
        )
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"--kv-model={origin}: its configuration cannot be read ({error}); check config.json"
        ) from error


def _require_sizes(fields: object, origin: str) -> None:
    """Refuse sizes that no model can have: each is a whole number, at least 1, and below what any machine could hold.

    Raises
    ------
    UserError
        Naming the field.
    """
    if not isinstance(fields, Mapping):
        raise UserError(
            f"--kv-model={origin}: its configuration cannot be read (a part is no object); check config.json"
        )
    for name, most in _SIZES.items():
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise UserError(
                f"--kv-model={origin}: its configuration cannot be read ({name}={visible(value, VALUE_LIMIT)} must be a whole "
                f"number from 1 to {most}); check config.json"
            )
    for name in _LENGTHS:
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LONGEST):
            raise UserError(
                f"--kv-model={origin}: its configuration cannot be read ({name}={visible(value, VALUE_LIMIT)} must be a whole "
                "number); check config.json"
            )


def _positive(value: Any) -> int | None:
    # MLC writes -1 for none
    return int(value) if value and int(value) > 0 else None


def _mlc(spec: ModelSpec) -> Architecture:
    """MLC weights: a folder, or a hub model that is in the local cache, or one of those that were published with results."""
    published = find_published(spec.source)
    path = Path(spec.source) / "mlc-chat-config.json"
    if not path.is_file():
        if published is not None:
            found = read_fields(PRESETS[published.preset], label=spec.label, origin=spec.request)
            return replace(found, json_chunk=published.json_chunk, quantization=published.quantization)
        path = _from_hub(spec, "mlc-chat-config.json")
    content = _load(path)
    inner = content.get("model_config")
    if not isinstance(inner, dict):
        raise UserError(f"--kv-model={spec.request}: {path} has no model_config; give a folder that gen_config wrote")
    for part in (content, inner):
        _require_sizes(part, str(path))
    shards = int(inner.get("tensor_parallel_shards") or 1) * int(inner.get("pipeline_parallel_stages") or 1)
    if shards != 1:
        raise UserError(
            f"--kv-model={spec.request}: compiled for {shards} GPUs (tensor_parallel_shards, pipeline_parallel_stages), and "
            "memory is predicted for one; give a model compiled for one GPU"
        )
    fields = {
        "model_type": content.get("model_type"),
        "max_position_embeddings": content.get("context_window_size"),
        "sliding_window": content.get("sliding_window_size"),
    }
    found = read_fields(fields | inner, label=spec.label, origin=str(path))
    chunk = content.get("prefill_chunk_size") or inner.get("prefill_chunk_size")
    return replace(found, json_chunk=int(chunk) if chunk else None, quantization=content.get("quantization"))


def _from_hub(spec: ModelSpec, name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec.source, name)
    if not isinstance(found, str):
        raise UserError(
            f"--kv-model={spec.request}: {name} is not in the local hub cache; give dummy:<preset>, a local folder, or run "
            f"once on a connected machine: huggingface-cli download {spec.source} {name}"
        )
    return Path(found)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"--kv-model={path}: cannot be read (nested too deeply); check the file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--kv-model={path}: cannot be read ({error}); check the file") from error
    if not isinstance(content, dict):
        raise UserError(f"--kv-model={path}: is no JSON object; check the file")
    return content
