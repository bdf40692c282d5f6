"""Tests run with warnings as errors; benchmarks do not, so that a library's warning never fails a measurement."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# a busy machine is no defect
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

_HERE = Path(__file__).parent
# helpers are imported by their bare names, whatever is collected and from where
for _folder in sorted({path.parent for path in _HERE.rglob("*.py") if "data" not in path.parts}):
    sys.path.append(str(_folder))

import bare_copy  # noqa: E402

# before anything asks for an entry point
bare_copy.make_findable()

import shared_weights  # noqa: E402
from child_processes import hand_on_default_signals  # noqa: E402

# files that take minutes go first: the last of them would keep one worker busy while the others have nothing left
_LONG = (
    "engines/hf/test_smollm2_quality.py",
    "reporting/test_page_browser.py",
    "reporting/test_recorded_run.py",
    "suites/dse/test_serving_pass.py",
    "plugin/test_comparison_gate.py",
    "plugin/test_perplexity_suite.py",
    "plugin/test_kills.py",
    "plugin/test_worker_deaths.py",
    "plugin/test_dse_suite.py",
    "test_docs.py",
    "quantization/test_smollm2_order.py",
    "plugin/test_other_plugins.py",
    "e2e/test_benchmarks_tiny.py",
    "commands/test_ab_command.py",
    "plugin/test_resumed_sweep.py",
    "plugin/test_sweep.py",
    "engines/test_window_scoring.py",
    "plugin/test_beside_pytest_benchmark.py",
    "plugin/test_bad_input.py",
    "plugin/test_unusable.py",
    "plugin/test_failing_hooks.py",
    "plugin/test_own_suite.py",
)
_PLACES = {_HERE / name: place for place, name in enumerate(_LONG)}

# a package of somebody else, which a test installs
collect_ignore = ["data"]


def pytest_configure():
    hand_on_default_signals()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _PLACES.get(item.path, len(_LONG)))
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.filterwarnings("error"), append=False)


def pytest_collection_finish():
    # sessions collect garbage before they read memory: thousands of tests and all that they import are looked through each time
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_width_of_terminal():
    # tables fit the terminal: the same one wherever tests are started, and in the runs that they start
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_machine():
    # a tenth of a second for every case that is measured in this process, and most of one for every model
    import quick_machine

    quick_machine.pytest_configure()


@pytest.fixture(autouse=True, scope="session")
def _coarse_figures():
    # as in the runs that tests start, whose files are compared with what is drawn here
    import coarse_figures

    coarse_figures.draw_coarsely()


@pytest.fixture(scope="session")
def what_runs_import():
    # before pytester keeps what is imported: else every run inside this process imports some 130 modules anew
    from imported_by_runs import import_what_runs_import

    import_what_runs_import()


@pytest.fixture(autouse=True)
def _shared_models_stay_as_they_are():
    yield
    changed = shared_weights.changed()
    assert not changed, (
        f"this test changed the weights of {', '.join(changed)}, which other tests use: load a model of its own"
    )
