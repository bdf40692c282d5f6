"""What the helper for processes promises: signals that our parent ignores reach them, and none outlives its block."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from child_processes import child_process, hand_on_default_signals

# one that starts another and waits for it, its output still open
NESTED = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']);"
    "print(child.pid, flush=True); child.wait()"
)
IGNORED = """
import signal, subprocess, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
from child_processes import hand_on_default_signals
if sys.argv[2] == "handed on":
    hand_on_default_signals()
say = "import signal; print(*(signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGHUP, signal.SIGINT)))"
signal.raise_signal(signal.SIGHUP)
signal.raise_signal(signal.SIGINT)
print(subprocess.check_output([sys.executable, "-c", say], text=True, timeout=60))
"""


@pytest.mark.parametrize(("how", "said"), [("as it was", "True True"), ("handed on", "False False")])
def test_what_our_parent_ignores_reaches_our_children_and_not_us(how: str, said: str) -> None:
    command = [sys.executable, "-c", IGNORED, str(Path(__file__).parent), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, said, "")


def test_handlers_that_are_there_stay() -> None:
    before = signal.getsignal(signal.SIGTERM)
    hand_on_default_signals()
    assert signal.getsignal(signal.SIGTERM) is before


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until_gone(pid: int) -> None:
    ends = time.monotonic() + 30
    while not is_gone(pid):
        assert time.monotonic() < ends, "it lives"
        time.sleep(0.01)


def test_a_block_that_fails_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), child_process([sys.executable, "-c", NESTED], stdout=subprocess.PIPE) as us:  # noqa: PT012
        assert us.stdout is not None
        nested = int(us.stdout.readline())
        _ = 1 / 0
    assert us.returncode == -signal.SIGKILL
    until_gone(nested)


def test_a_process_that_hangs_is_ended_with_what_it_started() -> None:
    with child_process([sys.executable, "-c", NESTED], limit_s=2, stdout=subprocess.PIPE) as us:
        # the end of the output: nobody is left who could write
        out, _ = us.communicate()
    assert us.returncode == -signal.SIGKILL
    assert out.count(b"\n") <= 1
