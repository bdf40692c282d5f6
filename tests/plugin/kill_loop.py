"""A sweep whose process is killed at random, and taken up again, until it is done. Run as a script, to load torch once.

Every try is a fork of this process, which has torch; the fork runs pytest and is killed after a random time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time


def one_try(arguments: list[str], patience: float | None) -> int:
    """Run pytest in a fork; kill it after ``patience`` seconds. Its exit status, negative for a signal."""
    import pytest

    child = os.fork()
    if not child:
        code = 70
        try:
            for stream in (1, 2):
                os.dup2(os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.argv = ["pytest", *arguments]
            code = int(pytest.main(["--color=no", *arguments]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.005)


def main() -> None:
    """Read ``{arguments, kills, seed, longest_s}``, print ``{killed, tries, code}``."""
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    told = json.load(sys.stdin)
    dice = random.Random(told["seed"])
    arguments, killed, tries, code = told["arguments"], 0, 0, None
    while killed < told["kills"] or code is None or code < 0:
        # a sweep that ended before its kills were used up begins anew: a run of its own, beside the finished one
        if code is not None and code >= 0:
            print(json.dumps({"sweep": tries}), file=sys.stderr)
        again = ["--kv-resume=latest"] if code is not None and code < 0 else []
        patience = dice.uniform(0.0, told["longest_s"]) if killed < told["kills"] else None
        code = one_try([*arguments, *again], patience)
        killed += code == -signal.SIGKILL
        tries += 1
        if code > 0:
            break
    print(json.dumps({"killed": killed, "tries": tries, "code": code}))


if __name__ == "__main__":
    main()
