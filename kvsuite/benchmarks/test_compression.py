"""The compression suite: what cache eviction costs in quality, and what it saves in memory and time.

pytest --pyargs kvsuite.benchmarks -k "compression and streaming"
pytest --pyargs kvsuite.benchmarks --kv-method=streaming_llm,kvpress:SnapKV --kv-keep-ratios=0.5
"""

from __future__ import annotations

import pytest


@pytest.mark.kv_suite("compression")
def test_compression(kv_case, kv_run):
    kv_run(kv_case)
