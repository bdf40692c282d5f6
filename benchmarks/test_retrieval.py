"""The retrieval suite: whether a cache still holds what a context said.

pytest benchmarks -k retrieval
pytest benchmarks -k retrieval --kv-task=facts4,copy --kv-task-methods="full,snapkv(keep_ratio=0.2)"
"""

from __future__ import annotations

import pytest


@pytest.mark.kv_suite("retrieval")
def test_retrieval(kv_case, kv_run):
    kv_run(kv_case)
