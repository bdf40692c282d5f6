"""A case's model in memory, in its weight format, with the facts that a record needs: the same for every torch engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvsuite.case import Case
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.quantization.apply import apply_quantization
from kvsuite.quantization.bytes import step_weight_bytes
from kvsuite.quantization.registry import NONE, unavailable


@dataclass
class CaseModel:
    """A loaded model.

    Parameters
    ----------
    loaded
        The model.
    weight_format
        Format of its weights as applied.
    facts
        `Session.model`.
    """

    loaded: LoadedModel
    weight_format: str
    facts: dict[str, Any]


def load_case_model(case: Case, *, attention: str, sdpa: str = "sdpa", seed: int, cache_dir: Path | None) -> CaseModel:
    """Load the model of ``case`` and put its weights into the case's format.

    Parameters
    ----------
    case
        Names model, weight format, device and dtype.
    attention
        ``sdpa``, ``eager``, or ``auto``: sdpa where the model has it.
    sdpa
        What transformers calls the function that computes sdpa here.
    seed
        Seed of a dummy model's weights.
    cache_dir
        Where converted models lie.

    Raises
    ------
    CaseSkipped
        If the weight format cannot be used here.
    CaseInvalid
        If the model cannot be put into it.
    UserError
        If the model cannot be loaded.
    """
    weight_format = case.quantization or NONE
    if reason := unavailable(weight_format, case.device):
        raise CaseSkipped(reason)
    spec = resolve_model(case.model, cache_dir=cache_dir)
    loaded = load_model(
        spec,
        device=case.device,
        dtype=None if case.dtype == "checkpoint" else case.dtype,
        seed=seed,
        attention=attention,
        sdpa=sdpa,
        cache_dir=cache_dir,
    )
    try:
        quantized = apply_quantization(loaded, weight_format)
    except UserError as error:
        # this format is impossible for this model; others of the run are not
        raise CaseInvalid(str(error)) from error
    facts = {
        "label": spec.label,
        "kind": spec.kind,
        "revision": spec.revision,
        "notes": [*loaded.notes, *quantized.notes],
        "parameters": loaded.parameters,
        "weights_bytes": loaded.weights_bytes,
        "step_weight_bytes": step_weight_bytes(loaded.model),
        "trained_length": loaded.trained_length,
        "quantization": quantized.to_dict(),
        "tokenizer_hash": loaded.tokenizer_hash,
        "load_s": loaded.load_s,
        "is_dummy": spec.is_dummy,
    }
    return CaseModel(loaded, quantized.format, facts)


def torch_cannot_use(engine: str, device: str, kinds: tuple[str, ...]) -> str | None:
    """Why an engine that runs on torch devices of ``kinds`` cannot use ``device`` here, ``None`` if it can."""
    kind, _, index = device.partition(":")
    if kind not in kinds:
        return (
            f"engine {engine} cannot use {device}: it runs where torch does ({', '.join(kinds)}); use --kv-device=cpu"
        )
    if kind == "cuda":
        if not torch.cuda.is_available():
            return (
                f"engine {engine} cannot use {device}: this torch {torch.__version__} sees no CUDA device; install a CUDA "
                "build of torch (make bench TORCH_INDEX=<wheel index of a CUDA build>) or use --kv-device=cpu"
            )
        if int(index or 0) >= torch.cuda.device_count():
            there = f"there are {torch.cuda.device_count()} CUDA devices, counted from 0"
            return f"engine {engine} cannot use {device}: {there}; use --kv-device=cuda:0"
    if kind == "mps" and not torch.backends.mps.is_available():
        return f"engine {engine} cannot use {device}: this torch has no MPS; use --kv-device=cpu"
    return None
