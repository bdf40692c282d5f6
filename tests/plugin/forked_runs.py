"""Many runs of pytest for the price of one: a process loads torch once, and every run is a fork of it with its own folder."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from child_processes import end_group

_LIMIT_S = 600
_SERVER = Path(__file__).with_name("fork_server.py")


def run_forked(folder: Path, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> int:
    """Run pytest in ``folder`` with this environment, streams into files; returns the exit code."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([str(folder), arguments, environment, str(out), str(err)]) + "\n")
    server.stdin.flush()
    limit = threading.Timer(_LIMIT_S, end_group, [server])
    limit.start()
    try:
        code = server.stdout.readline()
    finally:
        limit.cancel()
    assert code, f"pytest {' '.join(arguments)}: no end within {_LIMIT_S} s"
    return int(code)


@functools.cache
def _server() -> subprocess.Popen[str]:
    from pytest_runs import clean_environment

    place = tempfile.mkdtemp(prefix="kvsuite-forks-")
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(_SERVER), place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=clean_environment(), start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        # no run is under way, or this process was told to end
        end_group(server)
        server.communicate()
        shutil.rmtree(place)

    atexit.register(end)
    return server
