"""MLC models whose memory lines were published: the configuration that each was measured with."""

from __future__ import annotations

import re
from dataclasses import dataclass

_OUTSIDE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Published:
    """A published MLC model.

    Parameters
    ----------
    tag
        As `model_tag` gives it.
    preset
        Architecture of the same shapes.
    quantization
        Format of its weights.
    json_chunk
        ``prefill_chunk_size`` of its ``mlc-chat-config.json``, from which the engine sizes its buffers.
    """

    tag: str
    preset: str
    quantization: str
    json_chunk: int


def _models() -> list[Published]:
    formats = {
        ("Llama-3-8B-Instruct", "Llama-3-8B"): ("q0f16", "q3f16_1", "q4f16_1", "q4f32_1"),
        ("Llama-3.2-1B-Instruct", "Llama-3.2-1B"): ("q0f16", "q0f32", "q4f16_0", "q4f16_1", "q4f32_1"),
        ("Mistral-7B-Instruct-v0.3", "Mistral-7B"): ("q0f16",),
    }
    # two of them were made when gen_config had a smaller default
    small = ("Llama-3-8B-Instruct-q0f16-MLC", "Mistral-7B-Instruct-v0.3-q0f16-MLC")
    return [
        Published(tag, preset, name, 2048 if tag in small else 8192)
        for (model, preset), names in formats.items()
        for name in names
        for tag in [f"{model}-{name}-MLC"]
    ]


PUBLISHED: dict[str, Published] = {model.tag: model for model in _models()}


def model_tag(model: str) -> str:
    """The original's short name of a model, as its CSV files bear it: ``HF://mlc-ai/Llama-3-8B-Instruct-q4f16_1-MLC``
    is ``Llama-3-8B-Instruct-q4f16_1-MLC``.

    Scheme and folders are dropped, and each run of characters outside ``[A-Za-z0-9._-]`` becomes one ``_``.
    """
    name = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", model).rstrip("/").rpartition("/")[2]
    return _OUTSIDE.sub("_", name)


def find_published(model: str) -> Published | None:
    """The published model of that name, ``None`` if it is none."""
    return PUBLISHED.get(model_tag(model))
