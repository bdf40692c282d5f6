"""Engines by entry points: names without imports, one line for what cannot be used, and versions that are part of the hash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic_session import Bench, Script

from kvsuite.engines.nano.engine import NanoEngine

GOOD = """
from kvsuite.engines.engine import Engine

class AcmeEngine(Engine):
    name = "acme"
    def unavailable(self, device): return None
    def version(self): return {"acme": "1.0"}
    def load(self, case, settings): raise NotImplementedError
"""
ENTRIES = {
    "acme": "acme_engine:AcmeEngine",
    "gone": "acme_gone:GoneEngine",
    "raises": "acme_raises:Engine",
    "number": "acme_engine:__name__",
    "abstract": "acme_abstract:AbstractEngine",
    "renamed": "acme_engine:AcmeEngine",
    "hf": "acme_engine:AcmeEngine",
}
ABSTRACT = """
from kvsuite.engines.engine import Engine

class AbstractEngine(Engine):
    name = "abstract"
    def load(self, case, settings): raise NotImplementedError
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of somebody else as it lies in site-packages, with one engine that works."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "acme_engine.py").write_text(GOOD)
    (folder / "acme_abstract.py").write_text(ABSTRACT)
    (folder / "acme_raises.py").write_text("raise RuntimeError('no licence\\nfound')")
    distribution(folder, "acme", "1.0", {"kvsuite.engines": ENTRIES})
    return folder


def distribution(folder: Path, name: str, version: str, groups: dict[str, dict[str, str]] | None = None) -> None:
    facts = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        line for group, entries in (groups or {}).items() for line in (f"[{group}]", *map(" = ".join, entries.items()))
    ]
    (facts / "entry_points.txt").write_text("\n".join(lines))


def asked(package: Path, code: str) -> tuple[Any, str]:
    """What a fresh process with the package prints as JSON, and what it writes to stderr."""
    program = f"import json, sys\nfrom kvsuite.engines.registry import *\nfrom kvsuite.errors import UserError\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | {"PYTHONPATH": str(package)},
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def test_names_are_known_and_nothing_is_imported(package: Path) -> None:
    (names, chosen, loaded), _ = asked(
        package,
        "from kvsuite.options.common import CommonOptions; from kvsuite.options.resolve import default_options;"
        "options = default_options(engine='acme').of(CommonOptions);"
        "loaded = [name for name in sys.modules if name.split('.')[0] in ('acme_engine', 'torch', 'transformers')];"
        "print(json.dumps([engine_names(), options.engine, loaded]))",
    )
    assert names == [
        "hf",
        "llamacpp",
        "mlc",
        "nano",
        "server",
        "vllm",
        "abstract",
        "acme",
        "gone",
        "number",
        "raises",
        "renamed",
    ]
    assert (chosen, loaded) == ("acme", [])


def test_an_unknown_engine_is_told_which_there_are() -> None:
    from kvsuite.errors import UserError
    from kvsuite.options.resolve import default_options

    with pytest.raises(UserError, match=r"^--kv-engine=nosuch: use auto, hf, llamacpp, mlc, nano, server"):
        default_options(engine="nosuch")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "gone = acme_gone:GoneEngine: cannot be imported (ModuleNotFoundError: No module named 'acme_gone')"),
        ("raises", "raises = acme_raises:Engine: cannot be imported (RuntimeError: no licence)"),
        ("number", "number = acme_engine:__name__: is no subclass of kvsuite.engines.engine.Engine"),
        ("abstract", "abstract = acme_abstract:AbstractEngine: lacks unavailable, version; an engine has all members"),
        ("renamed", "renamed = acme_engine:AcmeEngine: the name of the class is another one; write name = 'renamed'"),
    ],
)
def test_one_that_cannot_be_used_is_one_line_and_the_others_work(name: str, message: str, package: Path) -> None:
    code = f"""
try:
    get_engine({name!r})
except UserError as error:
    line = str(error)
others = [type(get_engine(name)).__name__ for name in ("hf", "nano", "acme")]
print(json.dumps([line, others, "torch" in sys.modules]))
"""
    (line, others, torch), warnings = asked(package, code)
    assert line.startswith("acme: entry point kvsuite.engines, ")
    assert message in line
    assert "\n" not in line
    # ours are the first of two of one name
    assert others == ["HfEngine", "NanoEngine", "AcmeEngine"]
    assert warnings == (
        "kvsuite: warning: acme: entry point kvsuite.engines, hf = acme_engine:AcmeEngine: the name hf is taken by kvsuite "
        "(kvsuite.engines.hf.engine:HfEngine); rename it\n"
    )
    # an engine is known, and its versions and memory asked for, without its runtime
    assert torch is False


def test_what_computes_is_in_the_settings_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed() -> str:
        return Bench(Script(is_dummy=True)).run(engine="nano").record.settings_hash

    assert NanoEngine().version().keys() >= {"torch", "transformers"}
    before = hashed()
    assert hashed() == before
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "flashinfer-python", "9.9")
    assert NanoEngine().version()["flashinfer-python"] == "9.9"
    assert hashed() != before


def test_an_engine_that_does_not_tell_its_versions_costs_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: NanoEngine) -> dict[str, str]:
        raise OSError("no such file")

    plain = Bench(Script(is_dummy=True)).run(engine="nano").record
    monkeypatch.setattr(NanoEngine, "version", broken)
    record = Bench(Script(is_dummy=True)).run(engine="nano").record
    assert record.status == "ok"
    assert record.settings_hash != plain.settings_hash
