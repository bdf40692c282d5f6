"""A runtime on a shared model, given back at the end, and what must hold of it whatever happened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime


@contextmanager
def serving(of: LoadedModel, *, policy: Any = None, rotation: Any = None, **limits: Any) -> Iterator[Runtime]:
    """A runtime with small limits, which admits so much that it has to preempt; at the end no block may be lost."""
    small: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 64}
    small["admission"] = "optimistic"
    if {"pool_bytes", "memory_share"} & limits.keys():
        del small["num_blocks"]
    runtime = Runtime(of, Limits(**(small | limits)), policy=policy, rotation=rotation)
    try:
        yield runtime
    finally:
        runtime.close()
        assert_nothing_lost(runtime)


def assert_nothing_lost(runtime: Runtime) -> None:
    """With nothing left to do every block is free, and every row."""
    assert runtime.unfinished == 0
    for table in runtime.tables:
        assert table.pool.free == table.pool.num_blocks
        assert not table.blocks.any()
        assert not table.table.any()
    assert len(runtime.scheduler._rows) == runtime.limits.max_num_seqs


class LogitsByRequest:
    """Collects the logits of every token that a request was given."""

    def __init__(self, runtime: Runtime) -> None:
        self.found: dict[Request, list[Tensor]] = {}
        runtime.on_logits = self

    def __call__(self, requests: Sequence[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            self.found.setdefault(request, []).append(row.float().clone())

    def of(self, request: Request) -> Tensor:
        """Logits ``[output, vocab]``."""
        return torch.stack(self.found[request])
