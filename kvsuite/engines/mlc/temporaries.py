"""Temporary buffers of MLC's compiled functions: which buffers a library holds at once, read off published libraries.

The compiler plans the buffers of each function ahead, for as many tokens as the prefill chunk and as many sequences as the
batch that it compiles for. What is alive together in the largest function are whole rows of the model's two widths, hidden
(h) and intermediate (i): every published size is ``2 * bytes * ((a i + b h) chunk + s h batch)`` with whole a, b and s.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.formats import WeightFormat
from kvsuite.memory_model.prediction import Basis


@dataclass(frozen=True)
class Rows:
    """Rows that are alive together in a library's largest function.

    Parameters
    ----------
    intermediate, hidden
        Of each token of the compiled prefill chunk, of either width.
    sequence
        Of the hidden width, of each sequence: the last states, gathered before the head.
    """

    intermediate: int
    hidden: int
    sequence: int = 0


@dataclass(frozen=True)
class Fit:
    """What was published of one architecture.

    Parameters
    ----------
    shape
        Layers, hidden, intermediate, query heads, KV heads, head_dim, vocabulary: what the libraries were compiled from.
    rows
        By compute dtype.
    formats
        Weight formats whose libraries were published.
    """

    shape: tuple[int, ...]
    rows: dict[str, Rows]
    formats: tuple[str, ...]


#: published with chunks from 1024 to 4096 and batches from 1 to 8
FITS: dict[str, Fit] = {
    "Llama-3-8B": Fit(
        (32, 4096, 14336, 32, 8, 128, 128256),
        {"float16": Rows(5, 2), "float32": Rows(4, 1)},
        ("q0f16", "q3f16_1", "q4f16_1", "q4f32_1"),
    ),
    "Llama-3.2-1B": Fit(
        (16, 2048, 8192, 32, 8, 64, 128256),
        {"float16": Rows(5, 2), "float32": Rows(4, 1)},
        ("q0f16", "q0f32", "q4f16_0", "q4f16_1", "q4f32_1"),
    ),
    "Mistral-7B": Fit((32, 4096, 14336, 32, 8, 128, 32768), {"float16": Rows(5, 1, sequence=1)}, ("q0f16",)),
}
FITTED_CHUNKS = (1024, 4096)
# the engine doubles what the library says, to be safe
_DOUBLED = 2


@dataclass(frozen=True)
class Temporaries:
    """Bytes of the temporary buffers of a library as the engine counts them, doubled.

    Parameters
    ----------
    by_chunk, by_batch
        What grows with the compiled prefill chunk, and what with the batch; ``None`` if not known.
    basis
        How sure they are.
    reason
        Why they are not known.
    """

    by_chunk: float | None
    by_batch: float | None
    basis: Basis
    reason: str | None = None

    @property
    def total(self) -> float | None:
        """Both together."""
        return None if self.by_chunk is None or self.by_batch is None else self.by_chunk + self.by_batch


def temporary_bytes(architecture: Architecture, chosen: WeightFormat, chunk: int, batch: int) -> Temporaries:
    """The temporary buffers of a library.

    Parameters
    ----------
    architecture, chosen
        The model and its weight format.
    chunk, batch
        Prefill chunk and batch that the library is compiled for.
    """
    stored = architecture.shape
    shape = None if stored is None else (
        architecture.layers, architecture.hidden, architecture.intermediate, architecture.query_heads, stored.kv_heads,
        stored.key_dim, architecture.vocabulary,
    )  # fmt: skip
    fit = next((fit for fit in FITS.values() if fit.shape == shape), None)
    if fit is None:
        reason = (
            f"temporary buffers of {architecture.label} can only be read from its compiled library; "
            f"the rows that it holds are known for {', '.join(FITS)}"
        )
        return Temporaries(None, None, "unknown", reason)
    rows = fit.rows.get(chosen.dtype)
    if rows is None:
        reason = f"no library of these shapes was published in {chosen.dtype}"
        return Temporaries(None, None, "unknown", reason)
    inside = chosen.name in fit.formats and FITTED_CHUNKS[0] <= chunk <= FITTED_CHUNKS[1]
    token = rows.intermediate * architecture.intermediate + rows.hidden * architecture.hidden
    size = _DOUBLED * chosen.element_bytes
    return Temporaries(
        size * token * chunk,
        size * rows.sequence * architecture.hidden * batch,
        "fitted" if inside else "extrapolated",
    )
