"""What the plugin costs and shows where it is only installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_runs import ROOT, clean_environment, copy_benchmarks, run_pytest

from kvsuite import __version__

HEAVY = {"torch", "transformers", "matplotlib", "datasets", "kvpress", "pynvml", "pandas", "scipy", "pyarrow", "numpy"}


def imported_by(code: str, folder: Path) -> set[str]:
    program = f"import sys\n{code}\nimport json\nprint('loaded:' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("loaded:")]
    return set(json.loads(line.removeprefix("loaded:")))


def test_importing_the_plugin_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = imported_by("import kvsuite.plugin", tmp_path)
    assert not any(name.endswith(".cases") for name in loaded), "suites are loaded when they are asked for"
    assert not HEAVY & loaded


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--kv-method=streaming_llm,l2_compress,kvpress:SnapKV", "--kv-dtype=bfloat16", "--kv-corpus=pg19"),
        ("--kv-preset=original",),
    ],
)
def test_collecting_loads_nothing_heavy(options: tuple[str, ...], tmp_path: Path) -> None:
    command = ["--collect-only", "-q", str(ROOT / "benchmarks"), *options]
    loaded = imported_by(f"import pytest\nassert pytest.main({command!r}) == 0", tmp_path)
    assert "kvsuite.plugin" in loaded
    assert not HEAVY & loaded
    assert not (tmp_path / "reports").exists()


def test_silent_where_no_case_is_selected(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n")
    run = run_pytest(tmp_path, "-W", "error", "-p", "no:cacheprovider", "-p", "no:benchmark")
    assert run.code == 0
    assert run.said("1 passed")
    assert [line for line in run.said("kvsuite") if not line.startswith("plugins:")] == [f"kvsuite: {__version__}"]
    assert {path.name for path in tmp_path.iterdir()} <= {"test_mine.py", "__pycache__"}


def test_quiet_collection_lists_ids_only(tmp_path: Path) -> None:
    run = run_pytest(copy_benchmarks(tmp_path), "--collect-only", "-q", "-W", "error")
    assert run.code == 0
    listed = [line for line in run.out.splitlines() if line and "collected" not in line]
    assert len(listed) == 7
    assert all(line.startswith("benchmarks/test_compression.py::test_compression[hf-") for line in listed)


def test_header_says_what_will_be_measured(benchmarks: pytest.Pytester) -> None:
    result = benchmarks.runpytest_inprocess("--collect-only", "--kv-model=dummy:tiny", "--kv-device=vulkan")
    (line,) = [line for line in result.outlines if line.startswith("kvsuite: 7 cases")]
    assert "on vulkan:0 (hf, dummy:tiny), order seed " in line


def test_markers_are_declared(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.kv_suite(name): a kvsuite benchmark; *"])


OWN_SUITE = """
import pytest

def test_mine():
    pass

@pytest.mark.kv_suite("compression")
def test_cache(kv_case, kv_run):
    kv_run(kv_case)
"""


def test_without_the_plugin_benchmarks_skip_with_the_reason(tmp_path: Path) -> None:
    run = run_pytest(copy_benchmarks(tmp_path), "-p", "no:kvsuite", "-rs", "-W", "error")
    assert run.code == 0
    assert run.said("1 skipped")
    assert run.said("the kvsuite plugin is off: pip install -e . and drop -p no:kvsuite")


def test_without_the_plugin_a_user_suite_stays_collectable(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers = kv_suite(name): cases of kvsuite\n")
    pytester.makepyfile(OWN_SUITE)
    result = pytester.runpytest_inprocess("-p", "no:kvsuite", "--strict-markers", "-k", "mine")
    result.assert_outcomes(passed=1, deselected=1)
    assert result.ret == 0


@pytest.mark.parametrize("how", ["kvsuite.plugin", "kvsuite"])
def test_loaded_by_hand_where_entry_points_are_off(how: str, tmp_path: Path) -> None:
    run = run_pytest(copy_benchmarks(tmp_path), "--collect-only", "-q", "-p", how, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert run.code == 0
    assert "plugins:" not in run.out
    assert len(run.said("::test_compression[hf-")) == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@pytest.mark.kv_suite('nope')", "kv_suite('nope'): unknown suite; known: compression"),
        ("@pytest.mark.kv_suite", "kv_suite takes one name, for example kv_suite('compression')"),
    ],
)
def test_a_wrong_marker_is_a_collection_error_that_says_so(
    pytester: pytest.Pytester, source: str, message: str
) -> None:
    pytester.makepyfile(f"import pytest\n\n{source}\ndef test_cache(kv_case, kv_run):\n    kv_run(kv_case)\n")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert message in result.stdout.str()


def test_a_case_without_the_marker_names_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_cache(kv_case):\n    pass\n")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    assert "kv_case needs the marker @pytest.mark.kv_suite('compression')" in result.stdout.str()
