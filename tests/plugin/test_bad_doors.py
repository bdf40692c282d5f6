"""What packages and conftests bring and cannot be used: one line that names package, object and mend; the others go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, TINY, Run, copy_benchmarks, run_pytest

ENTRIES = {
    "acme": """
[kvsuite.suites]
gone = acme_gone:Suite
raises = acme_raises:Suite
nosuite = acme:NoSuite
abstract = acme:Abstract
empty = acme:Empty
late = acme:Late
twins = acme:Twins
strict = acme:Strict
fine = acme:Fine

[kvsuite.engines]
plain = acme:nothing

[kvsuite.metrics]
bad = acme:NoSuite
""",
    # the second of two packages with one name
    "zeta": """
[kvsuite.suites]
fine = acme:Empty

[kvsuite.engines]
plain = acme:nothing

[kvsuite.policies]
knorm = acme:nothing
""",
}
MODULE = """
from kvsuite.case import Case
from kvsuite.options.common import CommonOptions
from kvsuite.suites.suite import Suite


class NoSuite:
    name = "nosuite"


class Abstract(Suite):
    name = "abstract"


class Fine(Suite):
    name = "fine"

    def cases(self, options):
        common = options.of(CommonOptions)
        return [Case(self.name, "hf", common.model, self.name, "cpu", "float32", workload={"prompt_tokens": 8})]

    def measure(self, case, session, run):
        return run.found


class Empty(Fine):
    name = "empty"

    def cases(self, options):
        return []


class Twins(Fine):
    name = "twins"

    def cases(self, options):
        return super().cases(options) * 2


class Strict(Fine):
    name = "strict"

    def check(self, options):
        raise LookupError("no list\\nof mine")


class Late(Fine):
    name = "late"

    def cases(self, options):
        raise LookupError("no table\\nfor this")
"""
CONFTEST = f"""
from acme import Fine, NoSuite
{NO_FIGURES}

class Hooked(Fine):
    name = "hooked"


class Abstract(Fine.__base__):
    name = "halfway"


def pytest_kvsuite_suites(config):
    return [NoSuite, 5, Abstract, Hooked, Fine]
"""
FORGETS = """
def pytest_kvsuite_suites(config):
    pass
"""
RAISES = """
def pytest_kvsuite_suites(config):
    raise OSError("no disk\\nhere")
"""
TEST = """

@pytest.mark.kv_suite("{0}")
def test_{0}(kv_case, kv_run):
    kv_run(kv_case)
