"""What `forked_runs` starts: it loads torch once, and every run of pytest and every worker of xdist is a fork of it.

A run is a line on the standard input: folder, program and arguments, environment and the files of its streams. It is answered
by the process id of the run, and by its exit code when it is over. The program is ``pytest``, or a module to be run.
A worker comes over a socket: xdist starts ``sys.executable``, which in a run is a `worker_launcher`, and that hands on what it
was given, its streams included.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import sys
import threading
import warnings
from importlib.metadata import Distribution, PathDistribution, entry_points
from pathlib import Path
from typing import Any, NoReturn

# other plugins of pytest are not loaded before the fork: pytest rewrites their asserts while it loads them. kvsuite's asserts
# say the same without, and its modules and the hash of its code are a third of a run on the tiny dummy model
PRELOADED = (
    "pytest", "torch", "transformers.models.llama.modeling_llama", "datasets", "jinja2", "jsonschema",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf", "rich.table", "scipy.stats",
    "execnet.multi", "execnet.rsync_remote", "pdb", "rich._unicode_data.unicode17-0-0", "rich.console",
    "kvsuite.plugin.run", "kvsuite.plugin.measuring", "kvsuite.plugin.suite_figures", "kvsuite.comparison.compare",
    "kvsuite.distribution.plan", "kvsuite.distribution.recorded", "kvsuite.engines.hf.engine", "kvsuite.engines.hf.session",
    "kvsuite.engines.llamacpp.options", "kvsuite.engines.mlc.engine", "kvsuite.engines.nano.engine",
    "kvsuite.engines.server.options", "kvsuite.engines.vllm.options", "kvsuite.store.store",
    "kvsuite.measure.divergence", "kvsuite.measure.energy", "kvsuite.measure.runner", "kvsuite.measure.single_request",
    "kvsuite.meters.bandwidth", "kvsuite.meters.gpu_processes", "kvsuite.models.measurable",
    "kvsuite.reporting.gathered_csv", "kvsuite.reporting.page.render", "kvsuite.suites.compression.figure",
    "kvsuite.suites.compression.divergence_figure", "kvsuite.suites.compression.results_json",
    "kvsuite.suites.compression.suite", "kvsuite.suites.compression.table", "kvsuite.suites.dse.suite",
    "kvsuite.suites.perplexity.suite", "kvsuite.suites.pipeline.suite", "kvsuite.suites.retrieval.suite",
    "kvsuite.suites.sensitivity.suite",
)  # fmt: skip
# the kernel takes no line of an interpreter with a space in its path, nor a long one: the shell starts it
LAUNCHER = """#!/bin/sh
exec {python} -IS {program} "$@"
"""
HAND_ON = """import json, os, signal, socket, sys
if sys.argv[1:3] != ["-u", "-c"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [json.dumps([os.getcwd(), dict(os.environ), sys.argv[3]]).encode()], [0, 1, 2])
server.shutdown(socket.SHUT_WR)
# the worker alone holds its pipes: their end is its end
for stream in (0, 1):
    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
code = int(server.recv(16) or -signal.SIGKILL)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def become(folder: str, environment: dict[str, str], streams: list[int]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    # this process ignores warnings (`-W ignore`), a run does not; filters of what was loaded stay, as where a run loads it
    sys.warnoptions.remove("ignore")
    kept = [one for one in warnings.filters if one != ("ignore", None, Warning, None, 0)]
    warnings.resetwarnings()
    warnings.filters[:] = kept
    # what Python reads when it starts; the folder of this file stays, for a run's plugins of ours
    sys.path[:0] = [
        folder,
        *(entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", *sys.path)),
    ]
    importlib.invalidate_caches()


def serve_workers(listener: socket.socket, alive: int) -> str:
    """Fork a worker for whoever connects, until ``alive`` is closed; in a worker, return its program."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if alive in select.select([listener, alive], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        told, streams = b"", []
        while part := socket.recv_fds(connection, 1 << 16, 3):
            told, streams = told + part[0], [*streams, *part[1]]
            if not part[0]:
                break
        # one process waits for the worker, so that the launcher ends as it does
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if worker := os.fork():
            for stream in streams:
                os.close(stream)
            with contextlib.suppress(OSError):
                connection.send(str(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])).encode())
            os._exit(0)
        connection.close()
        folder, environment, program = json.loads(told)
        become(folder, environment, streams)
        return str(program)


def remember_installed() -> None:
    """Keep what is read of installed packages: every run reads all entry points and thirty versions, a quarter of its time."""
    known: dict[tuple[str, str], Any] = {}

    def remembered(name: str) -> property:
        read = getattr(Distribution, name).fget

        def once(told: Any) -> Any:
            # what a test installs lies in a folder of its own
            key = name, str(told._path)
            if key not in known:
                known[key] = read(told)
            return known[key]

        return property(once)

    for name in ("metadata", "entry_points"):
        setattr(PathDistribution, name, remembered(name))
    importlib.import_module("kvsuite.meters.environment").host_facts(["pytest"])
    entry_points()


def preload() -> None:
    """Load what a run needs, so that its forks have it."""
    remember_installed()
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # what the first checkpoint of a process waits for
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    importlib.import_module("kvsuite.measure.source_hash").source_hash()
    # this file's folder is where it is started from
    importlib.import_module("coarse_figures").draw_coarsely()
    importlib.import_module("kvsuite.reporting.page.render").page_template()
    # a measurement collects garbage, and need not look at what was loaded here
    gc.collect()
    gc.freeze()


def leave(code: object) -> NoReturn:
    """End this process as `sys.exit` does, but for the interpreter's last look at all objects.

    That look is half of a run's time: what a fork shares with the process that it was forked from is copied for it.
    """
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def run(program: str, arguments: list[str]) -> object:
    """Run ``pytest`` or a module; what it would tell `sys.exit`."""
    try:
        if program == "pytest":
            import pytest

            return pytest.main(arguments)
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code
    return None


def main() -> None:
    preload()
    python = sys.executable
    place = Path(sys.argv[1])
    address, launcher = str(place / "workers"), place / "python"
    hand_on = place / "hand_on.py"
    hand_on.write_text(HAND_ON.format(python=python, address=address))
    launcher.write_text(LAUNCHER.format(python=shlex.quote(python), program=shlex.quote(str(hand_on))))
    launcher.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    alive, ours = os.pipe()
    if not os.fork():
        os.close(ours)
        program = serve_workers(listener, alive)
        sys.executable, sys.argv = python, ["-c"]
        exec(program, {"__name__": "__main__"})
        leave(0)
    for line in sys.stdin:
        folder, arguments, environment, *files = json.loads(line)
        if not (child := os.fork()):
            os.close(ours)
            become(folder, environment, [os.open(path, os.O_RDWR | os.O_CREAT) for path in (os.devnull, *files)])
            program, *arguments = arguments
            sys.executable, sys.argv = str(launcher), [program, *arguments]
            leave(run(program, arguments))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
