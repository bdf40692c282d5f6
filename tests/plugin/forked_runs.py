"""Many short runs of pytest for the price of one: torch is imported once, then every run is a fork with a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pytest_runs import Run, clean_environment

# kvsuite itself is not imported before the fork: pytest has to do that, to rewrite its asserts
_DRIVER = """
import json, os, sys
import torch, transformers, pytest, datasets
import transformers.models.llama.modeling_llama

codes = []
for folder, name, arguments in json.load(sys.stdin):
    child = os.fork()
    if not child:
        code = 70
        try:
            os.chdir(folder)
            for stream, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}.{end}.txt", os.O_WRONLY | os.O_CREAT), stream)
            sys.argv = ["pytest", *arguments]
            code = int(pytest.main(["--color=no", *arguments]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@dataclass
class Planned:
    """One run: its folder, with everything that it needs, and its command line."""

    folder: Path
    arguments: tuple[str, ...]


def run_forked(planned: dict[str, Planned]) -> dict[str, Run]:
    """Run them one after another, in the order given; several may share a folder."""
    lines = [[str(one.folder), f"run{at}", list(one.arguments)] for at, one in enumerate(planned.values())]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _DRIVER],
        env=clean_environment(), input=json.dumps(lines), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return {
        name: Run(
            code,
            (one.folder / f"run{at}.out.txt").read_text(),
            (one.folder / f"run{at}.err.txt").read_text(),
            one.folder,
        )
        for at, ((name, one), code) in enumerate(zip(planned.items(), codes, strict=True))
    }