"""
NO_IMPORT = "acme: entry point kvsuite.suites, gone = acme_gone:Suite: cannot be imported (ModuleNotFoundError: "
#: told once each when a run that uses kvsuite begins
TOLD = (
    NO_IMPORT,
    "acme: entry point kvsuite.suites, raises = acme_raises:Suite: cannot be imported (RuntimeError: no licence); correct "
    "it, or uninstall acme",
    "acme: entry point kvsuite.suites, nosuite = acme:NoSuite: is no subclass of kvsuite.suites.suite.Suite; name a class",
    "acme: entry point kvsuite.suites, abstract = acme:Abstract: lacks cases, measure; define what",
    "acme: entry point kvsuite.metrics, bad = acme:NoSuite: <class 'acme.NoSuite'> is no Metric; name",
    "acme: entry point kvsuite.suites, strict = acme:Strict: check() failed (LookupError: no list); correct it",
    "zeta: entry point kvsuite.suites, fine = acme:Empty: the name fine is taken by acme (acme:Fine); rename it",
    "zeta: entry point kvsuite.engines, plain = acme:nothing: the name plain is taken by acme (acme:nothing); rename it",
    "zeta: entry point kvsuite.policies, knorm = acme:nothing: the name knorm is taken by kvsuite (",
)
HOOKS = (
    "conftest.py: pytest_kvsuite_suites: acme:NoSuite: is no subclass of kvsuite.suites.suite.Suite; name a class",
    "conftest.py: pytest_kvsuite_suites: 5: is no subclass of kvsuite.suites.suite.Suite; name a class",
    "conftest.py: pytest_kvsuite_suites: conftest:Abstract: lacks cases, measure; define what",
    "conftest.py: pytest_kvsuite_suites: acme:Fine: the name fine is taken by acme: entry point kvsuite.suites, fine =",
    "forgetful/conftest.py: pytest_kvsuite_suites: failed (TypeError: it returned None); return a list of suites from it",
    "pytest_kvsuite_suites: failed (OSError: no disk); return a list of suites from it",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages, installed into a folder as pip leaves them."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "acme.py").write_text(MODULE)
    (folder / "acme_raises.py").write_text('raise RuntimeError("no licence\\nfor you")\n')
    for name, entries in ENTRIES.items():
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
    return folder


@pytest.fixture(scope="module")
def run(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All of them in one run, beside a suite of ours."""
    folder = copy_benchmarks(tmp_path_factory.mktemp("project"), conftest=CONFTEST)
    (folder / "forgetful").mkdir()
    (folder / "forgetful" / "conftest.py").write_text(FORGETS)
    (folder / "forgetful" / "test_less.py").write_text("import pytest\n" + TEST.format("strict"))
    names = ("fine", "empty", "late", "twins", "gone", "hooked", "halfway")
    (folder / "test_theirs.py").write_text("import pytest\n" + "".join(map(TEST.format, names)))
    (folder / "raising").mkdir()
    (folder / "raising" / "conftest.py").write_text(RAISES)
    (folder / "raising" / "test_more.py").write_text("import pytest\n" + TEST.format("unheard"))
    return run_pytest(
        folder, *TINY, "raising/test_more.py", "forgetful/test_less.py", "test_theirs.py", "benchmarks/test_compression.py",
        "-k", "not recent and not streaming", "-rE", PYTHONPATH=str(site),
    )  # fmt: skip


@pytest.mark.parametrize("line", [*TOLD, *HOOKS])
def test_each_is_one_line_at_the_start_of_the_run(run: Run, line: str) -> None:
    (told,) = [one for one in run.said(line) if one.startswith("kvsuite: warning: ")]
    assert "; " in told, "it says what to do"
    assert told in run.err.splitlines()


def test_what_works_goes_on_working(run: Run) -> None:
    assert set(run.rows()) == {"baseline", "fine", "hooked", "strict"}
    assert {row["status"] for row in run.rows().values()} == {"ok"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", NO_IMPORT),
        ("empty", "acme: entry point kvsuite.suites, empty = acme:Empty: cases() gave no case; give at least one, or"),
        (
            "late",
            "acme: entry point kvsuite.suites, late = acme:Late: cases() failed (LookupError: no table); correct it",
        ),
        ("twins", "acme: entry point kvsuite.suites, twins = acme:Twins: cases() gave two cases with the id "),
        ("halfway", "conftest.py: pytest_kvsuite_suites: conftest:Abstract: lacks cases, measure; define what"),
        ("unheard", "kv_suite('unheard'): unknown suite; known: "),
    ],
)
def test_one_that_is_asked_for_is_an_error_that_says_why(run: Run, name: str, said: str) -> None:
    assert run.code == pytest.ExitCode.TESTS_FAILED
    (line,) = [one for one in run.said("ERROR ") if f"::test_{name}[unusable]" in one]
    assert said in line


def test_an_engine_that_is_asked_for_ends_the_run_with_its_line(site: Path, tmp_path: Path) -> None:
    run = run_pytest(copy_benchmarks(tmp_path / "project"), *TINY, "--kv-engine=plain", PYTHONPATH=str(site))
    assert run.code == pytest.ExitCode.USAGE_ERROR
    (line,) = run.said("entry point kvsuite.engines, plain = acme:nothing: cannot be imported (AttributeError: ")
    assert line.endswith("; correct it, or uninstall acme")
    assert not run.reports


def test_a_run_that_does_not_use_kvsuite_is_told_nothing_of_suites(site: Path, tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text("def test_plain():\n    pass\n")
    run = run_pytest(tmp_path, PYTHONPATH=str(site))
    assert run.code == 0
    assert run.err == ""
