"""Policy: which cached positions of a layer stay. It knows nothing of engines."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvsuite.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Positions = Literal["original", "cache"]
#: where image tokens stand in a prompt: ``(start, stop)`` of each image, in order
ImageSpans = tuple[tuple[int, int], ...]
#: short forms of parameters in labels
_SHORT = {"keep_ratio": "kr"}
_INTERVAL = re.compile(r"interval=([1-9][0-9]{0,6})")


@dataclass(frozen=True)
class CacheView:
    """What a policy may look at: the stored tokens of one layer, or of several layers of equal length stacked in front.

    Parameters
    ----------
    positions
        Logical position of every stored token, int64, ``[n]`` or ``[..., heads, n]``. Not necessarily ascending: an engine
        may keep tokens in any slot order.
    newest
        Logical position of the youngest stored token; of several sequences int64, broadcastable to ``positions``.
    scores
        What `Policy.token_score` gave for every stored token, float32 ``[..., heads, n]``; ``None`` where the policy has none.
    layer
        Layer index, or int64 indices shaped like the leading dimensions of ``scores`` up to the heads.
    heads
        Head index of every row of ``scores``, int64, broadcastable to its shape without the last dimension.
    step
        Number of tokens seen so far: the seedable part of a random choice. Of several sequences int64, broadcastable to
        ``positions`` without the last dimension.
    ordered
        Whether the tokens are known to lie in the order of their positions, as those of a prompt that was just stored do:
        nothing is sorted then.
    """

    positions: Tensor
    newest: Tensor | int
    scores: Tensor | None = None
    layer: Tensor | int = 0
    heads: Tensor | int = 0
    step: Tensor | int = 0
    ordered: bool = False

    @property
    def length(self) -> int:
        """Number of stored tokens."""
        return int(self.positions.shape[-1])


@dataclass(frozen=True)
class Schedule:
    """When a policy is applied: ``every_token``, ``single_shot`` (the first time it removes anything) or ``interval=n``."""

    name: str = "every_token"

    def __post_init__(self) -> None:
        if self.name not in ("every_token", "single_shot") and not _INTERVAL.fullmatch(self.name):
            raise UserError(
                f"--kv-l2-mode={self.name}: unknown schedule; use every_token, single_shot or interval=N with N >= 1"
            )

    def due(self, *, step: int, done: bool) -> bool:
        """Whether the policy acts after ``step`` tokens were seen; ``done`` says that it already removed something."""
        if self.once:
            return not done
        return step % self._interval == 0

    @cached_property
    def _interval(self) -> int:
        interval = _INTERVAL.fullmatch(self.name)
        return 1 if interval is None else int(interval[1])

    @property
    def once(self) -> bool:
        """Whether it acts a single time."""
        return self.name == "single_shot"

    @property
    def label(self) -> str:
        """Short form for names: ``interval16``."""
        return self.name.replace("=", "")


@dataclass(frozen=True)
class Needs:
    """What of a prompt a policy looks at beside positions and its own `Policy.token_score`; nothing else is computed.

    Parameters
    ----------
    prompt
        Whether it looks at keys, values or queries at all: `Policy.keep` gets a `kvsuite.compression.prompt_view.PromptView`.
    queries
        How many of the prompt's last queries, 0 for none.
    attention_sums
        Whether it asks how much attention each token got from all queries of the prompt (decode steps are not in it).
    query_statistics
        From which position on mean and covariance of the queries before rotation are taken, ``None`` for none.
    beyond
        How many positions behind the prompt it rotates to.
    """

    prompt: bool = False
    queries: int = 0
    attention_sums: bool = False
    query_statistics: int | None = None
    beyond: int = 0

    @property
    def looks_at_queries(self) -> bool:
        """Whether the engine has to catch queries while the prompt is computed."""
        return self.queries > 0 or self.attention_sums or self.query_statistics is not None


@dataclass(kw_only=True, eq=False)
class Policy(ABC):
    """Decides which stored tokens stay. A policy is a dataclass: its fields are its parameters.

    Parameters
    ----------
    positions
        ``original``: keys keep their rotation and logical positions go on. ``cache``: keys are re-rotated to their place in
        the cache (StreamingLLM, arXiv 2309.17453, section 3.2).
    skip_layers
        Layers that are never compressed.
    """

    name: ClassVar[str]
    #: one decision serves every head, made from positions alone
    shared_across_heads: ClassVar[bool] = True
    #: of a policy that looks at a prompt: whether a key head's decision depends on nothing but the head and its query heads.
    #: The heads of several layers may then stand in one view
    heads_apart: ClassVar[bool] = False
    #: whether a sequence's decision depends on nothing but the sequence. Several may then stand in one view, in front of
    #: all other dimensions
    sequences_apart: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    #: what stays is made of several tokens each, by `kvsuite.compression.merging.Merging.merge`, and `keep` is never asked
    merges: ClassVar[bool] = False
    #: whether it has a parameter ``weights``, which ``--kv-compressor-path`` gives where nothing else does
    takes_weights: ClassVar[bool] = False
    #: ``prompt``: once, at the end of the prompt. ``decode``: then, and after every further token by its schedule
    acts: Literal["prompt", "decode"] = field(default="decode", init=False, repr=False)
    #: parameters whose default variants come from an option of the compression suite: ``{"keep_ratio": "keep_ratios"}``
    swept_by_options: ClassVar[Mapping[str, str]] = {}

    positions: Positions = "original"
    skip_layers: Iterable[int] = ()
    schedule: Schedule = field(default_factory=Schedule, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.positions not in ("original", "cache"):
            raise UserError(f"--kv-positions={self.positions}: unknown position handling; use original or cache")
        self.skip_layers = frozenset(self.skip_layers)
        if any(layer < 0 for layer in self.skip_layers):
            raise UserError(f"--kv-skip-layers={sorted(self.skip_layers)}: layers count from 0")

    @property
    def needs(self) -> Needs:
        """What the policy looks at beside positions and its own scores."""
        return Needs()

    @abstractmethod
    def size_after(self, length: int) -> int:
        """How many of ``length`` stored tokens stay when the policy acts: the same for every head, known beforehand."""

    def size_of_prompt(self, length: int, images: ImageSpans = ()) -> int:
        """`size_after` of a complete prompt; where its image tokens stand counts for policies that merge alone."""
        return self.size_after(length)

    @abstractmethod
    def keep(self, view: CacheView) -> Tensor:
        """Indices of the tokens that stay, in time order.

        Returns
        -------
        Tensor
            int64, ``[size_after(n)]`` where `shared_across_heads`, else ``[..., heads, size_after(n)]``.
        """

    def victim(self, view: CacheView) -> Tensor:
        """Index of the one token that goes where exactly one has to, ``[]`` or ``[..., heads]``: the complement of `keep`."""
        import torch

        mask = torch.ones_like(view.positions if view.scores is None else view.scores, dtype=torch.int8)
        return mask.scatter(-1, self.keep(view), 0).argmax(-1)

    def oldest_rule(self, length: int) -> int | None:
        """How many of the oldest of ``length`` stored tokens stay, if `victim` is always the next one; else ``None``.

        An engine may then find the token to evict without asking. Whoever overrides `victim` overrides this as well.
        """
        return None

    def token_score(self, keys: Tensor) -> Tensor | None:
        """Score of new tokens from their keys ``[batch, heads, q, head_dim]``: float32 ``[batch, heads, q]``, or ``None``."""
        return None

    def prompt_score(self, view: CacheView) -> Tensor | None:
        """Score of every token of a complete prompt, float32 ``[kv_heads, n]``, if that is all that `keep` decides by.

        ``view`` is a `kvsuite.compression.prompt_view.PromptView`. `keep` then gets them as ``scores``, of all layers at once,
        while keys are looked at in some layers at a time. ``None`` for a policy whose `keep` looks at the prompt itself.
        """
        return None

    @property
    def ratio_requested(self) -> float | None:
        """Fraction removed that the policy is asked for, ``None`` where it is asked for sizes."""
        return None

    def caveat(self, length: int) -> str | None:
        """Why on a prompt of ``length`` tokens the policy is something else than its name says, ``None`` if it is not."""
        return None

    def caveat_of_prompt(self, length: int, images: ImageSpans = ()) -> str | None:
        """`caveat` of a prompt; where its image tokens stand counts for policies that merge alone."""
        return self.caveat(length)

    @classmethod
    def swept(cls, given: Collection[str]) -> dict[str, str]:
        """Parameters that options of the compression suite sweep where those in ``given`` are named, and which options."""
        return {name: source for name, source in cls.swept_by_options.items() if name not in given}

    @classmethod
    def sweep(cls) -> Sequence[Mapping[str, Any]]:
        """Parameters of the variants that a run has by default; one variant with the default parameters."""
        return ({},)

    def label(self, chosen: Mapping[str, Any] | None) -> str:
        """Name of this variant in ids, tables and figures; a policy that knows a better one than this gives it.

        Parameters
        ----------
        chosen
            The parameters that were named or swept, in that order; ``None`` where options of the suite's own, such as
            ``--kv-recent-sizes``, chose the variant.
        """
        marks = (f"{_SHORT.get(name, name)}={value}" for name, value in (chosen or {}).items())
        return "_".join([self.name, *marks])

    def settled(self, *, done: bool) -> bool:
        """Whether nothing more is decided for a sequence whose prompt is over; ``done`` says that something was removed."""
        return self.acts == "prompt" or (done and self.schedule.once)

    def due(self, *, step: int, done: bool, prompt: bool) -> bool:
        """Whether the policy acts after ``step`` tokens, of which the last one ends the prompt if ``prompt`` says so."""
        return (prompt or self.acts == "decode") and self.schedule.due(step=step, done=done)

    def parameters(self) -> dict[str, Any]:
        """The policy's own parameters as JSON types; part of a case's identity."""
        common = {one.name for one in fields(Policy)}
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name not in common}

    def to_dict(self) -> dict[str, Any]:
        """All parameters, as `get_policy` takes them: the own ones, position handling, skipped layers."""
        return self.parameters() | {"positions": self.positions, "skip_layers": sorted(self.skip_layers)}


def require_size(option: str, value: int, minimum: int = 1) -> int:
    """Refuse a size that is not a whole number of at least ``minimum``: a slice from -0 keeps everything."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{option}={value}: must be a whole number of at least {minimum}")
    return value


def time_order(view: CacheView) -> Tensor:
    """Slots of the view from the oldest to the youngest token, int64, shaped like ``view.positions``."""
    if view.ordered:
        import torch

        return torch.arange(view.length, device=view.positions.device).expand(view.positions.shape)
    return view.positions.argsort(dim=-1, stable=True)
