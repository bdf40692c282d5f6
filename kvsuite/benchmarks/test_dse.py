"""The design-space suite: what context, prefill chunk, batch, window and sinks of a KV cache cost and bring.

pytest --pyargs kvsuite.benchmarks -k "dse and q4f16"
pytest --pyargs kvsuite.benchmarks -k dse --kv-space="ctx=1024,2048;batch=1,4;window=off,256;sink=0,4"
"""

from __future__ import annotations

import pytest


@pytest.mark.kv_suite("dse")
def test_dse(kv_case, kv_run):
    kv_run(kv_case)
