"""Policies that merge tokens: consecutive ones become one, whose key and value are made of theirs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from kvsuite.errors import CaseInvalid

from .base import CacheView, ImageSpans, Policy
from .by_factor import ByFactor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Side = Literal["keys", "values"]
#: fewer groups than this in a part of a prompt, and the part stays as it is
LEAST_GROUPS = 2


@dataclass(frozen=True)
class PromptPart:
    """Consecutive tokens of one kind, positions ``start`` to ``stop - 1`` of a prompt.

    Parameters
    ----------
    start, stop
        Positions.
    is_image
        Whether they are an image's.
    groups
        How many groups of ``factor`` tokens are merged, from the first token on; the rest of the part stays as it is.
    """

    start: int
    stop: int
    is_image: bool
    groups: int


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """The cache that a merging policy is asked to work on.

    Parameters
    ----------
    model, revision
        Name of the model, and what identifies its weights (`kvsuite.models.resolve.ModelSpec`); ``None``: not known.
    layers
        Layers of the model, those that the policy leaves alone among them.
    head_dims
        Widths of keys and values in the layers that it acts on.
    device, dtype
        Of keys and values.
    """

    model: str
    revision: str | None
    layers: int
    head_dims: frozenset[int]
    device: torch.device
    dtype: torch.dtype


@dataclass(kw_only=True, eq=False)
class Merging(ByFactor):
    """Make one token of ``factor`` consecutive ones, once, at the end of the prompt.

    Text and images are merged apart: groups are counted from the start of each part of the prompt, what is left of a part
    behind its last whole group stays as it is, and a part of fewer than two groups stays as a whole. Of L tokens
    ``L // factor + L % factor`` are left in every part. Every head and every layer is left with the same number.

    Parameters
    ----------
    factor
        Tokens that become one: a whole number of at least 1, at which nothing changes.
    """

    merges: ClassVar[bool] = True

    acts: Literal["prompt", "decode"] = field(default="prompt", init=False, repr=False)
    factor: float | None = 5.0

    def __post_init__(self) -> None:
        if self.factor is None:
            raise self._wrong("factor=None", "so many tokens become one; give a whole number of at least 1")
        super().__post_init__()
        if self.rounding != "exact":
            raise self._wrong(f"rounding={self.rounding}", "whole groups are merged; leave rounding out")
        assert self.factor is not None
        if not self.factor.is_integer():
            raise self._wrong(f"factor={self.factor:g}", "so many tokens become one; give a whole number of at least 1")
        if self.positions == "cache":
            raise self._wrong("positions=cache", "a merged key has no place of its own; use --kv-positions=original")

    @property
    def group(self) -> int:
        """Tokens that become one."""
        assert self.factor is not None
        return int(self.factor)

    def parts(self, length: int, images: ImageSpans = ()) -> list[PromptPart]:
        """The parts of a prompt in order, text and images in turn.

        Raises
        ------
        ValueError
            If the spans of the images are not in order, overlap, are empty or reach beyond the prompt.
        """
        found: list[PromptPart] = []
        at = 0
        for start, stop in images:
            if not at <= start < stop <= length:
                raise ValueError(f"image tokens {start} to {stop} of a prompt of {length}, behind {at}")
            found += [self._part(at, start, is_image=False)] if start > at else []
            found.append(self._part(start, stop, is_image=True))
            at = stop
        return [*found, self._part(at, length, is_image=False)] if at < length or not found else found

    def size_of_prompt(self, length: int, images: ImageSpans = ()) -> int:
        return length - sum(part.groups * (self.group - 1) for part in self.parts(length, images))

    def own_size_after(self, length: int) -> int:
        return self.size_of_prompt(length)

    def size_after(self, length: int) -> int:
        return self.size_of_prompt(length)

    def caveat(self, length: int) -> str | None:
        if self.group == 1 or self.size_after(length) < length:
            return None
        return f"{length} tokens are fewer than {LEAST_GROUPS} groups of {self.group}: nothing is merged"

    def caveat_of_prompt(self, length: int, images: ImageSpans = ()) -> str | None:
        if not images:
            return self.caveat(length)
        if self.group == 1 or self.size_of_prompt(length, images) < length:
            return None
        return f"no part of the {length} tokens, text or image, has {LEAST_GROUPS} groups of {self.group}: nothing is merged"

    def images_problem(self, length: int, images: ImageSpans) -> str | None:
        """Why a prompt of ``length`` tokens with these images cannot be merged, ``None`` if it can; after `prepare`."""
        return None

    def keep(self, view: CacheView) -> Tensor:
        raise RuntimeError(f"{self.name} merges tokens and keeps none by index: call merge()")

    def prepare(self, shape: CacheShape) -> None:
        """Make ready for a model's cache; called before the first `merge`, where the engine makes its cache.

        Raises
        ------
        CaseInvalid
            If the policy cannot work on it.
        """
        if len(shape.head_dims) > 1:
            raise CaseInvalid(
                f"policy {self.name} merges heads of one width, and this model has {_listed(shape.head_dims)}"
            )

    def merge(
        self, keys: Tensor, values: Tensor, layers: Sequence[int], images: ImageSpans = ()
    ) -> tuple[Tensor, Tensor]:
        """Keys and values that stand for a complete prompt's.

        Parameters
        ----------
        keys, values
            ``[layers, ..., n, head_dim]`` in order of time, as they are stored: keys rotated for their positions.
        layers
            Indices of the layers in the model, for the first dimension.
        images
            Positions of image tokens, ``(start, stop)`` of each image in order; none for text.

        Returns
        -------
        tuple of Tensor
            ``[layers, ..., size_of_prompt(n, images), head_dim]``. What was not merged is the same to the bit.
        """
        parts = self.parts(keys.shape[-2], images)
        if self.group == 1 or not any(part.groups for part in parts):
            return keys, values
        return self._side(keys, layers, "keys", parts), self._side(values, layers, "values", parts)

    @abstractmethod
    def pooled(self, groups: Tensor, layers: Sequence[int], side: Side, *, is_image: bool) -> Tensor:
        """One vector ``[layers, g, head_dim]`` for each group ``[layers, g, factor * head_dim]``, whose tokens lie in order."""

    def _part(self, start: int, stop: int, *, is_image: bool) -> PromptPart:
        groups = (stop - start) // self.group if self.group > 1 else 0
        return PromptPart(start, stop, is_image, groups if groups >= LEAST_GROUPS else 0)

    def _side(self, vectors: Tensor, layers: Sequence[int], side: Side, parts: Sequence[PromptPart]) -> Tensor:
        import torch

        lead, width = vectors.shape[:-2], vectors.shape[-1]
        merged: dict[PromptPart, Tensor] = {}
        for is_image in (False, True):
            # the groups of all parts of a kind in one product
            own = [part for part in parts if part.is_image == is_image and part.groups]
            if not own:
                continue
            groups = torch.cat(
                [
                    vectors[..., part.start : part.start + part.groups * self.group, :].reshape(
                        *lead, part.groups, self.group * width
                    )
                    for part in own
                ],
                dim=-2,
            )
            found = self.pooled(groups.flatten(1, -2), layers, side, is_image=is_image).view(*groups.shape[:-1], width)
            merged |= dict(zip(own, torch.split(found, [part.groups for part in own], dim=-2), strict=True))
        pieces = []
        for part in parts:
            if part in merged:
                pieces.append(merged[part])
            pieces.append(vectors[..., part.start + part.groups * self.group : part.stop, :])
        return torch.cat(pieces, dim=-2)


def unmerged(asked: str, policy: Policy) -> str:
    """Why a cache in a number format of its own takes no policy that merges; ``asked``: option and value."""
    return (
        f"{asked}: policy {policy.name} merges tokens, and is measured in the model's own numbers alone; use "
        "--kv-cache-dtype=auto, or a policy that keeps tokens"
    )


def _listed(numbers: frozenset[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))
