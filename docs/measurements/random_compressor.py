"""Random weights of an MLP compressor for a preset, in FastCache's layout: what merging takes can be measured, no quality.

python docs/measurements/random_compressor.py mlp.pth LLaVA-1.5-7B [FACTOR]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from kvsuite.compression.mlp_weights import IMAGE, TEXT, MlpWeights
from kvsuite.models.presets import PRESETS, preset_name

file, preset, factor = Path(sys.argv[1]), preset_name(sys.argv[2]), int((sys.argv[3:] or ["5"])[0])
shape = PRESETS[preset]
text = shape.get("text_config", shape)
layers = text["num_hidden_layers"]
width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
generator = torch.Generator().manual_seed(0)


def linear(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(layers, rows, width, generator=generator) / rows**0.5, torch.zeros(layers, 1, width)


families = {
    family: (linear(factor * width), linear(width), linear(width))
    for family in (*TEXT, *(IMAGE if "text_config" in shape else ()))
}
MlpWeights(layers, width, factor, families, "specified").write(file)
print(f"{file}: {preset}, {layers} layers of {width}, factor {factor}, {file.stat().st_size / 1e6:.1f} MB")
