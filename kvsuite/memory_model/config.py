"""What memory depends on, read from a preset, a ``config.json`` or an ``mlc-chat-config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.models import smollm2
from kvsuite.models.layers import Layer, ModelLayers, UnknownLayers, layers_of
from kvsuite.models.presets import PRESETS
from kvsuite.models.resolve import ModelSpec, resolve_model

from .fields import checked, positive, unreadable
from .published import find_published
from .weights import CLIP_SIZES, KNOWN_SHAPES, WeightShapes, is_llava, weight_shapes

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
# ends of the names of classes that see what is behind a token
_ENCODERS = ("ForMaskedLM", "ForPreTraining")
_NEEDED = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class Architecture:
    """A decoder as far as its memory goes.

    Parameters
    ----------
    label
        Short name of the model.
    model_type
        transformers' name of the language model's family.
    layers, hidden, intermediate, query_heads, vocabulary
        Of the language model.
    cache
        What each layer stores, or the reason why that is not known.
    weights
        Shapes of all weights, or the reason why they are not known.
    trained_length
        Positions that the configuration promises, ``None`` if it does not say.
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
    vocabulary: int
    cache: ModelLayers | str
    weights: WeightShapes | str
    trained_length: int | None = None
    reads_images: bool = False
    is_dummy: bool = False
    json_chunk: int | None = None
    quantization: str | None = None

    @property
    def shape(self) -> Layer | None:
        """Any layer, where all of them store keys and values of one shape; ``None`` elsewhere."""
        if isinstance(self.cache, str):
            return None
        first = self.cache.layers[0]
        alike = all(
            layer.attention is not None
            and not layer.latent
            and (layer.kv_heads, layer.key_dim, layer.value_dim) == (first.kv_heads, first.key_dim, first.key_dim)
            for layer in self.cache.layers
        )
        return first if alike else None

    @property
    def window(self) -> int | None:
        """The model's own sliding window, the largest of several; ``None`` for none."""
        if isinstance(self.cache, str):
            return None
        return max((layer.window or 0 for layer in self.cache.layers if layer.attention == "sliding"), default=None)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers that store any.

        Raises
        ------
        UserError
            If what the layers store is not known.
        """
        return self._known.kv_bytes([1] * self.layers, element_bytes)

    def kv_bytes(self, tokens: int, element_bytes: int) -> int:
        """Bytes of the keys and values of a text in transformers' cache: a layer with a window stores no more than that.

        Raises
        ------
        UserError
            If what the layers store is not known.
        """
        return self._known.kv_bytes([layer.stored(tokens) for layer in self._known.layers], element_bytes)

    @property
    def _known(self) -> ModelLayers:
        if isinstance(self.cache, str):
            raise UserError(self.cache)
        return self.cache


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
        If a field is missing, or holds what no model can have.
    """
    fields = checked(fields, origin)
    vision = fields.get("vision_config")
    if vision:
        _check_images(fields, vision, origin)
    text = checked(fields["text_config"], origin) if fields.get("text_config") else fields
    # a state-space model has no heads
    needed = (
        [*_NEEDED, "num_attention_heads", "intermediate_size"] if text.get("model_type") in KNOWN_SHAPES else _NEEDED
    )
    missing = [name for name in needed if text.get(name) is None]
    if missing:
        raise UserError(
            f"--kv-model={origin}: its configuration lacks {', '.join(missing)}; give a complete config.json"
        )
    hidden, heads, wide = text["hidden_size"], text.get("num_attention_heads"), text.get("intermediate_size")
    kv_heads = text.get("num_key_value_heads") or heads
    if heads and heads % kv_heads:
        raise unreadable(origin, f"num_attention_heads={heads} cannot share num_key_value_heads={kv_heads}")
    if heads and hidden % heads and text.get("head_dim") is None and not text.get("kv_lora_rank"):
        raise unreadable(
            origin, f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, and no head_dim is given"
        )
    _check_indices(text, origin)
    if isinstance(wide, list) and text["model_type"] in KNOWN_SHAPES:
        raise unreadable(origin, f"intermediate_size={wide} must be one whole number in a {text['model_type']} model")
    if isinstance(wide, list) and len(wide) != text["num_hidden_layers"]:
        raise unreadable(origin, f"intermediate_size has {len(wide)} entries for {text['num_hidden_layers']} layers")
    weights = weight_shapes(fields | {"text_config": text} if text is not fields else text)
    cache = _cache(fields, text, origin)
    return Architecture(
        label=label,
        model_type=text["model_type"],
        layers=text["num_hidden_layers"] if isinstance(cache, str) else len(cache.layers),
        hidden=hidden,
        # what most of the families take that need not say it
        intermediate=max(wide) if isinstance(wide, list) else wide or 4 * hidden,
        query_heads=heads or 0,
        vocabulary=text["vocab_size"],
        cache=cache,
        weights=weights,
        trained_length=positive(text.get("max_position_embeddings")),
        reads_images=bool(vision),
    )


def _check_indices(text: Mapping[str, Any], origin: str) -> None:
    """Refuse what names layers that the model does not have."""
    layers = text["num_hidden_layers"]
    shared = text.get("num_kv_shared_layers") or 0
    if shared >= layers:
        raise unreadable(origin, f"num_kv_shared_layers={shared} leaves no layer of {layers} with a cache of its own")
    for name in ("full_attn_idxs", "attn_layer_indices"):
        if odd := [index for index in text.get(name) or () if not 0 <= index < layers]:
            raise unreadable(origin, f"{name} names layer {odd[0]} of {layers}")
    if odd := [value for value in text.get("no_rope_layers") or () if value not in (0, 1)]:
        raise unreadable(origin, f"no_rope_layers has {odd[0]} where 0 or 1 must stand")


def _cache(fields: Mapping[str, Any], text: Mapping[str, Any], origin: str) -> ModelLayers | str:
    classes = fields.get("architectures") or ()
    if fields.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        return "it is encoder-decoder, no causal language model"
    if any(name.endswith(_ENCODERS) for name in classes) and not text.get("is_decoder"):
        return f"it is an encoder ({', '.join(classes)}), no causal language model with a cache"
    try:
        return layers_of(text)
    except UnknownLayers as reason:
        return f"what the layers store is not known: {reason}"
    except UserError as error:
        raise unreadable(origin, str(error).removesuffix("; check config.json")) from error


def _check_images(fields: Mapping[str, Any], vision: Mapping[str, Any], origin: str) -> None:
    """Check an image encoder as far as it is read: of all, only the shapes of CLIP in LLaVA are."""
    checked({"model_type": vision.get("model_type")}, origin)
    if not is_llava(fields):
        return
    checked(vision, origin)
    wide = vision.get("intermediate_size")
    if isinstance(wide, list):
        raise unreadable(origin, f"intermediate_size={wide} of vision_config must be one whole number")
    missing = [name for name in CLIP_SIZES if vision.get(name) is None]
    if missing:
        raise unreadable(origin, f"vision_config lacks {', '.join(missing)}")


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
    content, inner = checked(content, str(path)), checked(inner, str(path))
    shards = (inner.get("tensor_parallel_shards") or 1) * (inner.get("pipeline_parallel_stages") or 1)
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
    given = {name: value for name, value in inner.items() if value is not None}
    found = read_fields(fields | given, label=spec.label, origin=str(path))
    chunk = content.get("prefill_chunk_size") or inner.get("prefill_chunk_size")
    return replace(found, json_chunk=chunk, quantization=content.get("quantization"))


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
