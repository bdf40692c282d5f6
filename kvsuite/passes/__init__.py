"""The passes of one case: quality, memory, speed. Each writes its numbers into the record."""

from .case_passes import CasePasses, Measured, Phase, RunRounds

__all__ = ["CasePasses", "Measured", "Phase", "RunRounds"]
