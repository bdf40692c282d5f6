"""Tokens of identical and of unique prompts, as they are and as they are computed: the golden facts, for blocks of 16.

No model computes here: what is counted depends on the scheduler and the blocks alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from decoders import loaded
from torch import Tensor

from kvsuite.engines.nano.under_load import serve_under_load
from kvsuite.engines.results import Served, ServeRequest
from kvsuite.nanovllm.batch import StepBatch
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime

PROMPT, NEW, REQUESTS = 3968, 128, 32


class Nothing:
    """Runs no model: every token is 0."""

    captured_bytes = 0
    observer = None
    facts: Mapping[str, Any] = {"attention": "none", "decode_step": "none"}

    def run(self, batch: StepBatch) -> Tensor:
        return torch.zeros(batch.sample_rows.shape[0], 256)

    hidden = run

    def logits(self, rows: Tensor) -> Tensor:
        return rows

    def close(self) -> None:
        pass


def serve(*, unique: bool, step_tokens: int) -> Served:
    limits = Limits(
        max_model_len=4096, max_num_seqs=REQUESTS, max_num_batched_tokens=step_tokens, prefill_first=True,
        num_blocks=REQUESTS * 256,
    )  # fmt: skip
    runtime = Runtime(loaded("llama"), limits, runner=lambda *of: Nothing())
    try:
        prompts = [[3 + index % 200 if unique else 3] * PROMPT for index in range(REQUESTS)]
        return serve_under_load(runtime, [ServeRequest(prompt, NEW) for prompt in prompts])
    finally:
        runtime.close()


@pytest.mark.parametrize(
    ("unique", "step_tokens", "prompt_tokens"),
    [
        (True, 32_768, 32 * 3968),
        # one prompt a step: 247 of 248 blocks are found, all but the one with the last token
        (False, 3968, 3968 + 31 * 16),
        # what is admitted in one step cannot be found by another of that step: eight prompts, and 1,024 tokens of a ninth
        (False, 32_768, 9 * 3968 + 23 * 16),
    ],
)
def test_tokens_computed_and_logical(unique: bool, step_tokens: int, prompt_tokens: int) -> None:
    served = serve(unique=unique, step_tokens=step_tokens)
    counts = served.counts
    assert counts["logical_prompt_tokens"] + counts["logical_output_tokens"] == 131_072
    assert counts["computed_prefill_tokens"] == prompt_tokens
    assert counts["computed_decode_tokens"] == 32 * 127
    assert counts["preemptions"] == 0
    assert sum(one.computed_prompt_tokens for one in served.requests) == prompt_tokens
    assert sum(one.cached_tokens for one in served.requests) == 32 * 3968 - prompt_tokens
    if unique:
        # one of each sequence is chosen and never fed
        assert prompt_tokens + 32 * 127 == 131_072 - 32 == 131_040
