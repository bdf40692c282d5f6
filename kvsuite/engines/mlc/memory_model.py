"""Memory of MLC-LLM: the line that its engine prints, term by term, and what it really allocates.

The formulas are those of ``cpp/serve/config.cc`` of mlc_llm. They reproduce every published row; ``MB`` there is MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kvsuite.case import Case
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.design_point import DesignPoint
from kvsuite.memory_model.formats import WeightFormat, mlc_format
from kvsuite.memory_model.prediction import (
    JSON_CHUNK,
    KEYS_AND_VALUES,
    MIB,
    Allocation,
    Basis,
    Part,
    Prediction,
    Predictor,
    Term,
)
from kvsuite.models.layers import Layer
from kvsuite.models.resolve import ModelSpec

from .temporaries import temporary_bytes

PAGE_TOKENS = 16
#: what mlc_llm wants free beside prompt and output of every running request: 10 pages for its jump-forward step, and one
SPARE_TOKENS = 11 * PAGE_TOKENS
_FIXED_WORKSPACE = 48 * MIB
# the line counts 16 bits whatever the weights' dtype
_ESTIMATED_ELEMENT_BYTES = 2
# families whose parameters are laid out as transformers' are; Llama's and Mistral's were compared with published libraries
_SAME_PARAMETERS = ("llama", "mistral", "qwen2", "qwen3")
# model_config.prefill_chunk_size that gen_config writes where nobody gives one: at most this
_JSON_CHUNKS = {"llama": 8192, "mistral": 8192, "gpt_neox": 8192, "qwen2": 2048, "qwen3": 2048}
# families whose configuration in mlc_llm has no window
_NO_WINDOW = ("llama", "qwen2", "qwen3", "gpt_neox")
_SMALLEST_CHUNK = 128


def default_json_chunk(architecture: Architecture) -> int | None:
    """``prefill_chunk_size`` in ``mlc-chat-config.json``: as it is there, else as gen_config would write it.

    ``None`` where neither is known.
    """
    if architecture.json_chunk is not None:
        return architecture.json_chunk
    most = _JSON_CHUNKS.get(architecture.model_type)
    limit = architecture.window if architecture.model_type == "mistral" else None
    limit = limit or architecture.trained_length
    return None if most is None or limit is None else min(most, limit)


def stored_shape(architecture: Architecture) -> Layer | str:
    """Any layer, where MLC stores the same for each; else the reason why what it stores is not known."""
    cache = architecture.cache
    if isinstance(cache, str):
        return cache
    shape = architecture.shape
    kinds = {layer.what for layer in cache.layers}
    if any(layer.latent for layer in cache.layers):
        return "what MLC stores of latent attention (MLA) is not modelled"
    if shape is None or shape.recurrent or any(layer.attention == "chunked" for layer in cache.layers):
        return f"what MLC stores of layers that differ is not modelled ({', '.join(sorted(kinds))})"
    if len(kinds) > 1 and architecture.model_type not in _NO_WINDOW:
        return f"what MLC stores of layers with different windows is not modelled ({', '.join(sorted(kinds))})"
    return shape


def tokens_per_sequence(case: Case) -> int:
    """Tokens that the pages have room for, by request: the context, or what a request and mlc_llm's own rule take."""
    needed = int(case.workload["prompt_tokens"]) + int(case.workload["max_new_tokens"]) + SPARE_TOKENS
    return max(int(case.params["context"]), needed)


def brings_config(spec: ModelSpec) -> bool:
    """Whether a model is MLC weights of the hub: their configuration is taken as it is, that of all others is written."""
    return spec.kind == "mlc" and not Path(spec.source).is_dir()


def point_memory(architecture: Architecture, case: Case, *, writes_config: bool) -> MlcMemory:
    """Predicts the memory of a case's design point as engine `mlc` serves it.

    Parameters
    ----------
    architecture, case
        Model and point.
    writes_config
        Whether ``mlc-chat-config.json`` is written for the point, with its values; else it is the model's own.
    """
    chunk = int(case.params["prefill_chunk"]) if writes_config else None
    return replace(MlcMemory.of(architecture, chunk, per_sequence=True), sequence_tokens=tokens_per_sequence(case))


@dataclass(frozen=True)
class CompileReport:
    """What ``mlc_llm compile`` reports of a library: other numbers than the engine's, for the same memory.

    Parameters
    ----------
    parameters
        Bytes.
    temporary
        Bytes of the largest function, not doubled as the engine does.
    kv_bytes_per_token
        With 4 bytes an element where the format's name has ``f32``.
    """

    parameters: float | None
    temporary: float | None
    kv_bytes_per_token: int


