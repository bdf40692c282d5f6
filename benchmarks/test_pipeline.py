"""The pipeline suite: compression, lanes and SM shares under load, judged by goodput, latency and what was served.

pytest benchmarks -k pipeline
pytest benchmarks -k pipeline --kv-model=dummy:Qwen3-8B --kv-synthetic-context=3584 --kv-pool-blocks=4096
"""

from __future__ import annotations

import pytest


@pytest.mark.kv_suite("pipeline")
def test_pipeline(kv_case, kv_run):
    kv_run(kv_case)
