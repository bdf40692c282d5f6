"""Decode steps captured as CUDA graphs, so that the cache shows in a step and not the host's launch time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvsuite.meters.clock import Clock

from .cache import EvictionCache

Step = Callable[[Tensor, Any], Tensor]


class CapturedDecode:
    """One graph for every decode step after a prompt of fixed length.

    A policy's lengths are known beforehand, so every step has fixed shapes; one graph a step lets the full cache grow too,
    and attention sees exactly the stored tokens, without a mask.

    Parameters
    ----------
    step
        ``step(token [batch, 1], cache) -> next token [batch, 1]``; it must not wait for the device.
    cache
        Prefilled; its buffers must be the ones that later prompts fill.
    token
        First output token, int64 ``[batch, 1]``.
    steps
        Number of steps.
    """

    def __init__(self, step: Step, cache: EvictionCache, token: Tensor, steps: int) -> None:
        self.cache = cache
        self._token = token.clone()
        self._output = torch.zeros(token.shape[0], steps, dtype=torch.int64, device=token.device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        pool: Any = None
        torch.cuda.synchronize(token.device)
        for index in range(steps):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                following = step(self._token, cache)
                self._token.copy_(following)
                self._output[:, index : index + 1] = following
            pool = graph.pool()
            self._graphs.append(graph)
        self._final = cache.host_state()

    def run(self, token: Tensor, clock: Clock) -> Tensor:
        """Decode from ``token`` after the cache was filled with a prompt; returns the following tokens ``[batch, steps]``."""
        self._token.copy_(token)
        for graph in self._graphs:
            graph.replay()
            clock.mark()
        self.cache.restore(self._final)
        return self._output
