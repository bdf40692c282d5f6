"""A record names files of its own folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.store.inside import inside

OUTSIDE = {
    "above": "../secret",
    "away and back": "../run/tokens/a.parquet",
    "below and above": "tokens/../../secret",
    "absolute": "/etc/passwd",
    "drive": "C:/secret",
    "backslash": "..\\secret",
    "empty": "",
    "the folder": ".",
    "line": "tokens/a\nb",
    "escape": "tokens/\x1b]52;c;aa\x07",
    "zero": "tokens/a\0b",
    "long": "a" * 5000,
    "link": "out/secret",
    "link to a file": "file",
    "link to itself": "self",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "tokens").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "out").symlink_to(tmp_path)
    (folder / "file").symlink_to(tmp_path / "secret")
    (folder / "self").symlink_to(folder / "self")
    return folder


@pytest.mark.parametrize("name", OUTSIDE.values(), ids=OUTSIDE)
def test_what_leads_out_is_refused(run: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"leads out|is no name|cannot be looked up"):
        inside(run, name)


def test_what_lies_inside_is_found_whether_it_is_there_or_not(run: Path) -> None:
    assert inside(run, "tokens/a b#.parquet") == run / "tokens" / "a b#.parquet"
    (run / "near").symlink_to(run / "tokens")
    assert inside(run, "near/x.parquet") == run / "near" / "x.parquet"


@given(
    st.lists(st.sampled_from(["..", ".", "a", "tokens", "/", "\\", "~", "C:"]), max_size=6), st.sampled_from(["", "/"])
)
def test_no_name_leads_out(parts: list[str], first: str) -> None:
    folder = Path("/nowhere/run")
    try:
        found = inside(folder, first + "/".join(parts))
    except ValueError:
        return
    assert found.resolve().is_relative_to(folder)
    assert found != folder
