"""The KV-cache design space: its points in order, invalid ones among them, and the spaces with a name.

Axes, constraints, order and the three schemes are those of the original design-space exploration of MLC-LLM. Imports neither
pytest nor torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .design_point import AXES, OFF, TRAINED_LENGTH, Broken, Check, DesignPoint, broken_rules

__all__ = [
    "NAMED",
    "SCHEMES",
    "Broken",
    "DesignPoint",
    "DesignSpace",
    "Scheme",
    "SpacePoint",
    "broken_rules",
    "named_space",
    "union",
]


@dataclass(frozen=True)
class SpacePoint:
    """A point of a space.

    Parameters
    ----------
    point
        The point.
    broken
        Rules that it breaks, those of every engine before it is `judged`; a valid point breaks none.
    flags
        What its record must say although it may run.
    """

    point: DesignPoint
    broken: tuple[Broken, ...] = ()
    flags: tuple[str, ...] = ()

    def judged(self, trained_length: int | None, *, is_dummy: bool) -> SpacePoint:
        """The entry for a model: a point beyond its trained length is invalid, of random weights flagged only."""
        context = self.point.context_window_size
        if trained_length is None or context <= trained_length:
            return self
        reason = f"context_window_size={context} is more than the {trained_length} positions the model was trained for"
        if is_dummy:
            return replace(self, flags=(*self.flags, f"{reason}; random weights, so it runs"))
        return replace(self, broken=(*self.broken, Broken(TRAINED_LENGTH, reason)))


@dataclass(frozen=True)
class DesignSpace:
    """The points of a sweep, invalid ones among them.

    Parameters
    ----------
    name
        ``full``, ``small``, ``schemes``, or the text that named the axes.
    entries
        In order: weight format, context, chunk, batch, window, sink; the last varies fastest within a product.
    """

    name: str
    entries: tuple[SpacePoint, ...]

    @property
    def points(self) -> list[DesignPoint]:
        """The valid points in order."""
        return [entry.point for entry in self.entries if not entry.broken]

    @property
    def invalid(self) -> list[SpacePoint]:
        """The points that break a rule, in order: kept so that they can be named."""
        return [entry for entry in self.entries if entry.broken]

    def judged(self, trained_length: int | None, *, is_dummy: bool, own: Mapping[str, Check]) -> DesignSpace:
        """The space for a model (`SpacePoint.judged`) on an engine with rules of its ``own``."""
        entries = (replace(entry, broken=broken_rules(entry.point, own)) for entry in self.entries)
        return replace(self, entries=tuple(one.judged(trained_length, is_dummy=is_dummy) for one in entries))


@dataclass(frozen=True)
class Scheme:
    """One of the original's representative configurations."""

    name: str
    goal: str
    library: str
    settings: tuple[int, int, int]


SCHEMES: tuple[Scheme, ...] = (
    Scheme("smallest memory", "lowest VRAM, single machine", "test_dse_small.so", (4096, 1024, 16)),
    Scheme("compromise", "balance memory and speed", "test_dse_mid.so", (4096, 2048, 32)),
    Scheme("aggressive", "keep a large context, lower prefill/batch slightly", "test_dse_large.so", (8192, 4096, 64)),
)
#: a star: a base point, and each axis moved alone (a sink needs a window)
_SMALL: tuple[tuple[int, int, int, int, int], ...] = (
    (512, 128, 1, OFF, 0),
    (1024, 128, 1, OFF, 0),
    (512, 512, 1, OFF, 0),
    (512, 128, 4, OFF, 0),
    (512, 128, 1, 128, 0),
    (512, 128, 1, 128, 4),
)
NAMED = ("schemes", "small", "full")


def union(products: Sequence[Mapping[str, Sequence[int]]], quantizations: Iterable[str], *, name: str) -> DesignSpace:
    """Outer products of the values of all five axes, each in the original's order, one after the other.

    Parameters
    ----------
    products
        Values by axis name; every axis is there. A point of several products is there once, where it comes first.
    quantizations
        Weight formats, outermost, so that weights load once each.
    name
        Of the space.
    """
    settings = dict.fromkeys(
        setting for axes in products for setting in itertools.product(*(axes[axis.name] for axis in AXES))
    )
    points = (DesignPoint(chosen, *setting) for chosen in quantizations for setting in settings)
    return DesignSpace(name, tuple(SpacePoint(point, broken_rules(point)) for point in points))


def named_space(name: str, quantizations: Iterable[str]) -> DesignSpace:
    """One of the spaces with a name: ``schemes`` (3 points), ``small`` (6) or ``full`` (396) for each weight format."""
    if name == "full":
        return union([{axis.name: axis.values for axis in AXES}], quantizations, name=name)
    settings: list[tuple[int, ...]] = [scheme.settings for scheme in SCHEMES] if name == "schemes" else list(_SMALL)
    points = [DesignPoint(chosen, *setting) for chosen in quantizations for setting in settings]
    return DesignSpace(name, tuple(SpacePoint(point, broken_rules(point)) for point in points))
