"""Merging a prompt some layers after each further token: what is made of it waits beside the pool until all of it is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from kvsuite.compression.base import Policy
from kvsuite.compression.merging import Merging
from kvsuite.errors import CaseInvalid, UserError

from .prompt_eviction import Made, PromptEviction
from .request import Request
from .stage_streams import Work


def require_layer_by_layer(layers: int | None, policy: Policy | None) -> None:
    """Refuse to go layer by layer with a policy that is no such thing.

    Parameters
    ----------
    layers
        Layers after each token, ``None`` where all are merged at the end of the prompt.
    policy
        Of the runtime.

    Raises
    ------
    UserError
        If the number cannot be.
    CaseInvalid
        If the policy keeps tokens, all layers of which are cut at once.
    """
    if layers is None:
        return
    if layers < 1:
        raise UserError(f"layers_per_step={layers}: at least 1, or None to merge all layers at the end of the prompt")
    if not isinstance(policy, Merging):
        name = "there is no policy" if policy is None else f"policy {policy.name} keeps tokens"
        raise CaseInvalid(
            f"layers_per_step={layers}: {name}, and only what is made of several tokens is made layer by layer; use a policy "
            "that merges (mlp, mlp_residual, mean_pool), or compress at the end of the prompt"
        )


@dataclass(frozen=True)
class LayerByLayer:
    """One prompt that is being merged, the first layers first.

    Nothing of the sequence changes until all layers were begun: what is made of them waits in tensors of its own.

    Parameters
    ----------
    request
        Whose prompt is complete.
    parts
        Layers of each layer group that are merged together, in order: one after each token.
    begun
        Of each part that was begun what its work gives.
    """

    request: Request
    parts: Sequence[tuple[PromptEviction, slice]]
    begun: list[Made] = field(default_factory=list)

    def due(self, tokens: int) -> Iterator[Work]:
        """Begin what is to be begun by the time that so many tokens were fed behind the prompt, part by part."""
        for eviction, part in self.parts[len(self.begun) : tokens]:
            made: Made = []
            yield eviction.made_of_prompt(self.request, part, made)
            self.begun.append(made)

    @property
    def complete(self) -> bool:
        """Whether all layers were begun."""
        return len(self.begun) == len(self.parts)

    def of_group(self, eviction: PromptEviction) -> list[tuple[slice, Made]]:
        """A layer group's parts, all begun, with what their work gives."""
        own = zip(self.parts, self.begun, strict=True)
        return [(part, made) for (other, part), made in own if other is eviction]

    def branch(self, request: Request) -> LayerByLayer:
        """The same for a request that stands where this one does; what was made is shared, and never changes."""
        return replace(self, request=request, begun=list(self.begun))


def parts_of(evictions: Sequence[PromptEviction], layers: int) -> list[tuple[PromptEviction, slice]]:
    """The layers of groups, so many at a time; the last ones of a group may be fewer."""
    return [
        (one, slice(first, min(first + layers, len(one.group.layers))))
        for one in evictions
        for first in range(0, len(one.group.layers), layers)
    ]
