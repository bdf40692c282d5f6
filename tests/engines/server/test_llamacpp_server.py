"""Engine `server` against a real one: llama.cpp's own, which the wheel xllamacpp has built in, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from child_processes import child_process
from synthetic_session import ENVIRONMENT

from kvsuite.engines.registry import SessionPool
from kvsuite.measure.runner import CaseRunner
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.models.smollm2 import find_gguf
from kvsuite.options.resolve import default_options
from kvsuite.record import Record
from kvsuite.suites.registry import cases_of, suite_named

pytest.importorskip("httpx", reason='pip install "httpx>=0.28"')
pytest.importorskip("xllamacpp", reason="pip install xllamacpp==2026.10.11549")

SERVER = """
import sys, xllamacpp
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.n_parallel = sys.argv[1], 512, 2
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
given.port, given.endpoint_metrics, given.warmup = 0, True, False
server = xllamacpp.Server(given)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-c", SERVER, str(find_gguf())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with child_process(command, **pipes) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        yield next(line.split()[1] for line in lines if line.startswith("at ")), process


def run(url: str, suite: str, **options: str) -> list[Record]:
    resolved = default_options(
        engine="server", server_url=url, device="cpu", rounds="1", num_warmup="1", max_new_tokens="4", **options
    )
    sessions, cases = SessionPool(resolved), cases_of(suite, resolved)
    runner = CaseRunner(
        options=resolved, registry=MetricRegistry(), environment=ENVIRONMENT, sessions=sessions, suite=suite_named,
        planned=cases,
    )  # fmt: skip
    try:
        return [runner.run(case, f"tests::{case.id}").record for case in cases]
    finally:
        sessions.close()


def test_requests_at_once_and_its_death(server: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = server
    [record] = run(url, "dse", space="ctx=32;batch=2;pc=16", prompt_share="0.5")
    assert record.status == "ok", (record.reason, record.error)
    assert record.effective["prompt"] == "token ids"
    assert record.effective["software"].startswith("llamacpp ")
    assert record.effective["tokenizer"] == "the same tokens of a probe"
    assert record.effective["prompt_losses"] is None
    assert "no log-probabilities of a prompt" in record.metrics["perplexity"]["reason"]
    assert record.tokens["generated"] == 8
    # it counts what was sent: nothing of an earlier prompt was found again
    counted = record.samples["engine_metrics"]
    assert (counted["llamacpp:prompt_tokens_total"], counted["llamacpp:tokens_predicted_total"]) == (32, 8)
    assert record.metrics["mem_weights_bytes"]["value"] == 96576768
    process.kill()
    process.wait()
    for record in run(url, "dse", space="ctx=32,48;batch=1;pc=16"):
        assert record.status == "error"
        assert record.error is not None
        assert record.error["message"].startswith("nobody answers at ")
