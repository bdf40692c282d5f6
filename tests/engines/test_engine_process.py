"""Processes of engines: deadlines are kept, nothing outlives us, and what was printed is in the message. Real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from child_processes import child_process

from kvsuite.engines import engine_process
from kvsuite.engines.engine_process import EngineFailed, EngineProcess, engine_pids, run_step, tail

# a child that starts another one and says its id: what mlc_llm's compiler does
NESTED = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print('child', child.pid, flush=True); time.sleep(600)"
)
HOST = """
import sys, time
from pathlib import Path
from kvsuite.engines.engine_process import EngineProcess
process = EngineProcess([sys.executable, "-c", sys.argv[1]], log=Path(sys.argv[2]))
print(process.pid, flush=True)
time.sleep(600)
"""


def test_frames_without_symbols_do_not_push_the_cause_out() -> None:
    frames = [f'  File "<unknown>", line 0, in _PyObject_{index}' for index in range(40)]
    own = '  File "compile.py", line 206, in _compile'
    assert (
        tail("\n".join([own, "!!!!!!! Segfault encountered !!!!!!!", *frames]))
        == f"{own}\n!!!!!!! Segfault encountered !!!!!!!"
    )


def until(true: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + 30
    while not true():
        assert time.monotonic() < ends, what
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process is no more, or waits for nobody but init to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it went between opening and reading
        return True


def nested_pid(log: Path) -> int:
    until(
        lambda: log.exists() and re.search(r"child \d+\n", log.read_text()) is not None,
        "the nested process did not start",
    )
    return int(log.read_text().split()[1])


def test_a_step_gives_what_it_printed(tmp_path: Path) -> None:
    script = "import os, sys; print('out'); sys.stdout.flush(); os.write(2, b'\\x1b[31merr\\x1b[0m\\n')"
    assert run_step("x", [sys.executable, "-c", script], log=tmp_path / "log", deadline_s=60) == "out\nerr\n"


def test_a_step_that_fails_ends_with_its_last_lines(tmp_path: Path) -> None:
    script = "import sys; [print('line', i) for i in range(100)]; sys.exit('ValueError: no such device')"
    with pytest.raises(EngineFailed, match="mlc_llm compile failed with exit code 1") as raised:
        run_step("mlc_llm compile", [sys.executable, "-c", script], log=tmp_path / "log", deadline_s=60)
    assert str(raised.value).endswith("line 98\nline 99\nValueError: no such device")
    assert "line 80\n" not in str(raised.value)


@pytest.mark.parametrize(
    "line",
    ["tvm.error.InternalError: std::bad_alloc", "Insufficient GPU memory error: The available", "CUDA: out of memory"],
)
def test_a_step_that_runs_out_of_memory_is_told_apart(line: str, tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match=line.split(":")[-1].strip()):
        run_step("x", [sys.executable, "-c", f"raise SystemExit({line!r})"], log=tmp_path / "log", deadline_s=60)


def test_a_signal_is_an_exit_code(tmp_path: Path) -> None:
    script = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"
    with pytest.raises(EngineFailed, match=f"exit code {128 + signal.SIGSEGV}"):
        run_step("x", [sys.executable, "-c", script], log=tmp_path / "log", deadline_s=60)


def test_the_key_of_a_server_is_in_no_environment_but_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_SERVER_KEY", "sk-secret")
    monkeypatch.setenv("KV_OTHER", "stays")
    script = "import os; print(sorted(name + '=' + is_ for name, is_ in os.environ.items() if name.startswith('KV_')))"
    printed = run_step("x", [sys.executable, "-c", script], log=tmp_path / "log", deadline_s=60)
    assert "'KV_OTHER=stays'" in printed
    assert "KV_SERVER_KEY" not in printed
    # the guard's neither
    script = "import os; print(b'sk-secret' in open(f'/proc/{os.getppid()}/environ', 'rb').read())"
    if Path("/proc/self/environ").exists():
        assert run_step("x", [sys.executable, "-c", script], log=tmp_path / "guard", deadline_s=60) == "False\n"


def test_a_command_that_cannot_be_started_is_a_line(tmp_path: Path) -> None:
    for command, said in (("/nowhere/python", "No such file or directory"), (str(tmp_path), "Permission denied")):
        with pytest.raises(EngineFailed, match=r"^x failed with exit code 127") as raised:
            run_step("x", [command, "-c", "pass"], log=tmp_path / said, deadline_s=60)
        assert (tmp_path / said).read_text() == f"{command}: {said}\n"
        assert str(raised.value).endswith(f"{command}: {said}")


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(EngineFailed, match="mlc_llm compile was killed after 1 s"):
        run_step("mlc_llm compile", [sys.executable, "-c", NESTED], log=log, deadline_s=1)
    until(lambda: gone(nested_pid(log)), "its child lives")


def test_all_that_an_engine_has_started_is_known_and_stays_so_for_a_while_when_it_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    with EngineProcess(["sh", "-c", "sleep 60 & echo $!; wait"], log=log) as process:
        while not (printed := log.read_text().strip()):
            time.sleep(0.01)
        assert {process.pid, int(printed)} <= engine_pids()
    # a driver lists them for a moment longer, when the case asks who else was there
    assert {process.pid, int(printed)} <= engine_pids()
    assert os.getpid() not in engine_pids()
    # and an id is given to a stranger some day
    monkeypatch.setattr(engine_process, "_LISTED_S", 0.0)
    assert not {process.pid, int(printed)} & engine_pids()


def test_an_interrupt_here_ends_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), EngineProcess([sys.executable, "-c", NESTED], log=log):  # noqa: PT012
        child = nested_pid(log)
        raise KeyboardInterrupt
    until(lambda: gone(child), "its child lives")


def test_what_an_ended_command_left_behind_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_step("x", [sys.executable, "-c", NESTED.rpartition(";")[0]], log=log, deadline_s=60)
    until(lambda: gone(nested_pid(log)), "its child lives")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_all_die_with_us(how: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", HOST, NESTED, str(log)]
    with child_process(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as us:
        assert us.stdout is not None
        guard = int(us.stdout.readline())
        child = nested_pid(log)
        assert os.getpgid(child) == guard != os.getpgid(us.pid)
        us.send_signal(how)
        us.wait(timeout=30)
    until(lambda: gone(guard) and gone(child), "they live")
