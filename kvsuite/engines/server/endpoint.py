"""The way to a server: one event loop in a thread of its own, deadlines, and errors as one line without the key.

The loop has its own thread so that the main one only waits: an alarm (``--kv-timeout``) is heard there at once, and no task
of the loop can swallow it.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible

from .failure import Refused, ServerFailed

T = TypeVar("T")
#: the environment variable of the key
KEY_VARIABLE = "KV_SERVER_KEY"
INSTALL = 'pip install "httpx>=0.28"'
_CONNECT_S = 10.0
_SHOWN = 300
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Endpoint:
    """A server by its address.

    Parameters
    ----------
    url
        Without ``/v1``.
    timeout_s
        Seconds that an answer, or the next event of one, may take.

    Raises
    ------
    UserError
        If the key in the environment is none that a header can hold.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{KEY_VARIABLE}: is no key: it has characters that no header can hold; set another one")
        self._client: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvsuite-server-client", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the loop; what is under way was cancelled with the call that began it."""
        if not self._loop.is_closed():
            if self._client is not None:
                self.run(self._client.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the loop and wait for it; it is cancelled if the wait ends otherwise."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def get_json(self, path: str) -> Any:
        """What a ``GET`` gives.

        Raises
        ------
        ServerFailed
            If that is no JSON, does not come in time, or is an error of the server.
        Refused
            If the server says that there is no such thing.
        """
        return self._json(self.run(self._whole("GET", path)), path)

    def get_text(self, path: str) -> str:
        """As `get_json`, for text."""
        return self.run(self._whole("GET", path)).decode("utf-8", errors="replace")

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What a ``POST`` of JSON gives; errors as of `get_json`."""
        return self._json(self.run(self._whole("POST", path, body)), path)

    @asynccontextmanager
    async def opened(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> AsyncIterator[Any]:
        """A response that has begun, on a connection of its own; what goes wrong until it is read is `ServerFailed`.

        Raises
        ------
        ServerFailed, Refused
            As for `get_json`. The deadline is the caller's.
        """
        import httpx

        if self._client is None:
            # once: reading the certificates takes longer than many a first token. Every request has a connection of its own, so
            # that none meets one which the server is about to close
            self._client = httpx.AsyncClient(
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                timeout=httpx.Timeout(None, connect=min(_CONNECT_S, self.timeout_s)),
                # no proxy stands before this machine itself
                trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
            )
        try:
            async with self._client.stream(method, self.url + path, json=body, headers=self._headers()) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._refusal(response.status_code, path, await response.aread())
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerFailed(
                f"nobody answers at {self.url} ({self.shown(error) or type(error).__name__}); start the server, or give its "
                "address as --kv-server-url"
            ) from None
        except httpx.InvalidURL as error:
            raise UserError(
                f"--kv-server-url={self.url}: no address of a server ({self.shown(error)}); for example "
                "--kv-server-url=http://localhost:8000"
            ) from None
        except httpx.HTTPError as error:
            raise ServerFailed(
                f"{self.url}{path}: the connection broke before the answer was whole "
                f"({self.shown(error) or type(error).__name__})"
            ) from None

    def shown(self, text: object) -> str:
        """Text of the server, as one short line without the key."""
        words = str(text)
        if self._key:
            words = words.replace(self._key, "***")
        return visible(words, _SHOWN)

    def _json(self, content: bytes, path: str) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            words = self.shown(content.decode("utf-8", errors="replace"))
            raise ServerFailed(f"{path}: the answer is no JSON: {words}") from None

    def hangs(self, path: str) -> ServerFailed:
        """The error of an answer that did not come."""
        return ServerFailed(f"{self.url}{path}: nothing came for {self.timeout_s:g} s (--kv-server-timeout)")

    async def _whole(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        try:
            async with asyncio.timeout(self.timeout_s), self.opened(method, path, body) as response:
                content: bytes = await response.aread()
                return content
        except TimeoutError:
            raise self.hangs(path) from None

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _refusal(self, status: int, path: str, content: bytes) -> Exception:
        said = self.shown(_message(content))
        if status in (401, 403):
            mend = "another key in" if self._key else "its key in"
            return UserError(f"--kv-server-url={self.url}: answered {status} ({said}); give {mend} {KEY_VARIABLE}")
        if 400 <= status < 500 and status not in (408, 429):
            return Refused(status, f"{path}: {said}")
        return ServerFailed(f"{self.url}{path} answered {status}: {said}")


def _message(content: bytes) -> str:
    """The message in an error's body, or the body."""
    words = content.decode("utf-8", errors="replace")
    try:
        found = json.loads(words)
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return words
