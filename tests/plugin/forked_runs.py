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
for folder, arguments in json.load(sys.stdin):
    child = os.fork()
    if not child:
        code = 70
        try:
            os.chdir(folder)
            for stream, name in ((1, "out.txt"), (2, "err.txt")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
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
    """Run them one after another, in the order given."""
    lines = [[str(one.folder), list(one.arguments)] for one in planned.values()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _DRIVER],
        env=clean_environment(), input=json.dumps(lines), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return {
        name: Run(code, (one.folder / "out.txt").read_text(), (one.folder / "err.txt").read_text(), one.folder)
        for (name, one), code in zip(planned.items(), codes, strict=True)
    }
