"""Weights of an MLP compressor with random numbers, and what they make of a prompt in plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsuite.compression.mlp_weights import IMAGE, TEXT, Form, MlpWeights


def random_weights(
    *, layers: int = 3, width: int = 16, factor: int = 5, images: bool = True, form: Form | None = None, **facts: Any
) -> MlpWeights:
    """Weights whose every layer and family is another."""
    generator = torch.Generator().manual_seed(0)

    def linear(rows: int) -> tuple[Tensor, Tensor]:
        return (
            torch.randn(layers, rows, width, generator=generator) / rows**0.5,
            torch.randn(layers, 1, width, generator=generator) / 4,
        )

    families = {
        family: (linear(factor * width), linear(width), linear(width)) for family in (*TEXT, *(IMAGE if images else ()))
    }
    return MlpWeights(layers, width, factor, families, form, **facts)


def written(path: Path, weights: MlpWeights | None = None, **made: Any) -> str:
    """The path of a checkpoint of them."""
    (weights or random_weights(**made)).write(path)
    return str(path)


def one_by_one(state: dict[str, Tensor], family: str, layer: int, tokens: Tensor, factor: int) -> Tensor:
    """What the MLP of a family and layer gives for ``[heads, n, width]``, group by group, as torch's own modules do."""
    from torch import nn

    width = tokens.shape[-1]
    mlp = nn.Sequential(
        nn.Linear(factor * width, width), nn.ReLU(), nn.Dropout(0.4),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.4), nn.Linear(width, width),
    ).eval()  # fmt: skip
    prefix = f"compress_{family}.{layer}."
    mlp.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
    with torch.no_grad():
        return torch.stack([torch.stack([mlp(group.flatten()) for group in head.split(factor)]) for head in tokens])
