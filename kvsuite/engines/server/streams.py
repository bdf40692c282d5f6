"""Streamed completions: several requests at once, by their arrivals, or one as another is over, each event stamped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsuite.meters.clock import Clock

from .endpoint import Endpoint
from .failure import ServerFailed

COMPLETIONS = "/v1/completions"
# a server that sends far more events than tokens were asked for does not end by itself
_MOST_EVENTS = 4
_SPARE_EVENTS = 64


@dataclass
class ServerReply:
    """One streamed completion.

    Parameters
    ----------
    sent
        Index of the clock's mark when the request went out, ``None`` where it went out as it was due.
    events
        Index of the clock's mark and, where the server tells them, the token ids of every event that brought text or tokens.
    last
        Mark of the event that ended the text, if it brought nothing itself.
    text
        What came.
    usage
        The server's own account of tokens.
    timings
        Its own times, where it sends any (llama.cpp).
    """

    sent: int | None = None
    events: list[tuple[int, list[int] | None]] = field(default_factory=list)
    last: int | None = None
    text: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)


class Streams:
    """Sends requests and reads their streams.

    Parameters
    ----------
    endpoint
        Where to.
    names
        What the server calls the model: an answer that names another one is an error.
    clock
        Started when the first request may go out; marked at every event.
    """

    def __init__(self, endpoint: Endpoint, names: Sequence[str], clock: Clock) -> None:
        self._endpoint, self._names, self._clock, self._marks = endpoint, frozenset(names), clock, 0

    def complete(
        self,
        bodies: Sequence[Mapping[str, Any]],
        arrivals_s: Sequence[float] | None = None,
        concurrency: int | None = None,
    ) -> list[ServerReply]:
        """All replies, in the order of the requests.

        Parameters
        ----------
        bodies
            JSON bodies; each is sent when its time has come.
        arrivals_s
            Seconds after the start; all at once if left out.
        concurrency
            So many are under way at a time, and the next is sent when one is over, in the order of ``bodies``.

        Raises
        ------
        ServerFailed, Refused
            As soon as one request fails; the others are dropped.
        """
        return self._endpoint.run(self._all(bodies, arrivals_s or [0.0] * len(bodies), concurrency))

    async def _all(
        self, bodies: Sequence[Mapping[str, Any]], arrivals_s: Sequence[float], concurrency: int | None
    ) -> list[ServerReply]:
        replies = [ServerReply() for _ in bodies]
        places = None if concurrency is None else asyncio.Semaphore(concurrency)
        loop = asyncio.get_running_loop()
        self._clock.start()
        begin, self._marks = loop.time(), 0

        async def one(body: Mapping[str, Any], arrival: float, reply: ServerReply) -> None:
            if places is None:
                await asyncio.sleep(begin + arrival - loop.time())
                await self._stream(body, reply)
                return
            async with places:
                reply.sent = self._mark()
                await self._stream(body, reply)

        tasks = [loop.create_task(one(*each)) for each in zip(bodies, arrivals_s, replies, strict=True)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return replies

    def _mark(self) -> int:
        self._clock.mark()
        self._marks += 1
        return self._marks - 1

    async def _stream(self, body: Mapping[str, Any], reply: ServerReply) -> None:
        endpoint, loop = self._endpoint, asyncio.get_running_loop()
        most = _MOST_EVENTS * int(body["max_tokens"]) + _SPARE_EVENTS
        try:
            async with asyncio.timeout(endpoint.timeout_s) as deadline:
                async with endpoint.opened("POST", COMPLETIONS, body) as response:
                    async for line in response.aiter_lines():
                        # others are comments, of which a server that hangs may send any number
                        if not line.startswith("data:"):
                            continue
                        data = line.removeprefix("data:").strip()
                        if data == "[DONE]":
                            return
                        self._take(data, reply)
                        most -= 1
                        if most < 0:
                            raise ServerFailed(
                                f"{endpoint.url}{COMPLETIONS}: sends on and on, far more than the {body['max_tokens']} tokens "
                                "it was asked for"
                            )
                        deadline.reschedule(loop.time() + endpoint.timeout_s)
        except TimeoutError:
            raise endpoint.hangs(COMPLETIONS) from None
        raise ServerFailed(f"{endpoint.url}{COMPLETIONS}: the stream ended before its end ([DONE])")

    def _take(self, data: str, reply: ServerReply) -> None:
        """Keep what an event says."""
        endpoint = self._endpoint
        # stamped before anything is parsed: what came, came now
        mark = self._mark()
        try:
            event = json.loads(data)
            error, choices = event.get("error"), event.get("choices") or ()
            model = event.get("model")
            usage, timings = dict(event.get("usage") or {}), dict(event.get("timings") or {})
            texts = [str(one.get("text") or "") for one in choices]
            ids = [[int(token) for token in one["token_ids"]] for one in choices if one.get("token_ids") is not None]
            is_last = any(one.get("finish_reason") for one in choices)
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            raise ServerFailed(
                f"{endpoint.url}{COMPLETIONS}: sent half a line, or no event of a completion: {endpoint.shown(data)}"
            ) from None
        if error is not None:
            raise ServerFailed(f"{endpoint.url}{COMPLETIONS}: failed while it answered: {endpoint.shown(error)}")
        if model is not None and str(model) not in self._names:
            raise ServerFailed(
                f"{endpoint.url}{COMPLETIONS}: answered for the model {endpoint.shown(model)}, not for "
                f"{', '.join(sorted(self._names))}; is another server behind this address?"
            )
        reply.usage = usage or reply.usage
        reply.timings = timings or reply.timings
        tokens = [token for one in ids for token in one] if ids else None
        if tokens or (tokens is None and any(texts)):
            reply.events.append((mark, tokens))
        elif is_last:
            reply.last = mark
        reply.text += "".join(texts)
