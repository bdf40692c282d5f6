"""Memory of llama.cpp: weights, the cells that a context has for each sequence, and the logits that it hands out."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.cache_formats.by_layer import kv_bytes
from kvsuite.cache_formats.ggml_format import GGML_TYPES, GgmlFormat, side_bytes
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.design_point import DesignPoint
from kvsuite.memory_model.prediction import (
    KEYS_AND_VALUES,
    Allocation,
    Basis,
    PooledPredictor,
    Prediction,
    Predictor,
    Term,
)
from kvsuite.models.layers import ModelLayers

#: families whose layers all hold keys and values of every token
FAMILIES = ("llama", "qwen2", "qwen3")
#: llama.cpp makes a sequence's cells a multiple of this
CELLS = 256
#: what ``auto`` is here
FULL = GgmlFormat("f16", "f16")
_VECTOR_BYTES = _LOGIT_BYTES = 4
# what the configuration's table of dtypes calls a type; those that are packed are read as float16
_DTYPES = {"f32": "float32", "bf16": "bfloat16"}
_READ_AS = "float16"
_UNPACKED = "f16"


def cells_of(tokens: int) -> int:
    """Cells of a sequence of so many tokens at most."""
    return -(-tokens // CELLS) * CELLS


def cache_bytes(chosen: GgmlFormat, of: ModelLayers, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens of a sequence."""
    return kv_bytes(chosen, of, [tokens] * len(of.layers), tokens, 0)


def matrix_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a matrix that is written in type ``kind``: rows that are no multiple of its block stay in f16."""
    block, _ = GGML_TYPES[kind]
    return rows * side_bytes(_UNPACKED if columns % block else kind, columns)


@dataclass(frozen=True)
class LlamacppMemory(PooledPredictor):
    """Predicts memory of engine `llamacpp`.

    Parameters
    ----------
    architecture
        The model.
    format
        Of keys and values.
    gguf_type
        Of the matrices of a checkpoint that is written; ``None`` where a file has types of its own.
    weights_bytes
        Of the loaded file, ``None`` where it is not loaded.
    """

    architecture: Architecture
    format: GgmlFormat
    gguf_type: str | None
    weights_bytes: int | None = None
    engine: str = "llamacpp"
    share: float = 1.0

    def predict(self, point: DesignPoint) -> Prediction:
        """Weights, cells and logits; what its graphs work in is not known beforehand."""
        weights, allocation, reason = self._weights(), None, self._uncached()
        if reason is None:
            assert not isinstance(self.architecture.cache, str)
            allocation = Allocation(
                blocks=point.max_batch_size * (cells_of(point.context_window_size) // CELLS),
                extra=0,
                block_bytes=cache_bytes(self.format, self.architecture.cache, CELLS),
                dtype=_DTYPES.get(self.format.keys, _READ_AS),
            )
        terms = (
            weights,
            Term(
                "kv_cache", KEYS_AND_VALUES, None if allocation is None else allocation.bytes,
                "unknown" if allocation is None else "exact", ("context_window_size", "max_batch_size"),
                "B 256 ceil(context / 256) L Hkv (bytes of a key and a value)", reason,
            ),
            Term(
                "temporary", "logits", point.max_batch_size * self.architecture.vocabulary * _LOGIT_BYTES, "exact",
                ("max_batch_size",), "B V 4",
            ),
            Term(
                "temporary", "graphs", None, "unknown", ("prefill_chunk_size",), "",
                "what llama.cpp's graphs work in is known when it has made a context (compute_bytes of a record)",
            ),
        )  # fmt: skip
        return Prediction(self.engine, point, terms, allocation)

    def smaller(self) -> list[tuple[str, int, Predictor]]:
        """None: every setting is an axis."""
        return []

    def _weights(self) -> Term:
        known, size, reason = self.architecture.weights, self.weights_bytes, None
        if size is None and self.gguf_type is None:
            reason = "the types of a file's weights are known when it is loaded"
        elif size is None and isinstance(known, str):
            reason = known
        elif size is None and not isinstance(known, str):
            assert self.gguf_type is not None
            ends = 1 if known.tied else 2
            matrices = (*known.matrices, (ends, known.vocabulary, known.hidden))
            size = known.dense * _VECTOR_BYTES + sum(
                count * matrix_bytes(self.gguf_type, rows, columns) for count, rows, columns in matrices
            )
        # Llama 3's rotary factors are written too, and a configuration's shapes have none
        basis: Basis = "rough" if self.weights_bytes is None and self.architecture.model_type == "llama" else "exact"
        return Term(
            "parameters", "weights", size, "unknown" if size is None else basis, (),
            "matrices in --kv-gguf-type, vectors in f32", reason,
        )  # fmt: skip

    def _uncached(self) -> str | None:
        """Why a token's bytes are not known, ``None`` if they are."""
        model = self.architecture
        if isinstance(model.cache, str):
            return model.cache
        if model.model_type not in FAMILIES:
            return f"engine llamacpp takes models of the families {', '.join(FAMILIES)}, and this is {model.model_type}"
        for layer in model.cache.layers:
            if reason := self.format.refused(layer.key_dim, layer.value_dim):
                return reason
        return None
