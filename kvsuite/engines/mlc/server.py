"""``mlc_llm serve`` in a process of its own: started, asked, and killed with a reason where it hangs.

An error in MLC's C++ kills the thread that works, not the process: the port still answers, requests never. Hence deadlines,
and a look at what it printed while we wait.
"""

from __future__ import annotations

import http.client
import re
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.engines.engine_process import EngineProcess, failure
from kvsuite.engines.results import ServeRequest
from kvsuite.meters.clock import Clock

from .client import HOST, Reply, ask, complete

_POLL_S = 0.1
_ANSWER_S = 10.0
# what its threads print when they die
_DEAD = re.compile(r"Exception in thread|terminate called|Possibly prob distribution contains NAN|Segmentation fault")
_MEMORY = re.compile(
    r"Estimated total single GPU memory usage: (?P<total>[\d.]+) MB \(Parameters: (?P<params>[\d.]+) MB\. "
    r"KVCache: (?P<kvcache>[\d.]+) MB\. Temporary buffer: (?P<temp>[\d.]+) MB\)"
)
_LIMITS = re.compile(
    r'The actual engine mode is "(?P<mode>\w+)"\. So max batch size is (?P<max_num_sequence>\d+), '
    r"max KV cache token capacity is (?P<max_total_sequence_length>\d+), prefill chunk size is (?P<prefill_chunk_size>\d+)\."
)
_MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What the server is started with.

    Parameters
    ----------
    python
        Interpreter that has mlc_llm.
    model
        Model folder or ``HF://`` address.
    library
        Compiled library, ``None`` for one that mlc_llm compiles itself.
    device
        MLC's name of the device.
    overrides
        Of the engine's configuration, by the names that ``serve --overrides`` takes.
    prefix_cache
        ``radix`` or ``disable``.
    start_s, request_s
        Deadlines in seconds, of the start and of requests that are sent together.
    environment
        Variables beside those of this process.
    function_bytes
        Temporary buffer of the library's largest function, ``None`` where it is not told.
    """

    python: str
    model: str
    library: Path | None
    device: str
    overrides: Mapping[str, int | str]
    prefix_cache: str
    start_s: float
    request_s: float
    environment: Mapping[str, str]
    function_bytes: int | None = None

    def command(self, port: int) -> list[str]:
        """The command line."""
        overrides = ";".join(f"{name}={value}" for name, value in self.overrides.items())
        # the flag: of the override of this name mlc_llm serve makes nothing
        return [
            self.python, "-m", "mlc_llm", "serve", self.model, "--device", self.device, "--mode", "server",
            "--prefix-cache-mode", self.prefix_cache, "--overrides", overrides, "--host", HOST, "--port", str(port),
            "--enable-debug", *([] if self.library is None else ["--model-lib", str(self.library)]),
        ]  # fmt: skip


class MlcServer:
    """A server of one design point, up from the constructor on.

    Raises
    ------
    EngineFailed, MemoryError
        If it does not come up before its deadline, with the end of what it printed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="kvsuite-mlc-")
        self._port = _free_port()
        begin = time.monotonic()
        self._process = EngineProcess(
            settings.command(self._port),
            log=Path(self._folder.name) / "log",
            environment=settings.environment,
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        #: seconds from the command to the first answer
        self.start_seconds = time.monotonic() - begin

    @property
    def pid(self) -> int:
        """Of the process group."""
        return self._process.pid

    @property
    def memory(self) -> dict[str, int]:
        """Its own estimate in bytes, rounded as it prints it: ``total_bytes``, ``params_bytes``, …; ``{}`` without it."""
        found = _MEMORY.search(self._process.text())
        return (
            {} if found is None else {f"{part}_bytes": round(float(x) * _MIB) for part, x in found.groupdict().items()}
        )

    @property
    def limits(self) -> dict[str, int | str]:
        """The limits that it says it has; ``{}`` if it printed none."""
        found = _LIMITS.search(self._process.text())
        if found is None:
            return {}
        return {name: int(value) if value.isdigit() else value for name, value in found.groupdict().items()}

    def metrics(self) -> dict[str, Any]:
        """Its counters since the start."""
        answer = self._ask("POST", "/debug/dump_engine_metrics", {"model": self.settings.model})
        found = answer.get("metrics", answer)
        assert isinstance(found, dict)
        return found

    def complete(self, requests: Sequence[ServeRequest], clock: Clock) -> list[Reply]:
        """Send all requests at once, greedily and to exactly the tokens that each wants.

        Raises
        ------
        EngineFailed, MemoryError
            If it fails, dies or hangs; then it is killed.
        """
        bodies = [
            {
                "model": self.settings.model,
                "prompt": list(one.prompt),
                "max_tokens": one.new_tokens,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "debug_config": {"ignore_eos": True},
            }
            for one in requests
        ]
        try:
            return complete(
                self._port, bodies, clock, deadline_s=self.settings.request_s, alive=self._require_alive,
                kill=self._process.kill,
            )  # fmt: skip
        except (RuntimeError, MemoryError, OSError) as error:
            raise self._failure(str(error)) from error

    def stop(self) -> None:
        """Kill it and all it started."""
        self._process.kill()
        self._folder.cleanup()

    def _wait_until_up(self) -> None:
        ends = time.monotonic() + self.settings.start_s
        while True:
            self._require_alive()
            try:
                ask(self._port, "GET", "/v1/models", deadline_s=_ANSWER_S)
                return
            except (OSError, http.client.HTTPException):
                pass
            if time.monotonic() > ends:
                raise self._failure(
                    f"mlc_llm serve did not come up within {self.settings.start_s:g} s and was killed (--kv-mlc-timeout)"
                )
            time.sleep(_POLL_S)

    def _ask(self, method: str, path: str, body: dict[str, Any]) -> Any:
        try:
            return ask(self._port, method, path, body, deadline_s=self.settings.request_s)
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            self._process.kill()
            raise self._failure(f"mlc_llm serve did not answer {path}: {error}") from error

    def _require_alive(self) -> None:
        if self._process.exit_code is not None:
            raise self._failure(f"mlc_llm serve ended with exit code {self._process.exit_code}")
        if _DEAD.search(self._process.text()):
            self._process.wait_until_quiet()
            raise self._failure("mlc_llm serve can answer no more: a thread of it died; it was killed")

    def _failure(self, message: str) -> Exception:
        return failure(message.partition("; the last it printed:")[0], self._process.text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
