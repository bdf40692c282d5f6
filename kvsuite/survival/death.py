"""What killed a process, and the row of the case that it was measuring."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cause:
    """Why a process ended.

    Parameters
    ----------
    kind
        ``SIGSEGV``, ``exit code 3``, ``Timeout``.
    reason
        In words.
    """

    kind: str
    reason: str


def cause_of(returncode: int | None) -> Cause:
    """Cause of death by a process's exit status, as `subprocess` gives it: negative for a signal."""
    if returncode is None:
        return Cause("unknown", "its process is gone, and how it ended is not known")
    if returncode >= 0:
        return Cause(
            f"exit code {returncode}", f"its process ended with exit code {returncode} in the middle of the case"
        )
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    # who sent it cannot be known
    hint = "; the kernel sends it too where memory runs out" if name == "SIGKILL" else ""
    return Cause(name, f"its process was ended by {name} (signal {-returncode}){hint}")


def crashed_row(entry: Mapping[str, Any], cause: Cause) -> dict[str, Any]:
    """The row of the case whose process died, from what its black box says.

    Parameters
    ----------
    entry
        As `kvsuite.survival.black_box.read_box` returns it.
    cause
        Of death.
    """
    row = dict(entry["row"])
    row["status"] = "crashed"
    row["reason"] = cause.reason
    row["duration_s"] = time.monotonic() - float(entry["began"])
    row["error"] = {"type": cause.kind, "message": cause.reason, "phase": entry["phase"], "traceback": None}
    return row


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it is gone, so that no orphan keeps a GPU (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
