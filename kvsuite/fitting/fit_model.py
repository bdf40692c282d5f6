"""The model that a compressor is fitted to: what fitting cannot use is refused before anything is learnt."""

from __future__ import annotations

from pathlib import Path

from kvsuite.errors import UserError
from kvsuite.models.layers import layers_of
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.resolve import resolve_model


def load_for_fitting(request: str, length: int, cache_dir: Path | None) -> LoadedModel:
    """Load a model on the CPU in float32.

    Raises
    ------
    UserError
        If it has no tokenizer or random weights, its layers are not alike and full, or requests of ``length`` tokens are longer
        than it was trained for.
    """
    typed = f"--model={request}"
    spec = resolve_model(request, cache_dir=cache_dir)
    if spec.is_dummy:
        raise UserError(
            f"{typed}: its weights are random, and there is nothing to learn of its answers; give a trained model"
        )
    loaded = load_model(spec, device="cpu", dtype="float32", attention="sdpa", cache_dir=cache_dir)
    if loaded.tokenizer is None:
        raise UserError(f"{typed}: has no tokenizer to read --text with; give a model that has one")
    if not layers_of(loaded.text_config.to_dict()).plain:
        raise UserError(
            f"{typed}: its layers have windows, states, latents or several shapes; give a model whose layers all hold "
            "full keys and values"
        )
    if loaded.trained_length is not None and length > loaded.trained_length:
        raise UserError(
            f"{typed}: was trained for {loaded.trained_length} tokens, and prompts with their answers have {length}; give "
            "fewer --prompt-tokens"
        )
    return loaded
