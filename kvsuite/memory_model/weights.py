"""Shapes of a decoder's weights from its configuration, and their bytes in any format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .formats import WeightFormat

Matrix = tuple[int, int, int]
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
#: families of language models whose weights are known
KNOWN_SHAPES = (*_LLAMA_LIKE, "gpt_neox")
#: what the shapes of a CLIP tower follow from
CLIP_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size", "image_size")


@dataclass(frozen=True)
class WeightShapes:
    """The weights of a model, sorted by what a format does to them.

    Parameters
    ----------
    matrices
        Linear layers that a group format packs: ``(count, rows, columns)``, rows out, columns in.
    vocabulary, hidden
        Shape of the embedding table, and of the final layer.
    tied
        Whether these two are one.
    dense
        Elements that no format packs: norms, biases, an image encoder.
    """

    matrices: tuple[Matrix, ...]
    vocabulary: int
    hidden: int
    tied: bool
    dense: int

    @property
    def elements(self) -> int:
        """All weights, tied ones once."""
        packed = sum(count * rows * columns for count, rows, columns in self.matrices)
        return packed + self._ends * self.vocabulary * self.hidden + self.dense

    def bytes(self, chosen: WeightFormat) -> int | None:
        """Bytes of the weights in a format, ``None`` where its layout is not known.

        A packed matrix takes ``rows * (4 * words + s * ceil(columns / group))`` bytes, with s bytes a scale and
        ``ceil(columns / group) * group / values per word`` words of a row; the rest takes its elements.
        """
        if chosen.unknown:
            return None
        size = chosen.element_bytes
        if chosen.group is None:
            return self.elements * size
        spec = chosen.group
        total = sum(count * spec.bytes(rows, columns, size) for count, rows, columns in self.matrices)
        return total + self._ends * self._end_bytes(chosen) + self.dense * size

    def step_bytes(self, chosen: WeightFormat) -> int | None:
        """Bytes that a decode step reads: all but an untied embedding table. ``None`` as in `bytes`."""
        total = self.bytes(chosen)
        return total if total is None or self.tied else total - self._end_bytes(chosen)

    def _end_bytes(self, chosen: WeightFormat) -> int:
        size, spec = chosen.element_bytes, chosen.group
        if spec is None or not spec.ends:
            return self.vocabulary * self.hidden * size
        return spec.bytes(self.vocabulary, self.hidden, size)

    @property
    def _ends(self) -> int:
        return 1 if self.tied else 2


def weight_shapes(fields: Mapping[str, Any]) -> WeightShapes | str:
    """Shapes of the weights of a configuration, or the reason why they are not known.

    Parameters
    ----------
    fields
        Of a ``config.json``, with ``text_config`` and ``vision_config`` where the model reads images.
    """
    if fields.get("text_config"):
        return _with_images(fields)
    model_type = str(fields["model_type"])
    if model_type in _LLAMA_LIKE:
        return _llama_like(fields, model_type)
    if model_type == "gpt_neox":
        return _gpt_neox(fields)
    return f"the weight shapes of {model_type} are not known here; known: {', '.join(KNOWN_SHAPES)}, llava"


def _llama_like(fields: Mapping[str, Any], model_type: str) -> WeightShapes:
    layers, hidden, wide = (int(fields[n]) for n in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    heads = int(fields["num_attention_heads"])
    kv_heads = int(fields.get("num_key_value_heads") or heads)
    head_dim = int(fields.get("head_dim") or hidden // heads)
    queries, keys = heads * head_dim, kv_heads * head_dim
    matrices = (
        (layers, queries, hidden),
        (2 * layers, keys, hidden),
        (layers, hidden, queries),
        (2 * layers, wide, hidden),
        (layers, hidden, wide),
    )
    dense = layers * 2 * hidden + hidden
    if model_type == "qwen2":
        dense += layers * (queries + 2 * keys)
    elif fields.get("attention_bias"):
        dense += layers * (queries + 2 * keys + hidden)
    if fields.get("mlp_bias"):
        dense += layers * (2 * wide + hidden)
    if model_type == "qwen3":
        dense += layers * 2 * head_dim
    tied = bool(fields.get("tie_word_embeddings", False))
    return WeightShapes(matrices, int(fields["vocab_size"]), hidden, tied, dense)


def _gpt_neox(fields: Mapping[str, Any]) -> WeightShapes:
    layers, hidden, wide = (int(fields[n]) for n in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    matrices = ((layers, 3 * hidden, hidden), (layers, hidden, hidden), (layers, wide, hidden), (layers, hidden, wide))
    biases = (3 * hidden + hidden) if fields.get("attention_bias", True) else 0
    dense = layers * (4 * hidden + biases + wide + hidden) + 2 * hidden
    tied = bool(fields.get("tie_word_embeddings", False))
    return WeightShapes(matrices, int(fields["vocab_size"]), hidden, tied, dense)


def is_llava(fields: Mapping[str, Any]) -> bool:
    """Whether it is LLaVA with a CLIP tower, the one model with images whose weights are known."""
    vision = fields.get("vision_config") or {}
    return bool(fields.get("model_type") == "llava" and vision.get("model_type") == "clip_vision_model")


def _with_images(fields: Mapping[str, Any]) -> WeightShapes | str:
    """LLaVA: a language model, a CLIP tower that no format packs, and two layers between them."""
    vision = fields.get("vision_config") or {}
    if not is_llava(fields):
        kinds = f"{fields.get('model_type')} with {vision.get('model_type', 'no image encoder')}"
        return f"the weight shapes of {kinds} are not known here; of models that read images only llava with CLIP is"
    text = weight_shapes(fields["text_config"] | {"tie_word_embeddings": fields.get("tie_word_embeddings", False)})
    if isinstance(text, str):
        return text
    wide, inner, layers = (int(vision[n]) for n in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    patch = int(vision["patch_size"])
    places = (int(vision["image_size"]) // patch) ** 2 + 1
    layer = 4 * (wide * wide + wide) + 2 * wide * inner + inner + wide + 4 * wide
    tower = wide + 3 * patch * patch * wide + places * wide + 4 * wide + layers * layer
    between = ((1, text.hidden, wide), (1, text.hidden, text.hidden))
    dense = text.dense + tower + 2 * text.hidden
    return WeightShapes((*text.matrices, *between), text.vocabulary, text.hidden, text.tied, dense)
