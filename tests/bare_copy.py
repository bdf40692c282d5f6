"""A copy of the tree that is not installed has no entry points, so tests give it the metadata that installing would write."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make_findable() -> None:
    """Let this process and its children find kvsuite's entry points, where it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        distribution("kvsuite")
        return
    folder = Path(tempfile.mkdtemp(prefix="kvsuite-metadata-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_metadata(folder)
    sys.path.append(str(folder))
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(folder), given)))


def write_metadata(folder: Path) -> None:
    """Write ``kvsuite-0.dist-info`` of the tree's pyproject.toml: its entry points and what it requires."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    place = folder / "kvsuite-0.dist-info"
    place.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: kvsuite", "Version: 0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    (place / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    groups = project["entry-points"]
    text = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in groups[group].items()) for group in groups
    ]
    (place / "entry_points.txt").write_text("\n".join(text), encoding="utf-8")
