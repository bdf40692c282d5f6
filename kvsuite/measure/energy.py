"""Energy of the timed rounds of every suite, and an output token's share of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvsuite.meters.energy import Energy, EnergyMeter

from .case_run import RunRounds
from .measurement import Measurement

_NO_OUTPUT = "this suite's timed rounds generate nothing"


class RoundEnergy:
    """Meters timed rounds, and writes what they took once the case is measured.

    Parameters
    ----------
    device
        Name of the case's device.
    meter
        Makes the meter of a device; a double checks the formulas.
    """

    def __init__(self, device: str, meter: Callable[[Any], EnergyMeter] = EnergyMeter) -> None:
        self._device, self._meter = device, meter
        self._found = Energy()
        self._rounds = 0

    def metered(self, run_rounds: RunRounds) -> RunRounds:
        """``run_rounds`` under the meter; of a case that times several kinds of rounds the last ones count."""

        def run(round_: Callable[[], None], rounds: int) -> None:
            meter = self._meter(self._device)
            meter.start()
            run_rounds(round_, rounds)
            self._found, self._rounds = meter.stop(), rounds

        return run

    def put(self, found: Measurement) -> None:
        """Write joules a round and an output token (``tokens["generated"]`` of a round), ``null`` with the reason.

        Nothing where nothing was timed: a case of quality alone has no numbers of speed.
        """
        if not self._rounds:
            return
        joules, rounds, reason = self._found.joules, self._rounds, self._found.reason
        tokens = found.tokens.get("generated")
        facts = {} if joules is None else {"scope": "device", "seconds": self._found.seconds}
        found.put("energy_j", None if joules is None else joules / rounds, reason=reason, **facts)
        if "energy_output_token_j" not in found.metrics:
            share = None if joules is None or not tokens else joules / (rounds * tokens)
            found.put("energy_output_token_j", share, reason=reason if joules is None else _NO_OUTPUT, **facts)
