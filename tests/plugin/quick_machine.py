"""A plugin of pytest for runs inside tests: what a run measures of the machine itself takes less data and less time.

The loops of the interpreter before and after the rounds of every case, and the copies that give the memory's bandwidth, are a
third of the time of a run on the tiny dummy model.
"""

from __future__ import annotations

import functools


def pytest_configure() -> None:
    from kvsuite.meters import bandwidth, host_load

    host_load._TURNS = 1000
    bandwidth.copy_bandwidth = functools.partial(bandwidth.copy_bandwidth, size_bytes=2**20)
