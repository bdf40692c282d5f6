"""Many runs of pytest for the price of one: a process loads torch once, and every run is a fork of it with its own folder."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from child_processes import end_group

_LIMIT_S = 600
# kvsuite and the plugins of pytest are not loaded before the fork: pytest rewrites their asserts while it loads them
_SERVER = """
import contextlib, gc, importlib, json, os, sys
import pytest
for name in (
    "torch", "transformers.models.llama.modeling_llama", "datasets", "jinja2", "jsonschema", "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_pdf", "rich.table", "scipy.stats",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
# what the first checkpoint of a process waits for
with contextlib.suppress(ImportError):
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
# a measurement collects garbage, and need not look at what was loaded here
gc.collect()
gc.freeze()

for line in sys.stdin:
    folder, arguments, environment, out, err = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for stream, path in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
        sys.path[0] = folder  # as python -m pytest does
        sys.argv = ["pytest", *arguments]
        sys.exit(pytest.main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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

    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), clean_environment().get("PYTHONPATH"))))
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=clean_environment() | {"PYTHONPATH": path}, start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        # no run is under way, or this process was told to end
        end_group(server)
        server.communicate()

    atexit.register(end)
    return server
