"""What the plugin costs and shows where it is only installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, ROOT, clean_environment, copy_benchmarks, run_pytest

from kvsuite import __version__

HEAVY = {"torch", "transformers", "matplotlib", "datasets", "kvpress", "pynvml", "pandas", "scipy", "pyarrow", "numpy"}


def imported_by(code: str, folder: Path) -> set[str]:
    program = f"import sys\n{code}\nimport json\nprint('loaded:' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("loaded:")]
    return set(json.loads(line.removeprefix("loaded:")))


# what registers options, and the rooms that the options lie in
LIGHT = {
    "kvsuite", "kvsuite.entry_points", "kvsuite.errors", "kvsuite.foreign_text",
    "kvsuite.plugin", "kvsuite.plugin.fixtures", "kvsuite.plugin.hookspec", "kvsuite.plugin.stash",
    "kvsuite.options", "kvsuite.options.card", "kvsuite.options.common", "kvsuite.options.comparison", "kvsuite.options.dtypes",
    "kvsuite.options.durations", "kvsuite.options.sm_pairs",
    "kvsuite.options.groups", "kvsuite.options.misspelt", "kvsuite.options.nodes", "kvsuite.options.numbers",
    "kvsuite.options.option", "kvsuite.options.paths", "kvsuite.options.resolve", "kvsuite.options.shard",
    "kvsuite.options.sweep",
    "kvsuite.engines", "kvsuite.engines.mlc", "kvsuite.engines.mlc.options",
    "kvsuite.engines.llamacpp", "kvsuite.engines.llamacpp.options",
    "kvsuite.engines.server", "kvsuite.engines.server.options",
    "kvsuite.engines.vllm", "kvsuite.engines.vllm.options",
    "kvsuite.suites", "kvsuite.suites.compression", "kvsuite.suites.compression.options", "kvsuite.suites.dse",
    "kvsuite.suites.dse.options", "kvsuite.suites.perplexity", "kvsuite.suites.perplexity.options",
    "kvsuite.suites.pipeline", "kvsuite.suites.pipeline.options",
    "kvsuite.suites.retrieval", "kvsuite.suites.retrieval.options",
    "kvsuite.suites.sensitivity", "kvsuite.suites.sensitivity.options",
}  # fmt: skip
#: packages that kvsuite brings in there
LIGHT_PACKAGES = {"msgspec", "typing_extensions"}


@pytest.mark.parametrize("how", [("-p", "kvsuite"), ("-p", "kvsuite.plugin")], ids=lambda how: how[1])
def test_tests_that_ask_for_nothing_load_what_registers_options_alone(how: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine(tmp_path): pass\n")
    command = ["-q", "-p", "no:cacheprovider", "test_mine.py"]
    code = "import os, pytest\nos.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'\nassert pytest.main({!r}) == 0"
    without = imported_by(code.format(command), tmp_path)
    loaded = imported_by(code.format([*command, *how]), tmp_path)
    assert {name for name in loaded if name.partition(".")[0] == "kvsuite"} == LIGHT
    packages = {name.partition(".")[0] for name in loaded - without} - set(sys.stdlib_module_names)
    assert packages == {"kvsuite"} | LIGHT_PACKAGES
    assert not {name for name in without if name.startswith("kvsuite")}


ASKING = {
    "marker": ("@pytest.mark.kv_suite('compression')\ndef test_cache(kv_case): pass", ()),
    "fixture": ("def test_cache(kv_run): pass", ("--collect-only",)),
    "option": ("def test_nothing(): pass", ("--kv-rounds=2",)),
    "comparison of pytest-benchmark": ("def test_nothing(): pass", ("--benchmark-compare",)),
}


@pytest.mark.parametrize(("source", "options"), ASKING.values(), ids=ASKING)
def test_what_asks_for_the_rest_loads_it(source: str, options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(f"import pytest\n\n{source}\n")
    command = ["-q", "-p", "no:cacheprovider", "test_mine.py", *options]
    loaded = imported_by(f"import pytest\nassert pytest.main({command!r}) == 0", tmp_path)
    assert {"kvsuite.plugin.run", "kvsuite.plugin.reporter"} <= loaded
    assert not HEAVY & loaded


def test_a_fixture_that_is_asked_for_while_a_test_runs_measures(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from kvsuite.case import Case\n\n"
        "def test_mine(request):\n"
        "    case = Case(suite='compression', engine='hf', model='dummy:tiny', name='mine', device='cpu', dtype='float32',\n"
        "                workload={'protocol': 'streaming-decode', 'corpus': 'default', 'num_samples': 1, 'max_tokens': 8,\n"
        "                          'prompt_tokens': 8, 'max_new_tokens': 4, 'batch': 1})\n"
        "    assert request.getfixturevalue('kv_run')(case).status == 'ok'\n"
    )
    (tmp_path / "conftest.py").write_text(NO_FIGURES)
    run = run_pytest(tmp_path, "-p", "no:cacheprovider")
    assert run.code == 0, run.out
    assert [row["case"]["name"] for row in run.rows().values()] == ["mine"]


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
