"""The sensitivity suite: which layer's keys and values lose what in few bits, and mixed assignments under a budget.

pytest --pyargs kvsuite.benchmarks -k sensitivity
pytest --pyargs kvsuite.benchmarks -k sensitivity --kv-sensitivity=int4_channel,int4 --kv-sensitivity-budget=7,6
"""

from __future__ import annotations

import pytest


@pytest.mark.kv_suite("sensitivity")
def test_sensitivity(kv_case, kv_run):
    kv_run(kv_case)
