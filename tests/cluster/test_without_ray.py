"""What needs no cluster: the install line, what is refused before anything starts, and that nothing else imports Ray."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from pytest_runs import run_pytest

from kvsuite.case import Case
from kvsuite.cluster.installed import require_installed
from kvsuite.cluster.ray_cluster import require_ray
from kvsuite.compression import RecentOnly
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.options.sweep import SweepOptions

PACKAGE = Path(__file__).parents[2] / "kvsuite"


def test_without_ray_the_option_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        require_ray("auto")
    assert str(error.value) == '--kv-cluster=auto: Ray is not installed; pip install "kvsuite[cluster]"'


def test_one_file_imports_ray() -> None:
    imports = re.compile(r"^\s*(import|from) ray\b", re.MULTILINE)
    paths = [path for path in PACKAGE.rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))]
    found = {path.relative_to(PACKAGE).as_posix() for path in paths}
    assert found == {"cluster/ray_cluster.py"}


@pytest.mark.parametrize("typed", ["local", "auto", "ray://head:10001", "ray://10.0.0.1:10001", "ray://[::1]:10001"])
def test_addresses(typed: str) -> None:
    assert default_options(cluster=typed).of(SweepOptions).cluster == typed


@pytest.mark.parametrize(
    "typed",
    [
        "remote",
        "ray://head",
        "ray://:10001",
        "head:6379",
        "ray://head:port",
        "ray://head:99999",
        "ray://head:0",
        "http://h:1",
    ],
)
def test_no_addresses(typed: str) -> None:
    with pytest.raises(UserError, match=r"use local, auto, or ray://host:port; for example --kv-cluster=auto"):
        default_options(cluster=typed)


def test_what_a_conftest_brings_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(suite: str, policy: str | None) -> Case:
        return Case(suite, "hf", "dummy:tiny", "c", "cpu", "float32", policy=policy)

    require_installed([case("compression", None), case("compression", "snapkv"), case("dse", "kvpress:SnapKV")], "auto")
    with pytest.raises(UserError, match="suite mine comes from a conftest or a hook"):
        require_installed([case("mine", None)], "auto")
    monkeypatch.setitem(require_installed.__globals__["list_policies"].__globals__["_POLICIES"], "mine", RecentOnly)
    with pytest.raises(UserError, match=r"policy mine comes .* entry point of the group kvsuite\.policies"):
        require_installed([case("compression", "mine")], "auto")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("-n2",), "its workers are Ray's, and -n starts xdist's; leave -n out"),
        (("--kv-device=cuda:1",), "names one GPU, and workers of a cluster have one each; give --kv-device=cuda"),
    ],
    ids=["xdist", "one GPU"],
)
def test_what_a_cluster_excludes(given: tuple[str, ...], told: str, tmp_path: Path) -> None:
    if given == ("-n2",):
        pytest.importorskip("xdist")
    run = run_pytest(tmp_path, "--kv-cluster=local", *given)
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert run.said(told)
