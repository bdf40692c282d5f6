from __future__ import annotations

import os
from pathlib import Path

# a run inside this process forgets what it imported: without these every one would load them again, four fifths of its time
import hypothesis
import jinja2
import jsonschema
import pytest
from pytest_runs import TINY, Run, copy_benchmarks, run_pytest

LOADED = (hypothesis, jinja2, jsonschema)


@pytest.fixture(autouse=True)
def not_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pytest that runs inside this one must not take this one's xdist worker for its own."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


# what a user's own conftest.py may hold: two policies that fail, and every hook
USER_CONFTEST = """
from kvsuite.compression import RecentOnly, register_policy
from kvsuite.metrics import Metric, MetricRegistry

JOULES = Metric("joules_per_token", "J", "lower", "timed", "energy of the decode phase / generated tokens")


@register_policy
class Broken(RecentOnly):
    name = "broken"

    def __init__(self, *, window=3, **common):
        super().__init__(window=window, **common)

    def keep(self, view):
        raise RuntimeError("no token deserves to stay")


@register_policy
class Hungry(Broken):
    name = "hungry"

    def keep(self, view):
        import torch

        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")


def pytest_kvsuite_metrics(config):
    return [JOULES]


def pytest_kvsuite_update_env(config, environment):
    environment["rack"] = "b12"


def pytest_kvsuite_update_record(config, record, session):
    record.metrics["joules_per_token"] = MetricRegistry([JOULES]).value("joules_per_token", [1.5, 2.5])
    record.warnings.append(f"fan at 30 %, {session.model['label']}")


def pytest_kvsuite_update_report(config, run, rows):
    run["campaign"] = "november"
    rows[0]["reviewed"] = True


def pytest_kvsuite_figures(config, run, rows, folder):
    path = folder / "mine.txt"
    path.write_text(" ".join(row["case"]["name"] for row in rows))
    return [path]
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(os.environ):
        if key.startswith(("KV_", "KVSUITE_", "PYTEST_ADDOPTS", "PYTEST_DISABLE", "PYTEST_PLUGINS")):
            monkeypatch.delenv(key)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def benchmarks(pytester: pytest.Pytester) -> pytest.Pytester:
    """A pytester folder with a copy of the benchmarks, for runs that never reach torch."""
    copy_benchmarks(pytester.path)
    return pytester


def _failing_project(folder: Path) -> Path:
    copy_benchmarks(folder)
    (folder / "conftest.py").write_text(USER_CONFTEST)
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A sweep with a user's hooks and two policies that fail, saved for a later comparison by pytest-benchmark."""
    folder = _failing_project(tmp_path_factory.mktemp("plain"))
    return run_pytest(
        folder, *TINY, "--kv-method=streaming_llm,broken,hungry", "--junitxml=junit.xml",
        "--benchmark-autosave", "--benchmark-json=bench.json",
    )  # fmt: skip


@pytest.fixture(scope="session")
def xdist(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same sweep on two workers."""
    pytest.importorskip("xdist")
    folder = _failing_project(tmp_path_factory.mktemp("xdist"))
    return run_pytest(folder, *TINY, "--kv-method=streaming_llm,broken,hungry", "--junitxml=junit.xml", "-n2")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model with a tokenizer of bytes: random weights, but no dummy, so that quality is scored."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from kvsuite.models import resolve_model
    from kvsuite.models.load import load_model

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    load_model(resolve_model("dummy:tiny"), device="cpu", dtype="float32").model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
