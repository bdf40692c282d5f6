"""From the device to the request: tokens under way, and what their arrival ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from .counters import Counters
from .in_flight import TokensInFlight
from .request import Request, Status
from .scheduler import Scheduler


class End(Protocol):
    """Ends a request."""

    def __call__(self, request: Request, status: Status, reason: str, error: Exception | None = None) -> None:
        """Let it be over, with the reason."""


class Delivery:
    """Tokens of one step that are under way to the host, and their arrival.

    Parameters
    ----------
    scheduler
        Takes requests back that get their last token.
    counters
        Kept up to date.
    end
        Ends a request.
    """

    def __init__(self, scheduler: Scheduler, counters: Counters, end: End) -> None:
        self._scheduler = scheduler
        self._counters = counters
        self._end = end
        #: tokens under way
        self.flight: TokensInFlight | None = None
        #: seconds that the host waited for tokens
        self.waited_s = 0.0

    @property
    def arrived(self) -> bool:
        """Whether `land` would not wait."""
        return self.flight is None or self.flight.arrived

    def take_off(self, flight: TokensInFlight) -> None:
        """Let the tokens of a launched step be under way; who gets its last one needs no blocks any more."""
        last = flight.depart()
        self.flight = flight
        for request in last:
            self._scheduler.remove(request)

    def land(self) -> None:
        """Wait for the tokens under way, and deliver them.

        Raises
        ------
        Exception
            What the device reported. The requests of that step have failed then.
        """
        flight, self.flight = self.flight, None
        if flight is None:
            return
        started = time.perf_counter()
        try:
            tokens = flight.wait()
        except Exception as error:
            self.fail(flight.requests, error)
            raise
        now = time.perf_counter()
        self.waited_s += now - started
        delivered = 0
        for request, token in zip(flight.requests, tokens, strict=True):
            # a callback, or whoever called between two steps, may have ended it
            if not request.in_flight:
                continue
            own = request.tokens
            if request.forced is None:
                own[-1] = token
            else:
                token = own[-1]
            request.in_flight = False
            request.times.append(now)
            delivered += 1
            if request.on_token is not None and not self._called(request, token, now):
                continue
            if token in request.stops:
                self._end(request, Status.FINISHED, "stop")
            elif len(own) >= request.longest:
                self._end(request, Status.FINISHED, "length")
        self._counters.logical_output_tokens += delivered

    def fail(self, requests: Iterable[Request], error: Exception) -> None:
        """End the requests of a step that raised."""
        for request in requests:
            self._end(request, Status.FAILED, f"its step failed: {type(error).__name__}: {error}", error)

    def _called(self, request: Request, token: int, now: float) -> bool:
        """Call a request's callback; whether the request goes on."""
        assert request.on_token is not None
        try:
            request.on_token(request, token, now)
        except Exception as error:
            self._end(request, Status.FAILED, f"its callback raised {type(error).__name__}: {error}", error)
        return not request.status.over
