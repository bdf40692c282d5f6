"""What a check finds: its words, its state, and what would mend it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .noise import Noise

SCHEMA = "kvsuite.doctor/1"

#: ``ok``: works. ``attention``: works, mind this. ``missing``: an optional part is not there. ``broken``: kvsuite cannot run
State = Literal["ok", "attention", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Parameters
    ----------
    part
        What was looked at.
    state
        See `State`.
    found
        What there is, or why it does not work.
    mend
        What to run or to change, where something can be done.
    """

    part: str
    state: State
    found: str
    mend: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All that was found out.

    Parameters
    ----------
    sections
        Findings by title.
    gpus
        Facts of every NVIDIA device that the driver reports.
    noise
        Self-tests by device; empty where they were left out.
    """

    sections: Mapping[str, Sequence[Finding]]
    gpus: Sequence[Mapping[str, Any]] = ()
    noise: Mapping[str, Noise] = field(default_factory=dict)

    @property
    def broken(self) -> list[Finding]:
        """What keeps kvsuite from running at all."""
        return [finding for section in self.sections.values() for finding in section if finding.state == "broken"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "schema": SCHEMA,
            "works": not self.broken,
            "sections": {title: [asdict(finding) for finding in found] for title, found in self.sections.items()},
            "gpus": [dict(gpu) for gpu in self.gpus],
            "noise": {device: noise.to_dict() for device, noise in self.noise.items()},
        }
