"""An engine of one file, in a package of somebody else: it runs in our suites, and what it cannot do is a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from synthetic_session import ENVIRONMENT

from kvsuite.case import Case
from kvsuite.engines import registry
from kvsuite.engines.registry import SessionPool
from kvsuite.entry_points import find
from kvsuite.measure.runner import CaseRunner
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import Options, default_options
from kvsuite.record import Record, schema
from kvsuite.suites.compression.cases import compression_cases
from kvsuite.suites.dse.cases import dse_cases
from kvsuite.suites.registry import suite_named

ENGINE = '''
from types import SimpleNamespace

from kvsuite.engines.engine import Engine, Session
from kvsuite.engines.results import MemoryPass, Reach, Served
from kvsuite.meters.timing import RequestTimes


class CounterSession(Session):
    """Counts up from a prompt's last token."""

    device = SimpleNamespace(type="cpu", index=None)
    dtype_name, tokenizer, vocab_size = "float32", None, 256

    def prepare(self, case):
        self.effective = {"dtype": "float32"}

    def full_kv_bytes(self, tokens):
        return 64 * tokens

    def reach(self, case):
        return Reach(dict(case.params), {})

    def serve(self, requests, clock=None):
        if clock is not None:
            clock.start()
        outputs = [[] for _ in requests]
        for step in range(max(one.new_tokens for one in requests)):
            for one, output in zip(requests, outputs):
                if step < one.new_tokens:
                    output.append((one.prompt[-1] + step + 1) % 256)
            if clock is not None:
                clock.mark()
        if clock is None:
            return Served([], outputs)
        seconds = clock.seconds()
        times = [
            RequestTimes(len(one.prompt), len(one.prompt), [(at, 1) for at in seconds[: one.new_tokens]])
            for one in requests
        ]
        return Served(times, outputs)

    def memory(self, requests):
        return MemoryPass.unmeasured("this engine counts nothing")


class CounterEngine(Engine):
    name = "counter"

    def unavailable(self, device):
        return None if device == "cpu" else "engine counter runs on the CPU alone; use --kv-device=cpu"

    def version(self):
        return {"counter": "1.0"}

    def load(self, case, settings):
        session = CounterSession()
        session.model |= {"label": "counter", "kind": "counter", "revision": "1"}
        return session
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "counter_engine.py").write_text(ENGINE)
    facts = tmp_path / "counter-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: counter\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[kvsuite.engines]\ncounter = counter_engine:CounterEngine\n")
    monkeypatch.syspath_prepend(tmp_path)
    find.cache_clear()
    yield
    find.cache_clear()
    registry._engine_class.cache_clear()


def run(cases: list[Case], options: Options) -> Record:
    case, *_ = cases
    runner = CaseRunner(options, MetricRegistry(), ENVIRONMENT, SessionPool(options), suite_named, planned=cases)
    record = runner.run(case, f"tests::{case.id}").record
    jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema("record"))
    assert (record.status, record.reason, record.error) == ("ok", None, None)
    for name, found in record.metrics.items():
        assert found["value"] is not None or found["reason"], name
    return record


def options(**given: str) -> Options:
    return default_options(
        engine="counter", model="dummy:tiny", device="cpu", rounds="2", num_warmup="1", max_new_tokens="4", **given
    )


def test_the_compression_suite(installed: None) -> None:
    given = options(prompt_tokens="16", method="streaming_llm", recent_sizes="8")
    record = run(compression_cases(given), given)
    assert record.tokens["generated"] == 4
    assert record.metrics["ttft_s"]["value"] > 0
    assert record.metrics["perplexity"]["reason"] == "this engine returns no losses of a text through its cache"
    for name in ("kv_bytes_exact", "ratio_effective", "mem_weights_bytes", "tpot_floor_s", "mem_measured_peak_bytes"):
        assert record.metrics[name]["value"] is None, name
    assert record.metrics["kv_bytes_exact"]["reason"] == "this engine counts nothing"


def test_the_design_space_suite(installed: None) -> None:
    given = options(space="ctx=64;chunk=64;batch=2", quantization="none")
    record = run(dse_cases(given), given)
    assert record.tokens["generated"] == 2 * 4
    assert record.metrics["decode_step_s"]["value"] > 0
    assert record.metrics["perplexity"]["reason"] == "this engine returns no losses of a given text"
    for name in ("decode_batch", "prefill_steps", "tpot_floor_s"):
        assert record.metrics[name]["value"] is None, name
