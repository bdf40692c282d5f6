"""Tokens that the device has chosen, or will have, and the host has not seen: the next step can be launched without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch import StepBatch
from .request import Request


class TokensInFlight:
    """The tokens of one step on their way to the host.

    From `depart` until it is delivered, a token is a placeholder at the end of ``request.tokens``: a negative number that
    says in which row of the step it is; `into` gives the next step the tokens. A request whose output is forced
    gets its token at once.

    Parameters
    ----------
    requests
        Who gets a token, in the order of the step.
    tokens
        int64 ``[R]`` on the device.
    """

    def __init__(self, requests: Sequence[Request], tokens: Tensor) -> None:
        self.requests = list(requests)
        self._tokens = self._host = tokens
        self._event: Any = None
        if tokens.device.type == "cuda":
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            event: Any = torch.cuda.Event
            self._event = event()
            self._event.record()

        # whether all of them are placeholders
        self._plain = True

    def depart(self) -> list[Request]:
        """Put placeholders into the requests that still want a token; return those that get their last one."""
        last = []
        for row, request in enumerate(self.requests):
            if request.status.over:
                continue
            tokens = request.tokens
            if request.forced is None:
                tokens.append(-1 - row)
            else:
                self._plain = False
                tokens.append(int(request.forced[request.output_length]))
            request.in_flight = True
            if len(tokens) >= request.longest:
                last.append(request)
        return last

    def into(self, batch: StepBatch, ending: Sequence[Request]) -> StepBatch:
        """The next step with these tokens, on the device, where it has placeholders.

        Parameters
        ----------
        batch
            The step as the host knows it.
        ending
            Requests of the step that are fed up to their last token, in its order.
        """
        # one that was preempted meanwhile may be fed a single token as well, and that one is an earlier token
        if self._plain and batch.tokens == len(ending) and ending == self.requests:
            return replace(batch, fed=self._tokens)
        return replace(batch, in_flight=self._tokens)

    @property
    def arrived(self) -> bool:
        """Whether `wait` would not wait."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> list[int]:
        """The tokens, as soon as the device has them."""
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._host.tolist()
        return found
