"""Apply a weight format to a loaded model, and say what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvsuite.errors import CaseSkipped, UserError
from kvsuite.models.load import LoadedModel

from .bitsandbytes import NAMES, convert_bitsandbytes
from .bytes import predicted_weight_bytes, weight_bytes
from .convert import cast_parameters, convert_groups
from .fake_int3 import apply_fake_int3, is_tied, linear_paths
from .formats import CAST_FORMATS, GROUP_FORMATS
from .packed import PackedWeight
from .registry import FAKE, label, quantization, unavailable
from .targets import count_kinds, find_targets, require_most


@dataclass(frozen=True)
class QuantizedFacts:
    """What a weight format did to a model.

    Parameters
    ----------
    format
        Name, or the dtype's label for weights as loaded.
    compute_dtype
        Dtype of activations and products.
    bits_per_weight
        Stored bits over number of weights, embeddings included; tied weights count once.
    bits_per_weight_without_embeddings
        The same without the input embedding, and without a final layer that shares its table.
    weight_bytes
        Distinct storages, measured.
    predicted_weight_bytes
        The closed form.
    quality_only
        Whether memory and speed mean nothing.
    converted, left_alone
        Modules with weights by kind.
    notes
        What a reader of a result must know.
    """

    format: str
    compute_dtype: str
    bits_per_weight: float
    bits_per_weight_without_embeddings: float
    weight_bytes: int
    predicted_weight_bytes: int
    quality_only: bool
    converted: dict[str, int]
    left_alone: dict[str, int]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON types."""
        return asdict(self) | {"notes": list(self.notes)}


def apply_quantization(loaded: LoadedModel, name: str) -> QuantizedFacts:
    """Convert a loaded model in place, module by module, so that one dense matrix at a time lies beside it.

    ``loaded.dtype`` and ``loaded.weights_bytes`` are brought up to date.

    Raises
    ------
    UserError
        If the format is unknown, does not fit the model, or the model is quantised already.
    CaseSkipped
        If the format cannot run on the model's device here.
    """
    chosen = quantization(name)
    if reason := unavailable(name, str(loaded.device)):
        raise CaseSkipped(reason)
    model = loaded.model
    _refuse_quantised(model, name)
    predicted = predicted_weight_bytes(model, name)
    notes = _notes(loaded, name)
    parameters, table_parameters = _count(model), _count(model.get_input_embeddings())
    converted, left_alone = _convert(loaded, name)
    if name == FAKE:
        # an untied final layer has become weights of its own
        parameters = _count(model)
    loaded.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    loaded.weights_bytes = weight_bytes(model)
    dtype = str(loaded.dtype).removeprefix("torch.")
    table_bytes = weight_bytes(model.get_input_embeddings())
    return QuantizedFacts(
        format=label(name, dtype),
        compute_dtype=dtype,
        bits_per_weight=8 * loaded.weights_bytes / parameters,
        bits_per_weight_without_embeddings=8 * (loaded.weights_bytes - table_bytes) / (parameters - table_parameters),
        weight_bytes=loaded.weights_bytes,
        predicted_weight_bytes=predicted,
        quality_only=chosen.quality_only,
        converted=converted,
        left_alone=left_alone,
        notes=tuple(notes),
    )


def _convert(loaded: LoadedModel, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Convert in place; the kinds of modules converted and left alone."""
    model = loaded.model
    if name in GROUP_FORMATS or name in NAMES:
        targets = find_targets(model, ends=name in GROUP_FORMATS and GROUP_FORMATS[name].ends)
        require_most(model, targets, name)
        kinds = count_kinds(model, {target.path for target in targets})
        if name in GROUP_FORMATS:
            convert_groups(model, GROUP_FORMATS[name], targets)
        else:
            convert_bitsandbytes(model, name, targets, loaded.device)
        return kinds
    kinds = count_kinds(model, set(linear_paths(model)) if name == FAKE else set())
    if name == FAKE:
        apply_fake_int3(model)
    elif name in CAST_FORMATS:
        cast_parameters(model, getattr(torch, CAST_FORMATS[name]))
    return kinds


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _refuse_quantised(model: Any, name: str) -> None:
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise UserError(f"--kv-quantization={name}: this model has been quantised already; load it again")
    if name != "none" and (own := getattr(model.config, "quantization_config", None)) is not None:
        method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
        raise UserError(
            f"--kv-quantization={name}: the checkpoint is quantised already ({getattr(method, 'value', method)}); "
            "use none, or a checkpoint of full precision"
        )


def _notes(loaded: LoadedModel, name: str) -> list[str]:
    notes = []
    if name != "none" and loaded.spec.kind in ("smollm2", "gguf"):
        origin = (
            "were Q4_1, a 4-bit grid," if loaded.spec.kind == "smollm2" else "come from a GGUF file, often quantised,"
        )
        notes.append(f"the weights {origin} before {name}: its loss is not that on full-precision weights")
    if name == FAKE:
        notes.append("weights are rounded to 3 bits and kept dense: memory and speed are those of the dense model")
        if is_tied(loaded.model):
            notes.append("the tied final layer was given its own copy, so that the embedding stays exact")
    half = loaded.device.type == "cpu" and name in GROUP_FORMATS and GROUP_FORMATS[name].dtype == "float16"
    if half:
        notes.append("float16 products on the CPU are summed in float32, as on a GPU; activations are float16")
    return notes
