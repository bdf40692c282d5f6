from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvsuite.errors import UserError
from kvsuite.workloads.prompt_folder import KEYS, folder_prompts


def write_lines(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("key", KEYS)
def test_each_key(tmp_path: Path, key: str) -> None:
    write_lines(tmp_path / "a.jsonl", {"id": 1, key: "a question"})
    assert list(folder_prompts(str(tmp_path))) == ["a question"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({key: key for key in reversed(KEYS)}, "prompt"),
        ({"prompt": " ", "text": "t"}, "t"),
        ({"prompt": 7, "input": "i", "messages": [{"role": "user", "content": "m"}]}, "i"),
        ({"conversations": [{"from": "gpt", "value": "no"}, {"from": "human", "value": "first"}]}, "first"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}, "u"),
        ({"messages": [{"role": "user", "content": "u1"}, {"role": "user", "content": "u2"}]}, "u1"),
    ],
)
def test_which_text_of_a_row(tmp_path: Path, row: Any, prompt: str) -> None:
    write_lines(tmp_path / "a.jsonl", row)
    assert list(folder_prompts(str(tmp_path))) == [prompt]


@pytest.mark.parametrize(
    "row", [{"answer": "a"}, ["text"], "text", 7, None, {"messages": "u"}, {"messages": [1, {"role": "user"}]}]
)
def test_rows_without_a_prompt_are_left_out(tmp_path: Path, row: Any) -> None:
    write_lines(tmp_path / "a.jsonl", row, {"text": "t"})
    assert list(folder_prompts(str(tmp_path))) == ["t"]


def test_kinds_of_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('﻿id,question\n1,"two\nlines, one text"\n2,\n', encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps([{"text": "b1"}, {"text": "b2"}], indent=1))
    (tmp_path / "c.json").write_text(json.dumps({"text": "c"}))
    (tmp_path / "d").mkdir()
    write_lines(tmp_path / "d" / "e.JSONL", {"text": "line   separator"}, {"text": "e"})
    (tmp_path / "readme.txt").write_text("no prompt")
    found = list(folder_prompts(str(tmp_path)))
    assert found == ["two\nlines, one text", "b1", "b2", "c", "line   separator", "e"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "t"}\n{"text"\n', r"a\.jsonl cannot be read \(line 2: "),
        ("a.json", b"[", r"a\.json cannot be read"),
        ("a.csv", b"text\n\xff\xfe\n", r"a\.csv cannot be read"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^--kv-dataset-dir={tmp_path}: {message}.*mend or remove it$"):
        list(folder_prompts(str(tmp_path)))


def test_no_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; give one"):
        list(folder_prompts(str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"has no \.jsonl, \.json or \.csv file"):
        list(folder_prompts(str(tmp_path)))
