"""Requests to MLC's OpenAI-compatible server: several at once, streamed, each chunk stamped when it is read.

Threads with the standard library's HTTP client: no package is needed for it, and a killed server ends every one of them by
closing its socket.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsuite.engines.engine_process import EngineFailed
from kvsuite.meters.clock import Clock

HOST = "127.0.0.1"
_POLL_S = 0.2
_SETTLE_POLLS = 5
_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}
_SHOWN = 500


@dataclass
class Reply:
    """One streamed completion.

    Parameters
    ----------
    stamps
        Index of the clock's mark for every chunk that brought text or the end. A chunk is no token: text waits until it is
        whole UTF-8.
    text
        What came.
    usage
        The server's own account of the request, ``extra`` with its metrics among it.
    """

    stamps: list[int] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


class Marks:
    """A clock that several threads stamp."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._lock, self._count = clock, threading.Lock(), 0

    def mark(self) -> int:
        """Stamp; the index of the stamp."""
        with self._lock:
            self._clock.mark()
            self._count += 1
            return self._count - 1


def complete(
    port: int,
    bodies: Sequence[dict[str, Any]],
    clock: Clock,
    *,
    deadline_s: float,
    alive: Callable[[], None],
    kill: Callable[[], None],
) -> list[Reply]:
    """Send all requests at once and read their streams to the end.

    Parameters
    ----------
    port
        Of the server.
    bodies
        JSON bodies for ``/v1/completions``.
    clock
        Started when all connections stand, marked at every chunk.
    deadline_s
        Seconds for all of them together.
    alive
        Called again and again meanwhile; raises where the server can answer no more.
    kill
        Ends the server.

    Raises
    ------
    EngineFailed, MemoryError
        If a request fails, the server dies, or the deadline passes: then the server is killed, since a request that it hangs
        on cannot be taken back.
    """
    connections = [http.client.HTTPConnection(HOST, port, timeout=deadline_s) for _ in bodies]
    replies = [Reply() for _ in bodies]
    errors: list[Exception] = []

    def read(connection: http.client.HTTPConnection, body: dict[str, Any], reply: Reply, marks: Marks) -> None:
        try:
            _stream(connection, body, reply, marks)
        except Exception as error:
            errors.append(error)

    try:
        for connection in connections:
            connection.connect()
        clock.start()
        marks = Marks(clock)
        threads = [
            threading.Thread(target=read, args=(*each, marks), daemon=True)
            for each in zip(connections, bodies, replies, strict=True)
        ]
        ends = time.monotonic() + deadline_s
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(_POLL_S)
                alive()
                if time.monotonic() > ends:
                    raise EngineFailed(f"mlc_llm did not answer {len(bodies)} request(s) within {deadline_s:g} s")
        if errors:
            # a broken connection is often the first that is seen of a server's death
            for _ in range(_SETTLE_POLLS):
                alive()
                time.sleep(_POLL_S)
            raise EngineFailed(f"mlc_llm: a request failed: {errors[0]}") from errors[0]
    except BaseException:
        kill()
        raise
    finally:
        for connection in connections:
            connection.close()
    return replies


def ask(port: int, method: str, path: str, body: dict[str, Any] | None = None, *, deadline_s: float) -> Any:
    """One request whose answer is JSON.

    Raises
    ------
    EngineFailed
        If it is answered with an error.
    OSError, http.client.HTTPException
        If nobody answers.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=deadline_s)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), _HEADERS)
        response = connection.getresponse()
        content = response.read()
        if response.status != http.client.OK:
            raise EngineFailed(f"mlc_llm answered {path} with {response.status}: {_shown(content)}")
        return json.loads(content)
    finally:
        connection.close()


def _stream(connection: http.client.HTTPConnection, body: dict[str, Any], reply: Reply, marks: Marks) -> None:
    connection.request("POST", "/v1/completions", json.dumps(body), _HEADERS)
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise EngineFailed(f"answered with {response.status}: {_shown(response.read())}")
    for line in response:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            break
        chunk = json.loads(data)
        for choice in chunk.get("choices", ()):
            if choice.get("text") or choice.get("finish_reason"):
                reply.stamps.append(marks.mark())
            reply.text += choice.get("text") or ""
        reply.usage = chunk.get("usage") or reply.usage
    if not reply.usage:
        raise EngineFailed("a stream ended without its usage")


def _shown(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")[:_SHOWN]
