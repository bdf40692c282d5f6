"""Losses and log-probabilities of output tokens, while their requests share a pool with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvsuite.engines.results import OutputScores, ServeRequest
from kvsuite.meters.served_divergence import LogProbabilityRows
from kvsuite.models.language_head import token_losses
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.scoring import rows_at_once


class OutputScorer:
    """Sees the logits of every step (`kvsuite.nanovllm.runtime.Runtime.on_logits`) and scores the output of some requests.

    A position is scored by its number in the output, so that one whose token is drawn again after a preemption is scored
    again, in the same place.

    Parameters
    ----------
    runtime
        Serves the requests.
    requests
        Those to be scored, with what is asked of each: `ServeRequest.forced` and `ServeRequest.rows`.

    Raises
    ------
    ValueError
        If rows of different widths are asked for.
    """

    def __init__(self, runtime: Runtime, requests: Sequence[tuple[Request, ServeRequest]]) -> None:
        self._device = runtime.device
        self._rows = rows_at_once(runtime)
        self._first: dict[Request, int] = {}
        targets: list[int] = []
        for request, asked in requests:
            self._first[request] = len(targets)
            targets += [-1] * asked.new_tokens if asked.forced is None else list(asked.forced)
        #: the token of each position, -1 for the most probable one
        self._targets = self._kept(targets, torch.int64)
        self._nll = self._kept([0.0] * len(targets), torch.float32)
        self._top1 = self._kept([0] * len(targets), torch.int64)
        widths = {_width(asked, runtime.vocab_size) for _, asked in requests}
        if len(widths) > 1:
            raise ValueError(f"rows: {sorted(widths)} log-probabilities a position; ask for as many of every request")
        self._width = widths.pop()
        self._named = requests[0][1].rows is not None and not isinstance(requests[0][1].rows, int)
        if self._width:
            self._ids = torch.zeros(len(targets), self._width, dtype=torch.int32, device=self._device)
            self._log_p = torch.zeros(len(targets), self._width, dtype=torch.float32, device=self._device)
            self._log_rest = torch.zeros(len(targets), dtype=torch.float32, device=self._device)
        if self._named:
            named = np.concatenate([np.asarray(asked.rows, dtype=np.int32) for _, asked in requests])
            self._ids.copy_(torch.from_numpy(named))
        self._settle()

    def __call__(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Score one step: ``logits`` ``[R, vocab]`` of ``requests``, none of which has a token under way."""
        rows = [row for row, request in enumerate(requests) if request in self._first]
        places = self._kept([self._first[requests[row]] + requests[row].output_length for row in rows], torch.int64)
        for at in range(0, len(rows), self._rows):
            self._score(places[at : at + self._rows], logits[rows[at : at + self._rows]])

    def scores(self) -> dict[Request, OutputScores]:
        """Of every request, on the host; it waits for the device."""
        self._settle()
        nll, top1 = self._nll.tolist(), self._top1.tolist()
        tables = [part.cpu().numpy() for part in (self._ids, self._log_p, self._log_rest)] if self._width else []
        ends = [*list(self._first.values())[1:], len(nll)]
        found = {}
        for (request, begin), end in zip(self._first.items(), ends, strict=True):
            rows = LogProbabilityRows(*(table[begin:end] for table in tables)) if tables else None
            found[request] = OutputScores(nll[begin:end], top1[begin:end], rows)
        return found

    def _score(self, places: Tensor, logits: Tensor) -> None:
        best = logits.argmax(-1)
        targets = self._targets[places]
        self._top1[places] = best
        self._nll[places] = token_losses(logits, torch.where(targets < 0, best, targets))
        if not self._width:
            return
        wide = logits.float()
        if self._named:
            ids = self._ids[places].long()
        else:
            ids = wide.topk(self._width).indices
            self._ids[places] = ids.int()
        whole = wide.logsumexp(-1)
        self._log_p[places] = wide.gather(1, ids) - whole[:, None]
        self._log_rest[places] = wide.scatter(1, ids, float("-inf")).logsumexp(-1) - whole

    def _settle(self) -> None:
        """Lanes write from streams of their own, which wait for no other."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _kept(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        found = torch.tensor(values, dtype=dtype)
        if self._device.type != "cuda":
            return found.to(self._device)
        return found.pin_memory().to(self._device, non_blocking=True)


def _width(asked: ServeRequest, vocabulary: int) -> int:
    """Log-probabilities that are kept of every position."""
    rows: Any = asked.rows
    if rows is None:
        return 0
    return min(rows, vocabulary) if isinstance(rows, int) else int(rows.shape[1])
