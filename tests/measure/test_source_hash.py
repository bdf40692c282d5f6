"""What makes another measurement of a run, and what does not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvsuite
from kvsuite.case import Case
from kvsuite.entry_points import find
from kvsuite.measure.source_hash import _package_hash, code_hashes, others_code, source_hash

PACKAGE = Path(kvsuite.__file__).parent


def edited(folder: Path, name: str, old: str, new: str) -> tuple[str, str]:
    """The hashes of a copy of the file and of one with an edit, each at its place in ``folder``."""
    path = folder / name
    path.parent.mkdir(parents=True)
    before = (PACKAGE / name).read_text(encoding="utf-8")
    assert old in before
    found = []
    for text in (before, before.replace(old, new, 1)):
        path.write_text(text, encoding="utf-8")
        found.append(source_hash.__wrapped__(folder))
    return found[0], found[1]


def test_a_copy_has_the_same_hash(tmp_path: Path) -> None:
    folder = tmp_path / "kvsuite"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert source_hash.__wrapped__(folder) == source_hash()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("suites/compression/figure.py", "TITLE = ", "# a comment\nTITLE = "),
        ("suites/compression/figure.py", 'TITLE = "', 'TITLE = "Another '),
        ("suites/dse/figures/pareto.py", "annotations\n", "annotations\nimport json\n"),
        ("commands/report.py", "annotations\n", "annotations\nimport json\n"),
        # of what measures: only what is executed
        ("meters/quality.py", "import math", "# a comment\nimport math"),
        ("meters/quality.py", "Pool the losses", "Put together the losses"),
    ],
)
def test_what_shows_or_explains_is_not_in_it(tmp_path: Path, name: str, old: str, new: str) -> None:
    before, after = edited(tmp_path, name, old, new)
    assert after == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("meters/quality.py", "exponential(mean)", "exponential(-mean)"),
        ("suites/compression/quality.py", "_LEAK_NATS, _LEAK_SIGMAS = 0.1", "_LEAK_NATS, _LEAK_SIGMAS = 0.2"),
        ("engines/hf/session.py", "annotations\n", "annotations\nimport json\n"),
        ("nanovllm/scheduler.py", "annotations\n", "annotations\nimport json\n"),
    ],
)
def test_what_measures_is_in_it(tmp_path: Path, name: str, old: str, new: str) -> None:
    before, after = edited(tmp_path, name, old, new)
    assert after != before


def test_what_was_found_is_kept_with_what_python_compiled_and_holds_for_the_same_bytes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "meters").mkdir()
    file = tmp_path / "meters" / "one.py"

    def found(text: str) -> str:
        file.write_text(text, encoding="utf-8")
        return source_hash.__wrapped__(tmp_path)

    first = found("X = 1\n")
    (kept,) = (tmp_path / "__pycache__").iterdir()
    assert kept.read_text().split()[1] == first
    # what is kept is what is told
    kept.write_text(kept.read_text().replace(first, "sha256:kept"))
    assert found("X = 1\n") == "sha256:kept"
    assert found("X = 2\n") not in (first, "sha256:kept")
    assert found("X = 1  # one\n") == found("X = 1\n") == first
    for spoiled in (b"", b"\xff\xfe", b"one word"):
        kept.write_bytes(spoiled)
        assert found("X = 1\n") == first
    # nothing is kept where Python may keep nothing
    kept.unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert found("X = 1\n") == first
    assert not kept.exists()


SITE = """
[kvsuite.suites]
hosted = hosted.suite:Hosted
[kvsuite.engines]
hosted = hosted_engine:Engine
[kvsuite.policies]
hosted = hosted.policy:Policy
"""


@pytest.fixture(params=["copied", "editable"])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of somebody else on the path: its files are listed, or it is used where it is written."""
    files = {
        "hosted/__init__.py": "", "hosted/suite.py": "LIMIT = 1  # a limit\n", "hosted/deep/kernel.py": "def f(): return 1\n",
        "hosted_engine.py": "SPEED = 3\n", "hosted/data.txt": "no code\n", "elsewhere.py": "",
    }  # fmt: skip
    listed = [] if request.param == "editable" else [name for name in files if name != "elsewhere.py"]
    info = "hosted-1.0.dist-info"
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: hosted\nVersion: 1.0\n"
    files[f"{info}/entry_points.txt"] = SITE
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in listed)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    find.cache_clear()
    yield tmp_path
    find.cache_clear()


def case_of(**fields: str) -> Case:
    return Case(**({"suite": "compression", "engine": "hf", "model": "dummy:tiny", "name": "a", "device": "cpu",
                    "dtype": "float32"} | fields))  # fmt: skip


def hashed(*cases: Case) -> dict[str, str]:
    _package_hash.cache_clear()
    return others_code(cases)


@pytest.mark.parametrize("fields", [{"suite": "hosted"}, {"policy": "hosted"}])
def test_the_package_of_a_suite_or_policy_of_others_is_in_it(site: Path, fields: dict[str, str]) -> None:
    one = case_of(**fields)
    before = hashed(one)
    assert list(before) == ["hosted"]
    for name, old, new, is_same in (
        ("hosted/suite.py", "# a limit", "# the limit", True),
        ("hosted/data.txt", "no code", "none", True),
        ("elsewhere.py", "", "X = 1\n", True),
        ("hosted/suite.py", "1", "2", False),
        ("hosted/deep/kernel.py", "return 1", "return 2", False),
    ):
        path = site / name
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        assert (hashed(one) == before) is is_same, name
        path.write_text(text)
    assert hashed(one) == before
    assert code_hashes(site, ["test_x.py::test_x"], cases=[one])["hosted"] == before["hosted"]


def test_an_engine_that_is_a_module_is_in_it(site: Path) -> None:
    one = case_of(engine="hosted")
    before = hashed(one)
    (site / "hosted_engine.py").write_text("SPEED = 4\n")
    assert hashed(one) != before


def test_packages_that_measure_nothing_of_a_run_are_not_in_it(site: Path) -> None:
    assert hashed(case_of(policy="snapkv"), case_of(policy="kvpress:SnapKV"), case_of(suite="by hand")) == {}
    assert set(code_hashes(site, [], cases=[case_of()])) == {"kvsuite"}


def test_a_name_space_that_others_share_is_not_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "shared/mine/policy.py": "LIMIT = 1\n", "shared/others/big.py": "X = 1\n",
        "mine-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n",
        "mine-1.0.dist-info/entry_points.txt": "[kvsuite.policies]\nspaced = shared.mine.policy:Policy\n",
        "mine-1.0.dist-info/RECORD": "shared/mine/policy.py,,\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    find.cache_clear()
    before = hashed(case_of(policy="spaced"))
    (tmp_path / "shared/others/big.py").write_text("X = 2\n")
    assert hashed(case_of(policy="spaced")) == before
    (tmp_path / "shared/mine/policy.py").write_text("LIMIT = 2\n")
    assert hashed(case_of(policy="spaced")) != before
    find.cache_clear()
