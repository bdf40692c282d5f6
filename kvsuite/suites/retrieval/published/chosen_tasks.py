"""The tasks that ``--kv-lm-eval`` and ``--kv-tasks-path`` name, read once."""

from __future__ import annotations

import functools
from itertools import islice
from pathlib import Path

from kvsuite.errors import UserError
from kvsuite.options.paths import expanded
from kvsuite.options.resolve import Options
from kvsuite.suites.retrieval.options import RetrievalOptions

from .lm_eval_tasks import load_lm_eval_tasks
from .longbench import is_longbench, read_longbench
from .published_task import PublishedTask
from .ruler import is_ruler, read_ruler
from .task_file import OPTION, TaskFile, read_lines, refused

_SUFFIXES = (".jsonl", ".json")
# of a line that is nobody's: keys that are named, and letters of each
_KEYS, _KEY = 10, 40


def chosen_tasks(options: Options) -> dict[str, PublishedTask]:
    """The tasks by name, in the order in which they were asked for.

    Raises
    ------
    UserError
        If a task, a file or a line of one cannot be read, or two tasks have one name.
    """
    own = options.of(RetrievalOptions)
    return _tasks(own.lm_eval or (), own.tasks_path)


@functools.lru_cache(maxsize=4)
def _tasks(lm_eval: tuple[str, ...], path: str | None) -> dict[str, PublishedTask]:
    found: dict[str, PublishedTask] = {}
    for asked in lm_eval:
        for task in load_lm_eval_tasks(asked):
            if task.name in found:
                raise UserError(
                    f"--kv-lm-eval={asked}: task {task.name.removeprefix('lm_eval_')} is named twice; name it once"
                )
            found[task.name] = task
    for file in _files(path) if path else ():
        read = read_task_file(file)
        other = found.get(read.name)
        if isinstance(other, TaskFile):
            raise UserError(
                f"{OPTION}={path}: {other.path} and {file} are both {read.name}; give one of them, "
                "or RULER's own folders, <length>/data/<task>"
            )
        found[read.name] = read
    return found


def _files(typed: str) -> list[Path]:
    path = expanded(typed)
    if path.is_file():
        return [path]
    files = sorted(one for one in path.rglob("*") if one.suffix in _SUFFIXES and one.is_file()) if path.is_dir() else []
    if not files:
        what = "has no .jsonl file" if path.is_dir() else "is no regular file" if path.exists() else "is not there"
        raise UserError(f"{OPTION}={typed}: {what}; give a file of RULER or LongBench, or a folder of them")
    return files


def _named(keys: list[str]) -> str:
    """The first keys of a line; it may have thousands, or long ones."""
    shown = ", ".join(key if len(key) <= _KEY else f"{key[:_KEY]}..." for key in keys[:_KEYS]) or "none"
    return " ".join(shown.split()) + (f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else "")


def read_task_file(path: Path) -> TaskFile:
    """The task of one file.

    Raises
    ------
    UserError
        Naming the line of what is neither RULER's nor LongBench's, or broken.
    """
    lines = read_lines(path)
    first = list(islice(lines, 1))
    if not first:
        raise UserError(f"{OPTION}={path}: has no lines; give a file of RULER or LongBench")
    [(number, found)] = first
    if not is_ruler(found) and not is_longbench(found):
        raise refused(
            path, number,
            "has neither RULER's fields (index, input, outputs) nor LongBench's (input, context, answers, dataset, "
            f"all_classes): it has {_named(sorted(found))}",
        )  # fmt: skip
    read = read_ruler if is_ruler(found) else read_longbench
    return read(path, [*first, *lines])
