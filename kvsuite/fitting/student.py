"""The MLPs of a compressor while they are fitted: in units of what they see, and as weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvsuite.compression.mean_pool import mean_of
from kvsuite.compression.merging import Merging, Side
from kvsuite.compression.mlp_weights import TEXT, Form, MlpWeights

# how far above the mean of its input, in standard deviations, the specified form's units switch at first: below that, ReLU
# lets the mean through as it is
_SWITCH = 4.0


@dataclass(kw_only=True, eq=False)
class Student(Merging):
    """A compressor of text whose weights are parameters. It begins as mean pooling, in either form.

    Inputs are centred and scaled by what a layer's keys and values are in the lessons, and outputs scaled back; `weights`
    writes both into the linear layers.
    """

    name: ClassVar[str] = "student"

    form: Form = "residual"
    #: by ``tk``, ``tv``: weight and bias of each linear layer, as `MlpWeights.families`
    linears: dict[str, list[Tensor]] = field(default_factory=dict, init=False)
    centre: dict[str, Tensor] = field(default_factory=dict, init=False)
    scale: dict[str, Tensor] = field(default_factory=dict, init=False)

    def begin(self, keys: Tensor, values: Tensor, seed: int) -> None:
        """Take the scale from keys and values ``[layers, count, kv_heads, n, head_dim]``, and make the weights."""
        generator = torch.Generator().manual_seed(seed)
        for name, vectors in zip(TEXT, (keys, values), strict=True):
            layers, width = vectors.shape[0], vectors.shape[-1]
            flat = vectors.float().flatten(1, -2)
            self.centre[name] = flat.mean(dim=1, keepdim=True)
            self.scale[name] = flat.std(dim=1, keepdim=True).clamp_min(1e-4)
            made: list[Tensor] = []
            for index in range(3):
                rows = width * self.group if index == 0 else width
                if self.form == "specified":
                    # ReLU(x + c) - c is x while x > -c
                    weight = torch.eye(width).repeat(self.group, 1) / self.group if index == 0 else torch.eye(width)
                    weight = weight.expand(layers, rows, width).clone()
                    bias = torch.full((layers, 1, width), (_SWITCH, 0.0, -_SWITCH)[index])
                else:
                    weight = torch.randn(layers, rows, width, generator=generator) * (2 / rows) ** 0.5
                    weight, bias = weight * (index < 2), torch.zeros(layers, 1, width)
                made += [weight.requires_grad_(), bias.requires_grad_()]
            self.linears[name] = made

    def parameters_fitted(self) -> Iterator[Tensor]:
        """The tensors that an optimiser turns."""
        for made in self.linears.values():
            yield from made

    def pooled(self, groups: Tensor, layers: Sequence[int], side: Side, *, is_image: bool) -> Tensor:
        name = TEXT[side == "values"]
        weights = self.linears[name]
        centre, scale = self.centre[name], self.scale[name]
        found = (groups - centre.repeat(1, 1, self.group)) / scale.repeat(1, 1, self.group)
        for index in range(3):
            found = torch.baddbmm(weights[2 * index + 1], found.relu() if index else found, weights[2 * index])
        if self.form == "specified":
            return found * scale + centre
        return found * scale + mean_of(groups, self.group)

    @torch.no_grad()
    def weights(self, *, model: str, revision: str | None) -> MlpWeights:
        """The same MLPs without centre and scale beside them."""
        families = {}
        for name, made in self.linears.items():
            first, first_bias, second, second_bias, third, third_bias = (one.detach().clone() for one in made)
            centre, scale = self.centre[name], self.scale[name]
            first = first / scale.repeat(1, 1, self.group).transpose(1, 2)
            first_bias = first_bias - centre.repeat(1, 1, self.group) @ first
            third, third_bias = third * scale, third_bias * scale
            if self.form == "specified":
                third_bias = third_bias + centre
            families[name] = ((first, first_bias), (second, second_bias), (third, third_bias))
        layers, _, width = self.linears[TEXT[0]][5].shape
        return MlpWeights(layers, width, self.group, families, self.form, model, revision)
