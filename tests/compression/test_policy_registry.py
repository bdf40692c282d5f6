"""Policies by entry points: names without imports, and one line with package, object and mend for what cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ENTRIES = {
    "mine": "acme_policies:Mine",
    "gone": "acme_gone:Gone",
    "raises": "acme_raises:Raises",
    "number": "acme_policies:__name__",
    "abstract": "acme_policies:Abstract",
    "renamed": "acme_policies:Mine",
    "knorm": "acme_policies:Mine",
}
MODULE = """
from dataclasses import dataclass
from kvsuite.compression.base import Policy

@dataclass(kw_only=True, eq=False)
class Mine(Policy):
    name = "mine"
    size: int = 8
    share: float = 0.5
    def size_after(self, length): return min(length, self.size)
    def keep(self, view): raise NotImplementedError

class Abstract(Policy):
    name = "abstract"
    def size_after(self, length): return length
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of somebody else as it lies in site-packages, with one policy that works."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "acme_policies.py").write_text(MODULE)
    (folder / "acme_raises.py").write_text("raise RuntimeError('no licence\\nfound')")
    facts = folder / "acme-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[kvsuite.policies]\n" + "\n".join(map(" = ".join, ENTRIES.items())))
    return folder


def asked(package: Path, code: str) -> tuple[Any, str]:
    """What a fresh process with the package prints as JSON, and what it writes to stderr."""
    program = f"import json, sys\nfrom kvsuite.compression import *\nfrom kvsuite.errors import UserError\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | {"PYTHONPATH": str(package)},
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def test_names_are_known_and_nothing_is_imported(package: Path) -> None:
    (names, loaded), said = asked(
        package,
        "names = list_policies()\n"
        "loaded = [n for n in sys.modules if n.split('.')[0] in ('acme_policies', 'torch')]\n"
        "print(json.dumps([names, loaded]))",
    )
    assert set(ENTRIES) | {"snapkv", "h2o", "tova", "knorm", "expected_attention", "streaming_llm"} <= set(names)
    assert loaded == []
    (line,) = said.splitlines()
    assert line == (
        "kvsuite: warning: acme: entry point kvsuite.policies, knorm = acme_policies:Mine: the name knorm is taken by "
        "kvsuite (kvsuite.compression.knorm:KNorm); rename it"
    )


def test_its_parameters_are_swept_like_ours(package: Path) -> None:
    found, _ = asked(
        package,
        "from kvsuite.options.resolve import default_options\n"
        "from kvsuite.suites.compression.cases import compression_cases\n"
        "cases = compression_cases(default_options(method='mine(size=[2,3],share=0.25)', no_baseline='true'))\n"
        "print(json.dumps([[case.name, case.policy_params] for case in cases]))",
    )
    common = {"positions": "original", "skip_layers": []}
    assert found == [
        ["mine_size=2_share=0.25", {"size": 2, "share": 0.25} | common],
        ["mine_size=3_share=0.25", {"size": 3, "share": 0.25} | common],
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "gone",
            "cannot be imported (ModuleNotFoundError: No module named 'acme_gone'); correct it, or uninstall acme",
        ),
        ("raises", "cannot be imported (RuntimeError: no licence); correct it, or uninstall acme"),
        ("number", "is no subclass of kvsuite.compression.Policy; name one"),
        ("abstract", "lacks keep; a policy has all members of Policy"),
        ("renamed", "the name of the class is another one; write name = 'renamed' there"),
    ],
)
def test_one_that_cannot_be_used_is_one_line_and_the_others_work(package: Path, name: str, said: str) -> None:
    code = f"""
try:
    find_policy({name!r})
except UserError as error:
    print(json.dumps([str(error), find_policy("mine").__module__, find_policy("knorm").__module__]))
"""
    (message, mine, ours), _ = asked(package, code)
    assert message == f"acme: entry point kvsuite.policies, {name} = {ENTRIES[name]}: {said}"
    assert (mine, ours) == ("acme_policies", "kvsuite.compression.knorm")


def test_a_name_of_an_entry_point_is_taken(package: Path) -> None:
    code = """
from kvsuite.compression.recent_only import RecentOnly
try:
    register_policy(type("Mine", (RecentOnly,), {"name": "mine"}))
except ValueError as error:
    print(json.dumps(str(error)))
"""
    assert asked(package, code)[0] == "policy 'mine' is already registered"
