"""Two revisions of a git repository side by side, as work trees that are gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kvsuite.errors import UserError

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
WORKING_TREE = "."


@dataclass(frozen=True)
class Revision:
    """A revision that is checked out in ``root``; ``commit`` is ``None`` for the working tree as it is."""

    given: str
    commit: str | None
    root: Path

    @property
    def label(self) -> str:
        """``v1.2 (0a1b2c3d)``."""
        return f"{self.given} ({self.commit[:8]})" if self.commit else f"{self.given} (working tree)"


@contextmanager
def checked_out(base: str, head: str) -> Iterator[tuple[Revision, Revision, Path]]:
    """Check out two revisions of the repository that the current folder is in.

    Either may be ``.``, the working tree as it is, changes and untracked files included. Ctrl-C, SIGTERM and SIGHUP end the
    block like an error, and the work trees are removed whatever ends it.

    Yields
    ------
    tuple
        Both revisions, and the current folder relative to the repository.

    Raises
    ------
    UserError
        If this is no repository or a revision is unknown.
    """
    top = Path(_git(Path.cwd(), "rev-parse", "--show-toplevel", mend="run ab inside a git repository"))
    inside = Path.cwd().resolve().relative_to(top.resolve())
    commits = {
        name: None if given == WORKING_TREE else _commit(top, name, given)
        for name, given in (("BASE", base), ("HEAD", head))
    }
    # what the parent ignores (nohup) stays ignored
    ours = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _interrupt)
    made: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(prefix="kvsuite-ab-") as folder:
            found = []
            try:
                for (name, commit), given in zip(commits.items(), (base, head), strict=True):
                    root = top
                    if commit is not None:
                        root = Path(folder) / name.lower()
                        made.append(root)
                        _git(top, "worktree", "add", "--quiet", "--detach", str(root), commit, mend="see git's message")
                    found.append(Revision(given, commit, root))
                yield found[0], found[1], inside
            finally:
                for root in made:
                    _run(top, "worktree", "remove", "--force", str(root))
        _run(top, "worktree", "prune")
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def git_free_environment() -> dict[str, str]:
    """The environment without what a git hook sets: it would send every git of a work tree to the hook's repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def _commit(top: Path, name: str, given: str) -> str:
    mend = f"{name}={given}: give a branch, a tag, a commit, or . for the working tree"
    return _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{given}^{{commit}}", mend=mend)


def _git(folder: Path, *arguments: str, mend: str) -> str:
    done = _run(folder, *arguments)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise UserError(f"git {arguments[0]} failed{f' ({said})' if said else ''}; {mend}")
    return done.stdout.strip()


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, env=git_free_environment()
        )
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name
        raise UserError(f"git cannot be run ({error}); install it, or check the revisions") from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
