"""MLC models whose memory lines were published: the configuration that each was measured with."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.case import model_tag


@dataclass(frozen=True)
class Published:
    """A published MLC model.

    Parameters
    ----------
    tag
        As `kvsuite.case.model_tag` gives it.
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


def find_published(model: str) -> Published | None:
    """The published model of that name, ``None`` if it is none."""
    return PUBLISHED.get(model_tag(model))
