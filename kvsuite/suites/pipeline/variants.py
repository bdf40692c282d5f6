"""What the words of ``--kv-variants`` mean: who compresses, on how many lanes, with which share of the SMs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One variant, by the word that stands in the JSON.

    Parameters
    ----------
    name
        The word.
    compresses
        Whether the prompt's keys and values are reduced by a factor once it is over.
    lanes
        1: prompts and decoding in turn; 2: prompts of some requests beside decoding of others.
    partitioned
        Whether each lane has SMs of its own.
    controller
        Who chooses them while it runs: ``auto``, ``dual`` (prompts or decoding as well), ``None`` for nobody.
    chunked
        Whether chunks of prompts are fed beside decoding; else prompts come first, whole.
    """

    name: str
    compresses: bool = True
    lanes: int = 1
    partitioned: bool = False
    controller: str | None = None
    chunked: bool = False

    @property
    def id(self) -> str:
        """The word in a case's id, which has no ``+``."""
        return self.name.replace("+", "_")


BASELINE = "baseline"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(name=BASELINE, compresses=False),
        Variant(name="compression-only"),
        Variant(name="greenctx-only", lanes=2, partitioned=True),
        Variant(name="auto-tune+greenctx", lanes=2, partitioned=True, controller="auto"),
        Variant(name="triad", lanes=2, partitioned=True, controller="dual"),
        Variant(name="streams-only", lanes=2),
        Variant(name="chunked", chunked=True),
    )
}
