"""The guard of what engines start: a command and all its children die with whoever started the guard.

Run by its path, since nothing of kvsuite is needed here. Standard input is a pipe of which only the starter has the other
end: it ends when the starter dies, however that happens, and the guard then kills the process group that it leads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

#: what a shell makes of a command that a signal ended
_SIGNALLED = 128
#: and of one that cannot be started
_NOT_FOUND = 127


def main(channel: str, command: list[str]) -> int:
    """Run a command to its end, with the descriptor ``channel`` (empty for none) beside its own three; its exit code."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(int(channel),) if channel else ())
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return _NOT_FOUND
    if channel:
        # who is at the other end sees when the command has closed it
        os.close(int(channel))
    threading.Thread(target=_die_with_the_starter, daemon=True).start()
    code = child.wait()
    return code if code >= 0 else _SIGNALLED - code


def _die_with_the_starter() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