@dataclass(frozen=True)
class MlcMemory:
    """Predicts MLC-LLM's memory of one model on one GPU.

    Parameters
    ----------
    architecture
        The model.
    json_chunk
        ``prefill_chunk_size`` of ``mlc-chat-config.json`` (P), ``None`` if not known. Neither the engine's setting nor the
        compile override changes it.
    per_sequence
        Whether ``max_total_sequence_length`` is the batch times the context; else it is the context, which all sequences
        share, as the original sets it.
    sequence_tokens
        Tokens in the place of the context there, where the engine is given room for more.
    library_bytes
        Temporary buffer of the largest function of the compiled library, where there is one: in the place of fits.
    """

    architecture: Architecture
    json_chunk: int | None = None
    per_sequence: bool = False
    sequence_tokens: int | None = None
    library_bytes: int | None = None
    engine: str = "mlc"
    #: gpu_memory_utilization
    share: float = 0.85

    @classmethod
    def of(cls, architecture: Architecture, json_chunk: int | None = None, *, per_sequence: bool = False) -> MlcMemory:
        """With the chunk given, else that of `default_json_chunk`."""
        chosen = default_json_chunk(architecture) if json_chunk is None else json_chunk
        return cls(architecture, chosen, per_sequence)

    def described(self) -> str:
        chunk = "not known" if self.json_chunk is None else f"{self.json_chunk}"
        total = "batch x context" if self.per_sequence else "context, shared by all sequences"
        return f"engine mlc; prefill_chunk_size of mlc-chat-config.json: {chunk}; max_total_sequence_length: {total}"

    def own_settings(self) -> dict[str, int | None]:
        return {JSON_CHUNK: self.json_chunk}

    def kv_notes(self, point: DesignPoint) -> str:
        if isinstance(self._shape, str):
            return ""
        report = self.compile_report(point)
        return (
            f", {self.architecture.kv_bytes_per_token(2) / 1024:g} KiB in the engine's line, "
            f"{report.kv_bytes_per_token / 1024:g} KiB in the compiler's report"
        )

    def total_tokens(self, point: DesignPoint) -> int:
        """``max_total_sequence_length`` (T) of a point."""
        tokens = self.sequence_tokens or point.context_window_size
        return tokens * (point.max_batch_size if self.per_sequence else 1)

    def predict(self, point: DesignPoint) -> Prediction:
        """Memory of a point.

        Raises
        ------
        UserError
            If MLC has no such weight format.
        """
        chosen = mlc_format(point.quantization)
        terms = (self._weights(chosen), *self._kv_cache(point), *self._temporary(point, chosen))
        return Prediction(self.engine, point, terms, self._allocation(point, chosen), self._notes(point, chosen))

    def compile_report(self, point: DesignPoint) -> CompileReport:
        """What the compiler would say of the library of a point."""
        chosen = mlc_format(point.quantization)
        doubled = temporary_bytes(self.architecture, chosen, point.prefill_chunk_size, point.max_batch_size).total
        size = 4 if "f32" in chosen.name else 2
        return CompileReport(
            self._weights(chosen).bytes,
            None if doubled is None else doubled / 2,
            self.architecture.kv_bytes_per_token(size),
        )

    def capacity(self, point: DesignPoint, usable_bytes: float) -> int | None:
        """Tokens (T) for which the engine would find room by its own estimate, ``None`` if a term is not known.

        0 or less is its "Insufficient GPU memory error", the one check it makes.

        Parameters
        ----------
        point
            Its context does not matter.
        usable_bytes
            Of the card, times ``gpu_memory_utilization``.
        """
        terms = self.predict(point).terms
        fixed = [term.bytes for term in terms if "context_window_size" not in term.settings]
        if any(size is None for size in fixed) or isinstance(self._shape, str):
            return None
        return int((usable_bytes - sum(size or 0 for size in fixed)) // self._estimated_token_bytes)

    def smaller(self) -> list[tuple[str, int, Predictor]]:
        """Smaller chunks in ``mlc-chat-config.json``, by halves."""
        found: list[tuple[str, int, Predictor]] = []
        chunk = (self.json_chunk or 0) // 2
        while chunk >= _SMALLEST_CHUNK:
            found.append((JSON_CHUNK, chunk, replace(self, json_chunk=chunk)))
            chunk //= 2
        return found

    def inert(self) -> dict[str, str]:
        if self.architecture.model_type not in _NO_WINDOW:
            return {}
        reason = f"MLC's configuration of {self.architecture.model_type} models has no such field"
        return dict.fromkeys(("sliding_window_size", "attention_sink_size"), reason)

    @property
    def _shape(self) -> Layer | str:
        return stored_shape(self.architecture)

    @property
    def _estimated_token_bytes(self) -> float:
        return self.architecture.kv_bytes_per_token(_ESTIMATED_ELEMENT_BYTES) + 1.25

    def _weights(self, chosen: WeightFormat) -> Term:
        model = self.architecture
        size, reason = None, chosen.unknown
        if model.reads_images:
            reason = "what MLC stores of an image encoder is not modelled"
        elif model.model_type not in _SAME_PARAMETERS:
            reason = f"how MLC stores the parameters of {model.model_type} is not modelled"
        elif isinstance(model.weights, str):
            reason = model.weights
        elif not reason:
            size = model.weights.bytes(chosen)
        return Term(
            "parameters", "weights", size, _basis(size), ("quantization",), "sum over matrices, by format", reason
        )

    def _kv_cache(self, point: DesignPoint) -> list[Term]:
        chunk, shape, heads = self.json_chunk, self._shape, self.architecture.query_heads
        tokens, batch = self.total_tokens(point), point.max_batch_size
        stored, buffers, reason = None, None, shape if isinstance(shape, str) else None
        if not isinstance(shape, str):
            stored = self.architecture.kv_bytes_per_token(_ESTIMATED_ELEMENT_BYTES) * tokens
            if chunk is not None:
                buffers = 8 * chunk * (heads + 1) + 4 * chunk * shape.key_dim * (heads + shape.kv_heads)
        context = ("context_window_size", "max_batch_size") if self.per_sequence else ("context_window_size",)
        return [
            Term("kv_cache", KEYS_AND_VALUES, stored, _basis(stored), context, "4 D Hkv L T", reason),
            _exact("kv_cache", "bookkeeping of tokens", 1.25 * tokens, context, "1.25 T"),
            _exact("kv_cache", "bookkeeping of sequences", 88 * (batch + 1), ("max_batch_size",), "88 (B + 1)"),
            self._by_json_chunk("kv_cache", "attention buffers", buffers, (), "8 P (Hq + 1) + 4 P D (Hq + Hkv)"),
            _exact("kv_cache", "attention workspace", _FIXED_WORKSPACE, (), "48 MiB"),
        ]

    def _temporary(self, point: DesignPoint, chosen: WeightFormat) -> list[Term]:
        model, chunk, batch, shape = self.architecture, self.json_chunk, point.max_batch_size, self._shape
        states = None
        if chunk is not None and not isinstance(shape, str):
            states = 4 * chunk + 4 * batch + 2 * shape.key_dim * model.query_heads * (2 * chunk + batch)
        logits = 20 * batch + 16.125 * batch * model.vocabulary
        return [
            self._by_json_chunk(
                "temporary", "hidden states", states, ("max_batch_size",), "4 P + 4 B + 2 D Hq (2 P + B)"
            ),
            _exact("temporary", "logits and sampling", logits, ("max_batch_size",), "20 B + 16.125 B V"),
            *self._library(point, chosen),
        ]  # fmt: skip

    def _library(self, point: DesignPoint, chosen: WeightFormat) -> list[Term]:
        name, settings = "functions of the library", ("prefill_chunk_size",)
        if self.library_bytes is not None:
            formula = "2 max, of the compiled library"
            return [Term("temporary", name, 2 * self.library_bytes, "exact", settings, formula, None)]
        found = temporary_bytes(self.architecture, chosen, point.prefill_chunk_size, point.max_batch_size)
        formula = "2 max, fitted: (a i + b h) chunk"
        terms = [Term("temporary", name, found.by_chunk, found.basis, settings, formula, found.reason)]
        if found.by_batch:
            terms.append(
                Term(
                    "temporary",
                    "last states in the library",
                    found.by_batch,
                    found.basis,
                    ("max_batch_size",),
                    "2 max, fitted: h B",
                )
            )
        return terms

    def _by_json_chunk(self, part: Part, name: str, size: float | None, also: tuple[str, ...], formula: str) -> Term:
        reason = self._shape if isinstance(self._shape, str) else None
        if size is None and reason is None:
            reason = (
                f"prefill_chunk_size of mlc-chat-config.json is not known for {self.architecture.model_type}; "
                "give --json-prefill-chunk"
            )
        return Term(part, name, size, _basis(size), (JSON_CHUNK, *also), formula, reason)

    def _allocation(self, point: DesignPoint, chosen: WeightFormat) -> Allocation | None:
        if isinstance(self._shape, str):
            return None
        window = point.has_window and "sliding_window_size" not in self.inert()
        return Allocation(
            blocks=-(-self.total_tokens(point) // PAGE_TOKENS),
            extra=1 + (2 * point.max_batch_size if window else 0),
            block_bytes=PAGE_TOKENS * self.architecture.kv_bytes_per_token(chosen.element_bytes),
            dtype=chosen.dtype,
        )

    def _notes(self, point: DesignPoint, chosen: WeightFormat) -> tuple[str, ...]:
        notes = []
        if point.max_batch_size > 1 and not self.per_sequence:
            notes.append("all sequences share the pages of one context (max_total_sequence_length)")
        if chosen.element_bytes != _ESTIMATED_ELEMENT_BYTES:
            notes.append(f"the engine's line counts 16 bits, {chosen.name} stores keys and values in {chosen.dtype}")
        inert = self.inert()
        if point.has_window and inert:
            notes.append(f"sliding_window_size and attention_sink_size are inert: {inert['sliding_window_size']}")
        elif point.has_window:
            notes.append("the window is real only if mlc-chat-config.json and the library both have it")
        return tuple(notes)


def _exact(part: Part, name: str, size: float, settings: tuple[str, ...], formula: str) -> Term:
    return Term(part, name, size, "exact", settings, formula)


def _basis(size: float | None) -> Basis:
    return "unknown" if size is None else "exact"
