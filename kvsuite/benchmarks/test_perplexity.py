"""The perplexity suite: what a weight format costs in quality, and what it saves in memory and time.

pytest --pyargs kvsuite.benchmarks -k "perplexity and 4bit" --kv-quantization=none,4bit,8bit
pytest --pyargs kvsuite.benchmarks -k perplexity --kv-dataset=wikitext2 --kv-max-length=2048 --kv-stride=512 --kv-reference=none
"""

from __future__ import annotations

import pytest


@pytest.mark.kv_suite("perplexity")
def test_perplexity(kv_case, kv_run):
    kv_run(kv_case)
