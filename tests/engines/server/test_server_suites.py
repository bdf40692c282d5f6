"""Suites on engine `server` against a server whose answers are known: records, faults, and what stands nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai_double import FIRST_S, GAP_S, KEY, Double, serving
from synthetic_session import ENVIRONMENT
from tiny_checkpoint import TEXT, byte_tokenizer, save_checkpoint

from kvsuite.engines.registry import SessionPool
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import UserError
from kvsuite.measure.runner import CaseRunner
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.record import Record, schema
from kvsuite.suites.registry import cases_of, suite_named

pytest.importorskip("httpx", reason='pip install "httpx>=0.28"')

Run = Callable[..., dict[str, Record]]
PROMPT, TOKENS = 24, 6
DSE = {"space": "ctx=32,48;batch=1,3;pc=16,24"}
#: two cases
SWEEP = {"space": "ctx=32,48;batch=1;pc=16", "rounds": "1"}
PIPELINE = {
    "workloads": "synthetic-long", "synthetic_context": "24", "synthetic_output": "6", "max_model_len": "48",
    "synthetic_batch_sizes": "3", "synthetic_num_batches": "2", "pool_blocks": "64",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "tiny"
    folder.mkdir()
    (folder / "danube.txt").write_text(TEXT, encoding="utf-8")
    return save_checkpoint(folder)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture
def double(model: Any) -> Iterator[Double]:
    import torch

    def losses(tokens: list[int]) -> list[tuple[float, bool]]:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, :-1]
        own = torch.log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]]
        hits = logits.argmax(-1) == torch.tensor(tokens[1:])
        return [(-float(one), bool(hit)) for one, hit in zip(own, hits, strict=True)]

    tokenizer = byte_tokenizer()
    with serving(losses, lambda text: list(tokenizer(text)["input_ids"])) as found:
        yield found


@pytest.fixture
def run(checkpoint: Path, double: Double) -> Run:
    """Records of a suite, by the name of the case."""

    def measure(suite: str, engine: str = "server", **options: str) -> dict[str, Record]:
        given = {
            "model": str(checkpoint), "device": "cpu", "engine": engine, "rounds": "2", "num_warmup": "1",
            "corpus": str(checkpoint / "danube.txt"), "prompt_tokens": str(PROMPT), "max_new_tokens": str(TOKENS),
            "server_url": double.url,
        }  # fmt: skip
        resolved = default_options(**(given | options))
        sessions = SessionPool(resolved)
        cases = cases_of(suite, resolved)
        runner = CaseRunner(
            options=resolved, registry=MetricRegistry(), environment=ENVIRONMENT, sessions=sessions, suite=suite_named,
            planned=cases,
        )  # fmt: skip
        found = {}
        try:
            for case in cases:
                record = runner.run(case, f"tests::{case.id}").record
                jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema("record"))
                found[case.name] = record
        finally:
            sessions.close()
        return found

    return measure


def values(record: Record) -> dict[str, Any]:
    return {name: entry["value"] for name, entry in record.metrics.items()}


def test_a_design_space(run: Run, double: Double) -> None:
    found = run("dse", **DSE)
    measured = {name: record for name, record in found.items() if record.status == "ok"}
    assert sorted(record.status for record in found.values()) == ["ok"] * 4 + ["skipped"] * 4
    assert all("axis inert, same as" in str(record.reason) for record in found.values() if record.status == "skipped")
    for record in measured.values():
        of, batch = values(record), record.case.params["batch"]
        # the server sleeps so long before its first token, and between two; the client cannot see them earlier
        assert of["ttft_s"] >= FIRST_S
        assert of["e2e_s"] >= FIRST_S + (TOKENS - 1) * GAP_S
        assert record.tokens["generated"] == batch * TOKENS
        assert record.inert.keys() >= {"prefill_chunk", "dtype"}
        assert record.effective["prompt"] == "token ids"
        assert record.effective["software"] == "double 1.2"
        assert record.metrics["ttft_s"]["clock"] == "client"
        assert of["engine_ttft_s"] == pytest.approx(0.125)
        assert record.samples["engine_metrics"]["vllm:num_preemptions_total"] == 2.0 * 2 * batch
        assert record.effective["served"]["preemptions"] == 2 * batch
        assert of["kv_bytes_exact"] is None
        assert record.metrics["kv_bytes_exact"]["reason"] == "a client sees nothing of a server's memory"
        assert of["perplexity"] is None
        assert "no log-probabilities of a prompt" in record.metrics["perplexity"]["reason"]
    assert double.most_together == 3
    # no prompt shares a cache with another one, and nothing ends a text early
    assert all(body["ignore_eos"] and body["temperature"] == 0 and body["cache_salt"] for body in double.served)
    assert {len(body["prompt"]) for body in double.served} == {16, 24}
    assert len({body["cache_salt"] for body in double.served}) == len(double.served)


def test_prompts_that_are_sent_again_share_no_cache_but_where_that_is_measured(
    checkpoint: Path, double: Double
) -> None:
    given = {"model": str(checkpoint), "device": "cpu", "engine": "server", "server_url": double.url}
    requests = [ServeRequest(list(range(16)), TOKENS)] * 2
    for caches in (False, True):
        options = default_options(space="ctx=32;batch=2;pc=16", prefix_caching=str(caches).lower(), **given)
        [case] = cases_of("dse", options)
        sessions, double.bodies = SessionPool(options), []
        try:
            session = sessions.get(case)
            session.prepare(case)
            for _ in range(2):
                session.serve(requests)
        finally:
            sessions.close()
        assert [body["prompt"] for body in double.served] == [list(range(16))] * 4
        assert [body["cache_prompt"] for body in double.served] == [caches] * 4
        assert len({body.get("cache_salt") for body in double.served} - {None}) == (0 if caches else 4)


@pytest.mark.parametrize("scores", ["prompt_logprobs", "echo"])
def test_perplexity_is_that_of_the_model_behind_it(run: Run, double: Double, checkpoint: Path, scores: str) -> None:
    double.scores = scores
    options = {"dataset": str(checkpoint / "danube.txt"), "max_length": "32", "stride": "16", "quantization": "none"}
    [served] = run("perplexity", **options).values()
    [local] = run("perplexity", "hf", **options, threads="1").values()
    assert (served.status, local.status) == ("ok", "ok"), (served.error, local.error)
    for name in ("perplexity", "nll_tokens", "next_token_acc"):
        assert values(served)[name] == pytest.approx(values(local)[name], rel=1e-5), name
    assert served.dataset == local.dataset
    assert served.effective["prompt_losses"] == scores


def test_requests_under_load(run: Run, double: Double) -> None:
    found = run("pipeline", variants="baseline", concurrency="2", **PIPELINE)
    [record] = found.values()
    assert record.status == "ok", (record.reason, record.error)
    assert double.most_together == 2
    of = values(record)
    assert of["ttft_p50_s"] >= FIRST_S
    assert of["output_tok_s"] > 0
    assert of["preemptions"] == 2 * 6
    for name, reason in (
        ("running_mean", "the engine tells of no steps"),
        ("queue_p50_s", "the engine does not tell when it takes a request up"),
        ("served_kld", "a server takes no forced output and returns no losses of it"),
    ):
        assert of[name] is None
        assert record.metrics[name]["reason"] == reason
    assert record.inert.keys() >= {"pool_blocks", "max_num_seqs", "step_tokens"}
    # of both rounds
    assert record.samples["engine_metrics"]["vllm:num_preemptions_total"] == 2 * 2 * 6
    rows = record.samples["requests"]
    assert [row["cached_tokens"] for row in rows] == [0] * 6
    assert [row["output_tokens"] for row in rows] == [6] * 6
    assert record.samples["steps"]["start_s"] == []


def test_arrivals_and_what_no_client_can_ask_for(run: Run, double: Double) -> None:
    found = run(
        "pipeline", arrivals="poisson", arrival_rate="40", capacity="20:80", rounds="1",
        variants="baseline,compression-only,streams-only,chunked", **PIPELINE,
    )  # fmt: skip
    record = next(one for name, one in found.items() if name.endswith("-baseline"))
    assert record.status == "ok", (record.reason, record.error)
    arrivals = [row["arrival_s"] for row in record.samples["requests"]]
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) == 6
    assert all(row["ttft_s"] >= FIRST_S for row in record.samples["requests"])
    assert len(record.samples["capacity"]) >= 1
    others = [one for one in found.values() if one is not record]
    assert len(others) >= 3
    assert {one.status for one in others} == {"invalid"}
    assert all("engine server" in str(one.reason) for one in others)


def test_text_in_the_place_of_token_ids_and_no_extensions(run: Run, double: Double) -> None:
    double.takes_ids = double.extends = False
    double.cached = None
    found = run("dse", space="ctx=48;batch=1;pc=16")
    [record] = found.values()
    assert record.status == "ok", (record.reason, record.error)
    assert record.effective["prompt"] == "text"
    assert record.effective["extensions"] is False
    assert all(isinstance(body["prompt"], str) and "ignore_eos" not in body for body in double.served)
    assert "prefix_hit_tokens" not in record.effective["served"]


def test_events_of_several_tokens(run: Run, double: Double) -> None:
    double.merged, double.tells_ids = 4, False
    [record] = run("dse", space="ctx=48;batch=1;pc=16").values()
    assert record.status == "ok", (record.reason, record.error)
    assert record.effective["served"]["chunks"] == 2
    assert record.tokens["generated"] == TOKENS


FAULTS = {
    "die": "the connection broke before the answer was whole",
    "hang": "nothing came for 1 s (--kv-server-timeout)",
    "ping": "nothing came for 1 s (--kv-server-timeout)",
    "half": "sent half a line, or no event of a completion",
    "cut": "the stream ended before its end",
    "500": "answered 500: broken",
    "error": "failed while it answered",
    "endless": "sends on and on",
    "model": "answered for the model other, not for tiny",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_row_and_the_sweep_goes_on(run: Run, double: Double, fault: str) -> None:
    double.fault = fault
    first, second = run("dse", server_timeout="1", **SWEEP).values()
    assert first.status == "error"
    assert first.error is not None
    assert first.error["type"] == "ServerFailed"
    assert FAULTS[fault] in first.error["message"]
    assert "\n" not in first.error["message"]
    assert second.status == "ok", (second.reason, second.error)


def test_a_request_that_the_server_refuses_is_no_failure_of_it(run: Run, double: Double) -> None:
    double.fault = "400"
    first, second = run("dse", **SWEEP).values()
    assert (first.status, second.status) == ("invalid", "ok")
    assert "refuses the request: 400: /v1/completions: broken" in str(first.reason)


def test_nobody_there_and_another_model(run: Run, double: Double) -> None:
    for record in run("dse", server_url="http://127.0.0.1:9", **SWEEP).values():
        assert record.status == "error"
        assert record.error is not None
        assert record.error["message"].startswith("nobody answers at http://127.0.0.1:9 (")
    double.model = "Llama-3-8B"
    for record in run("dse", **SWEEP).values():
        assert record.error is not None
        assert "serves another model: Llama-3-8B; name the model" in record.error["message"]
    # the same weights under another name are the user's word
    assert {record.status for record in run("dse", server_model="Llama-3-8B", **SWEEP).values()} == {"ok"}


def test_the_key_is_sent_and_stands_nowhere(
    run: Run, double: Double, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    double.needs_key = True
    with pytest.raises(UserError, match=r"answered 401 .*; give its key in KV_SERVER_KEY"):
        run("dse", **SWEEP)
    monkeypatch.setenv("KV_SERVER_KEY", KEY)
    double.fault = "key"
    with caplog.at_level("DEBUG"):
        first, second = run("dse", **SWEEP).values()
    assert (first.status, second.status) == ("error", "ok")
    assert first.error is not None
    assert "broken for Bearer ***" in first.error["message"]
    assert KEY not in json.dumps([first.to_dict(), second.to_dict()]) + caplog.text


# the longer one is shown up to the middle of the key
@pytest.mark.parametrize("page", ["<html>no model for ", "<html>" + "x" * 275])
def test_a_page_that_repeats_the_key_is_shown_without_it(
    run: Run, double: Double, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    monkeypatch.setenv("KV_SERVER_KEY", KEY)
    double.page = page
    for record in run("dse", **SWEEP).values():
        assert record.status == "error"
        assert record.error is not None
        assert f"/v1/models: the answer is no JSON: {page}Bearer ***" in record.error["message"]
        assert "\n" not in record.error["message"]
        assert KEY[:4] not in json.dumps(record.to_dict())


@pytest.mark.parametrize("url", ["http://me:sk-secret@host:1", "https://host/?key=sk-secret"])
def test_an_address_with_a_secret_in_it_is_refused_unsaid(url: str) -> None:
    with pytest.raises(UserError, match="KV_SERVER_KEY") as refused:
        default_options(server_url=url)
    assert "sk-secret" not in str(refused.value)


def test_an_address_that_is_none(checkpoint: Path) -> None:
    for url in ("host:8000", "ftp://host", "http://", "http://host:x"):
        with pytest.raises(
            UserError, match=r"--kv-server-url=.*: no address of a server; for example --kv-server-url=http"
        ):
            default_options(server_url=url)
    options = default_options(model=str(checkpoint), engine="server", device="cpu", **SWEEP)
    sessions = SessionPool(options)
    with pytest.raises(UserError, match="--kv-engine=server: give the server's address"):
        sessions.get(cases_of("dse", options)[0])
    # as only httpx finds out
    options = default_options(
        model=str(checkpoint), engine="server", device="cpu", server_url="http://1.2.3.999", **SWEEP
    )
    with pytest.raises(UserError, match=r"^--kv-server-url=http://1\.2\.3\.999: no address of a server \(.*\); for"):
        SessionPool(options).get(cases_of("dse", options)[0])
