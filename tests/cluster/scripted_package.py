"""A package of somebody else whose cases take no time and load nothing: what a sweep does then is the sweep's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULE = """
import ctypes
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, Session
from kvsuite.suites.suite import Suite

SCRIPT = json.loads((Path(__file__).parent / "script.json").read_text())


class ScriptedSession(Session):
    device = SimpleNamespace(type="cpu", index=None)
    dtype_name, tokenizer, vocab_size = "float32", None, 256

    def prepare(self, case):
        self.effective = {"pid": os.getpid()}

    def serve(self, requests, clock=None):
        raise NotImplementedError

    memory = reach = full_kv_bytes = serve


class ScriptedEngine(Engine):
    name = "scripted"

    def unavailable(self, device):
        return None

    def version(self):
        return {"scripted": "1"}

    def load(self, case, settings):
        return ScriptedSession()


class ScriptedSuite(Suite):
    name = "scripted"
    headline = ("kv_bytes_exact",)

    def cases(self, options):
        return [
            Case("scripted", "scripted", f"dummy:{one['model']}", one["name"], "cpu", "float32", params=one)
            for one in SCRIPT["cases"]
        ]

    def measure(self, case, session, run):
        run.phase("decode")
        does, begun = case.params["does"], time.time()
        with (Path(__file__).parent / "began.txt").open("a") as file:
            file.write(f"{case.name} {os.getpid()}\\n")
        if does == "segfault":
            ctypes.string_at(0)
        elif does == "leave":
            os._exit(3)
        elif does == "hang":
            # a lock that is taken twice never comes back, with the interpreter's lock held
            library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)
        elif does == "fail":
            raise ValueError("planted")
        else:
            time.sleep(float(does))
        run.found.put("kv_bytes_exact", case.params["bytes"])
        run.found.samples["clock"] = [begun, time.time()]
        return run.found
"""
POINTS = """[kvsuite.suites]
scripted = scripted_sweep:ScriptedSuite

[kvsuite.engines]
scripted = scripted_sweep:ScriptedEngine
"""
BENCHMARK = """
import pytest


@pytest.mark.kv_suite("scripted")
def test_scripted(kv_case, kv_run):
    kv_run(kv_case)
"""


def install(folder: Path, cases: list[dict[str, Any]]) -> Path:
    """Write the package; what is returned belongs on ``sys.path``.

    Parameters
    ----------
    folder
        An existing one.
    cases
        ``name``, ``model``, ``bytes`` and what the case ``does``: seconds that it sleeps, or how its process ends.
    """
    (folder / "scripted_sweep.py").write_text(MODULE)
    (folder / "script.json").write_text(json.dumps({"cases": cases}))
    told = folder / "scripted_sweep-1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted-sweep\nVersion: 1\n")
    (told / "entry_points.txt").write_text(POINTS)
    (told / "RECORD").write_text("scripted_sweep.py,,\n")
    return folder


def cases(count: int, *, does: str = "0", **others: str) -> list[dict[str, Any]]:
    """So many cases of two models; ``c3="segfault"`` lets one do something else."""
    return [
        {
            "name": f"c{index}",
            "model": ("tiny", "Qwen3-0.6B")[index % 2],
            "bytes": 1000 + index,
            "does": others.get(f"c{index}", does),
        }
        for index in range(count)
    ]


def began(folder: Path) -> list[str]:
    """Names of the cases in the order in which any process began to measure them."""
    path = folder / "began.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []
