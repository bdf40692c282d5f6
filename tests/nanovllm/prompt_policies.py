"""Policies that compress a prompt once, by a factor: with sizes for prompts of some tens of tokens."""

from __future__ import annotations

from typing import Any

import pytest

POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("streaming_llm", {"start_size": 2}),
    ("recent_only", {}),
    ("uniform_stride", {}),
    ("l2_compress", {}),
    ("fix_size_l2", {"strategy": "random", "keep_ratio": 0.25}),
    ("snapkv", {"window": 4}),
    ("h2o", {}),
    ("tova", {}),
    ("knorm", {}),
    ("expected_attention", {"future": 16, "sinks": 2}),
)
EVERY = pytest.mark.parametrize(("name", "own"), POLICIES, ids=[name for name, _ in POLICIES])
