"""Prompts of a folder of .jsonl, .json and .csv files, as people collect them: questions, instructions, conversations."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.options.paths import expanded

#: the first of these that holds a text is the prompt of a row
KEYS = ("prompt", "text", "question", "query", "instruction", "input")
_DIALOGUES = ("conversations", "messages")
_SUFFIXES = (".jsonl", ".json", ".csv")
_OPTION = "--kv-dataset-dir"


def folder_prompts(folder: str) -> Iterator[str]:
    """The prompts of a folder, of its files in the order of their names, sub-folders too.

    A row's prompt is the first of `KEYS` that holds a text, else what a user said first in ``conversations`` or ``messages``;
    a row that has none is left out.

    Parameters
    ----------
    folder
        With .jsonl files (an object a line), .json files (a list of objects, or one), .csv files (names of columns first).

    Raises
    ------
    UserError
        If it is no folder, has no such file, or one cannot be read.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise UserError(f"{_OPTION}={folder}: no such folder; give one with .jsonl, .json or .csv files")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{_OPTION}={folder}: has no .jsonl, .json or .csv file; give a folder that has")
    for file in files:
        try:
            for row in _rows(file):
                if prompt := _prompt(row):
                    yield prompt
        except (OSError, ValueError, csv.Error) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(f"{_OPTION}={folder}: {file.name} cannot be read ({reason}); mend or remove it") from error


def _rows(file: Path) -> Iterator[Any]:
    # only \n ends a line of JSON: it may hold the other characters that Python takes for line ends
    if file.suffix.lower() == ".jsonl":
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parsed(line, number)
    elif file.suffix.lower() == ".json":
        found = json.loads(file.read_bytes().decode("utf-8-sig"))
        yield from found if isinstance(found, list) else [found]
    else:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines)


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg}, column {error.colno}") from error


def _prompt(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    for key in KEYS:
        if isinstance(row.get(key), str) and row[key].strip():
            return str(row[key])
    for key in _DIALOGUES:
        turns = row.get(key)
        for turn in turns if isinstance(turns, list) else []:
            said = _said_by_user(turn) if isinstance(turn, dict) else None
            if said is not None:
                return said
    return None


def _said_by_user(turn: dict[str, Any]) -> str | None:
    if turn.get("role", turn.get("from")) not in ("human", "user"):
        return None
    said = turn.get("content", turn.get("value"))
    return said if isinstance(said, str) and said.strip() else None
