"""The worker of vLLM from our side: started, asked one thing at a time, and killed with a reason where it hangs or dies."""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsuite.engines.engine_process import EngineFailed, EngineProcess, failure

from .install import VllmInstall

_WORKER = Path(__file__).with_name("worker.py")
_POLL_S = 0.5
# a process that has closed its end is about to end
_LAST_WORDS_S = 5.0
#: vLLM's own words where memory is short, beside those of every process
_NO_ROOM = (
    "KV cache is needed", "available KV cache memory", "No available memory for the cache blocks", "OutOfMemoryError",
    "out of memory", "is less than requested memory for kv", "Free memory on device", "Available memory on node",
)  # fmt: skip


class VllmWorker:
    """A process that has imported vLLM and starts engines one after the other.

    Parameters
    ----------
    install
        The vLLM.
    environment
        Variables beside those of this process.
    deadline_s
        Seconds for importing it, and for every answer.

    Raises
    ------
    EngineFailed
        If it does not come up before the deadline, with the end of what it printed.
    """

    def __init__(self, install: VllmInstall, environment: Mapping[str, str], deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._folder = tempfile.TemporaryDirectory(prefix="kvsuite-vllm-")
        self._ours, theirs = socket.socketpair()
        self._rest = b""
        try:
            with theirs:
                self._process = EngineProcess(
                    [install.interpreter, "-P", str(_WORKER), str(theirs.fileno())],
                    log=Path(self._folder.name) / "log",
                    # what it makes of temporary files goes with the folder
                    environment={**environment, "TMPDIR": self._folder.name},
                    without=install.without,
                    channel=theirs.fileno(),
                )
        except BaseException:
            self._ours.close()
            self._folder.cleanup()
            raise
        try:
            #: what it said when it had imported vLLM
            self.hello = self._answer("importing vllm")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process group."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it answers no more."""
        return self._process.exit_code is not None

    def printed(self) -> str:
        """All that vLLM has printed."""
        return self._process.text()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One answer.

        Raises
        ------
        EngineFailed, MemoryError
            If vLLM fails, dies or hangs; in the latter two cases it is killed.
        """
        self._ours.settimeout(self._deadline_s)
        try:
            self._ours.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except OSError as error:
            self.kill()
            raise failure(f"vLLM is gone before it was asked for {do}: {error}", self.printed()) from error
        except BaseException:
            self.kill()
            raise
        return self._answer(do)

    def kill(self) -> None:
        """End it and all it started."""
        self._process.kill()

    def close(self) -> None:
        """End it and leave nothing behind."""
        self._process.kill()
        self._ours.close()
        self._folder.cleanup()

    def _answer(self, what: str) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(self._line(what))
        except BaseException:
            self.kill()
            raise
        if "error" in answer:
            raise self._told(what, answer["error"], answer["causes"])
        return answer

    def _line(self, what: str) -> bytes:
        ends, parts = time.monotonic() + self._deadline_s, [self._rest]
        self._ours.settimeout(_POLL_S)
        while b"\n" not in parts[-1]:
            try:
                part = self._ours.recv(1 << 20)
            except TimeoutError:
                if time.monotonic() > ends:
                    raise failure(
                        f"vLLM did not answer ({what}) within {self._deadline_s:g} s and was killed (--kv-vllm-timeout)",
                        self.printed(),
                    ) from None
                continue
            except OSError:
                part = b""
            if not part:
                code = self._process.wait(_LAST_WORDS_S)
                raise failure(f"vLLM ended ({what}) with exit code {code}", self.printed())
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def _told(self, what: str, error: str, causes: list[str]) -> Exception:
        """The error of an answer, in one line where vLLM says in one what is wrong."""
        words = next((one for one in [error, *causes] if any(mark in one for mark in _NO_ROOM)), None)
        if words is not None:
            return MemoryError(
                f"vLLM has no room ({what}): {' '.join(words.split())}; lower the batch, the context or "
                "--kv-vllm-pool-bytes"
            )
        return EngineFailed(f"vLLM failed ({what}): {' '.join(error.split())}")
