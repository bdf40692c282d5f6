"""Temporary buffers of MLC's compiled functions: not derivable from an architecture, fitted to published libraries."""

from __future__ import annotations

from dataclasses import dataclass

from .config import Architecture
from .formats import WeightFormat
from .prediction import MIB, Basis


@dataclass(frozen=True)
class Fit:
    """Coefficients of one architecture.

    Parameters
    ----------
    shape
        Layers, hidden, intermediate, query heads, KV heads, head_dim, vocabulary: what the libraries were compiled from.
    mib_per_token
        MiB of each token of the compiled prefill chunk, by compute dtype; the engine's factor 2 is in.
    formats
        Weight formats whose libraries were published.
    """

    shape: tuple[int, ...]
    mib_per_token: dict[str, float]
    formats: tuple[str, ...]


#: published with chunks from 1024 to 4096; linear in them to the last digit, Mistral's to 0.13 MiB
FITS: dict[str, Fit] = {
    "Llama-3-8B": Fit(
        (32, 4096, 14336, 32, 8, 128, 128256),
        {"float16": 0.3046875, "float32": 0.46875},
        ("q0f16", "q3f16_1", "q4f16_1", "q4f32_1"),
    ),
    "Llama-3.2-1B": Fit(
        (16, 2048, 8192, 32, 8, 64, 128256),
        {"float16": 0.171875, "float32": 0.265625},
        ("q0f16", "q0f32", "q4f16_0", "q4f16_1", "q4f32_1"),
    ),
    "Mistral-7B": Fit((32, 4096, 14336, 32, 8, 128, 32768), {"float16": 0.2890625}, ("q0f16",)),
}
FITTED_CHUNKS = (1024, 4096)


def temporary_bytes(
    architecture: Architecture, chosen: WeightFormat, chunk: int
) -> tuple[float | None, Basis, str | None]:
    """Bytes of the temporary buffers of a library, how sure they are, and why not if they are not known.

    Parameters
    ----------
    architecture, chosen
        The model and its weight format.
    chunk
        Prefill chunk that the library is compiled for.
    """
    shape = (
        architecture.layers, architecture.hidden, architecture.intermediate, architecture.query_heads,
        architecture.kv_heads, architecture.head_dim, architecture.vocabulary,
    )  # fmt: skip
    fit = next((fit for fit in FITS.values() if fit.shape == shape), None)
    if fit is None:
        reason = (
            f"temporary buffers of {architecture.label} can only be read from its compiled library; "
            f"coefficients are known for {', '.join(FITS)}"
        )
        return None, "unknown", reason
    per_token = fit.mib_per_token.get(chosen.dtype)
    if per_token is None:
        return None, "unknown", f"no library of these shapes was published in {chosen.dtype}"
    inside = chosen.name in fit.formats and FITTED_CHUNKS[0] <= chunk <= FITTED_CHUNKS[1]
    return per_token * MIB * chunk, "fitted" if inside else "extrapolated", None
