"""FastCache's learned compressor: small MLPs make one token of several, in every layer their own for keys and for values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.errors import CaseInvalid, UserError

from .base import ImageSpans, Policy
from .mean_pool import mean_of
from .merging import CacheShape, Merging, Side
from .mlp_weights import IMAGE, TEXT, Form, MlpWeights, digest_of, read_weights

if TYPE_CHECKING:
    from torch import Tensor

#: the option that names the weights in the place of the parameter
OPTION = "--kv-compressor-path"


@dataclass(kw_only=True, eq=False)
class Mlp(Merging):
    """The vectors of a group, one after the other, through Linear, ReLU, Linear, ReLU, Linear (FastCache, arXiv 2503.08461).

    Keys go through it as they are rotated. Text keys, text values, image keys and image values have MLPs of their own in
    every layer, which all heads of the layer share; those of all layers are one batched product.

    Parameters
    ----------
    factor
        Tokens that become one: that of the weights.
    weights
        Checkpoint (`kvsuite.compression.mlp_weights.read_weights`).
    digest
        Which weights these are; filled in from the file, so that other weights are another case.
    """

    name: ClassVar[str] = "mlp"
    form: ClassVar[Form] = "specified"
    takes_weights: ClassVar[bool] = True

    weights: str = ""
    digest: str = ""
    _families: dict[str, tuple[tuple[Tensor, Tensor], ...]] = field(default_factory=dict, init=False, repr=False)
    _shape: CacheShape | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights:
            raise UserError(
                f"--kv-method={self.name}: has no weights; give {OPTION}=FILE, and write one with: "
                "python -m kvsuite fit-compressor"
            )
        found = digest_of(self.weights, self._typed)
        if self.digest not in ("", found):
            raise UserError(f"{self._typed}: holds other weights ({found}) than those asked for ({self.digest})")
        self.digest = found

    def label(self, chosen: Mapping[str, Any] | None) -> str:
        if chosen and "weights" in chosen:
            # a path is no name
            chosen = {**chosen, "weights": Path(chosen["weights"]).stem}
        return super().label(chosen)

    def prepare(self, shape: CacheShape) -> None:
        super().prepare(shape)
        if shape == self._shape:
            return
        try:
            weights = read_weights(self.weights, self._typed)
            # what the case is called by was read when it was collected
            if (found := digest_of(self.weights, self._typed)) != self.digest:
                raise UserError(
                    f"{self._typed}: holds other weights ({found}) than when it was asked for ({self.digest})"
                )
        except UserError as error:
            raise CaseInvalid(str(error)) from error
        width = next(iter(shape.head_dims))
        self._refuse(weights, shape, width)
        self._shape = shape
        self._families = {
            name: tuple(
                (weight.to(shape.device, shape.dtype), bias.to(shape.device, shape.dtype)) for weight, bias in linears
            )
            for name, linears in weights.families.items()
        }

    def pooled(self, groups: Tensor, layers: Sequence[int], side: Side, *, is_image: bool) -> Tensor:
        family = (IMAGE if is_image else TEXT)[side == "values"]
        if family not in self._families:
            raise CaseInvalid(self._lacking(family))
        return self._apply(groups, [self._of_layers(linear, layers) for linear in self._families[family]])

    def images_problem(self, length: int, images: ImageSpans) -> str | None:
        if not any(part.is_image and part.groups for part in self.parts(length, images)):
            return None
        return next((self._lacking(family) for family in IMAGE if family not in self._families), None)

    def _lacking(self, family: str) -> str:
        return (
            f"{self._typed}: holds no weights for image tokens (compress_{family}), and fit-compressor fits none; use "
            "weights of the vision-language model that have them"
        )

    def _apply(self, groups: Tensor, linears: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        import torch

        found = groups
        for index, (weight, bias) in enumerate(linears):
            found = torch.baddbmm(bias, found.relu() if index else found, weight)
        return found

    def _of_layers(self, linear: tuple[Tensor, Tensor], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        import torch

        weight, bias = linear
        first = layers[0]
        if list(layers) == list(range(first, first + len(layers))):
            return weight[first : first + len(layers)], bias[first : first + len(layers)]
        # without indices on the device, which the host would wait for
        return torch.stack([weight[layer] for layer in layers]), torch.stack([bias[layer] for layer in layers])

    @property
    def _typed(self) -> str:
        return f"{OPTION}={self.weights}"

    def _refuse(self, weights: MlpWeights, shape: CacheShape, width: int) -> None:
        if weights.form not in (None, self.form):
            other = MlpResidual.name if weights.form == MlpResidual.form else Mlp.name
            raise CaseInvalid(
                f"{self._typed}: the weights are those of method {other}, not {self.name}; use --kv-method={other}"
            )
        if weights.factor != self.group:
            raise CaseInvalid(
                f"{self._typed}: makes one token of {weights.factor}, not of {self.group}; use factor {weights.factor}"
            )
        same = weights.revision in (None, shape.revision) or shape.revision is None
        if (weights.layers, weights.head_dim) != (shape.layers, width) or not same:
            raise CaseInvalid(
                f"{self._typed}: weights of another model ({weights.model or 'not named'}: {weights.layers} layers, heads of "
                f"{weights.head_dim}) than {shape.model} ({shape.layers} layers, heads of {width}); fit one with: python -m "
                "kvsuite fit-compressor"
            )


@dataclass(kw_only=True, eq=False)
class MlpResidual(Mlp):
    """As `Mlp`, but what the MLP gives is added to the mean of the group: untrained, zero weights are mean pooling.

    Parameters
    ----------
    factor, weights, digest
        As for `Mlp`.
    """

    name: ClassVar[str] = "mlp_residual"
    form: ClassVar[Form] = "residual"

    def _apply(self, groups: Tensor, linears: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return super()._apply(groups, linears) + mean_of(groups, self.group)


def with_weights(policy: type[Policy], given: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """Parameters of a policy with the weights of ``path``, where it takes some and was given none."""
    return {**({"weights": path} if path and policy.takes_weights else {}), **given}
