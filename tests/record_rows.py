"""Record rows of the compression suite, built with the real Case, Record and MetricRegistry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from kvsuite import __version__
from kvsuite.case import Case, digest
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.record import RUN_SCHEMA, Record

NO_VRAM = "not measured on cpu"
REGISTRY = MetricRegistry()


def build_row(
    name: str = "streaming_32",
    *,
    group: str | None = None,
    budget: int | None = None,
    policy: str | None = "streaming_llm",
    engine: str = "hf",
    suite: str = "compression",
    ttft: float = 0.02,
    tpots: tuple[float, ...] = (0.010, 0.011, 0.012),
    throughput: tuple[float, ...] | float = (90.0, 91.0, 92.0),
    texts: tuple[tuple[float, int, int], ...] = ((250.0, 100, 40), (600.0, 200, 90)),
    ratio: tuple[float, float] | None = (1.03, 0.002),
    cache: tuple[float, float, float] = (32.0, 32.0, 32.0),
    kv_bytes: int = 2**20,
    peak_vram: int | None = None,
    kind: str = "real",
    status: str = "ok",
    **record: Any,
) -> dict[str, Any]:
    """One row; ``texts`` are (nll_sum, tokens, correct), ``cache`` (fewest, mean, most)."""
    baseline = name == "baseline"
    case = Case(
        suite=suite,
        engine=engine,
        model="smollm2",
        name=name,
        device="cpu",
        dtype="float32",
        policy=None if baseline else policy,
        policy_params={} if baseline else {"start_size": 4, "positions": "original", "skip_layers": []},
        workload={
            "protocol": "streaming-decode",
            "corpus": "default",
            "num_samples": len(texts),
            "max_tokens": 257,
            "prompt_tokens": 192,
            "max_new_tokens": 32,
            "batch": 1,
        },
        params={"group": group or ("baseline" if baseline else "streaming"), "budget": budget},
    )
    value = REGISTRY.value
    metrics: dict[str, dict[str, Any]] = {}
    if status == "ok":
        metrics = {
            "ttft_s": value("ttft_s", [ttft, ttft * 1.1, ttft * 1.2]),
            "tpot_s": value("tpot_s", list(tpots), clock="perf_counter"),
            "e2e_s": value("e2e_s", [0.5, 0.6, 0.7]),
            "output_tok_s": value("output_tok_s", throughput if isinstance(throughput, float) else list(throughput)),
            "cache_tokens_min": value("cache_tokens_min", cache[0]),
            "cache_tokens_mean": value("cache_tokens_mean", cache[1]),
            "cache_tokens_max": value("cache_tokens_max", cache[2]),
            "kv_bytes_exact": value("kv_bytes_exact", kv_bytes),
            "mem_measured_peak_bytes": value("mem_measured_peak_bytes", peak_vram, reason=NO_VRAM)
            if peak_vram is None
            else value("mem_measured_peak_bytes", peak_vram),
        }
        quality: dict[str, float | None] = dict.fromkeys(("perplexity", "perplexity_se", "next_token_acc"))
        quality |= {"ppl_ratio": None, "ppl_ratio_se": None}
        if kind != "dummy":
            tokens = sum(text[1] for text in texts)
            perplexity = math.exp(sum(text[0] for text in texts) / tokens)
            quality |= {"perplexity": perplexity, "perplexity_se": perplexity / 50}
            quality["next_token_acc"] = sum(text[2] for text in texts) / tokens
            if ratio is not None:
                quality |= {"ppl_ratio": ratio[0], "ppl_ratio_se": ratio[1]}
        reason = "random weights" if kind == "dummy" else "not asked for"
        metrics |= {
            metric: value(metric, number) if number is not None else value(metric, None, reason=reason)
            for metric, number in quality.items()
        }
    samples = {
        "rounds": [
            {"ttft_s": ttft, "tpot_s": tpot, "e2e_s": 0.5, "prefill_s": ttft, "itl_s": [tpot]} for tpot in tpots
        ],
        "texts": []
        if kind == "dummy"
        else [
            {"index": index, "nll_sum": nll, "tokens": tokens, "correct": correct, "chars": 5 * tokens, "sha256": "ab"}
            for index, (nll, tokens, correct) in enumerate(texts)
        ],
    }
    return Record(
        case=case,
        id=f"benchmarks/test_{suite}.py::test_{suite}[{case.id}]",
        case_key=case.key(model_revision="r1", dataset_revision="d1"),
        settings_hash=digest({"rounds": len(tpots)}),
        status=status,  # type: ignore[arg-type]
        metrics=metrics,
        samples=samples if status == "ok" else {},
        model={"label": "SmolLM2-135M", "revision": "r1", "kind": kind},
        rounds=len(tpots),
        warmup=2,
        env=digest({}),
        **record,
    ).to_dict()


def build_run(**fields: Any) -> dict[str, Any]:
    environment = {"python": "3.11.2", "host": "testhost"}
    return {
        "schema": RUN_SCHEMA,
        "kvsuite_version": __version__,
        "env": digest(environment),
        "run_id": "run-1",
        "method": "streaming_llm",
        "model": "smollm2",
        "started_utc": "2026-11-20T10:15:00Z",
        "command": ["pytest", "benchmarks"],
        "options": {
            "method": "streaming_llm",
            "model": "smollm2",
            "num_samples": 2,
            "max_tokens": 257,
            "max_new_tokens": 32,
            "skip_layers": [],
        },
        "environment": environment,
        "seed": 7,
        **fields,
    }


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    return build_row


@pytest.fixture
def run() -> dict[str, Any]:
    return build_run()


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Baseline, two controls, two methods, in the original's code order."""
    return [
        build_row("baseline", cache=(224.0, 224.0, 224.0), kv_bytes=7 * 2**20, ratio=(1.0, 0.0)),
        build_row("recent_only_32", group="recent_only", policy="recent_only", budget=32, texts=((700.0, 200, 50),)),
        build_row("recent_only_64", group="recent_only", policy="recent_only", budget=64, texts=((650.0, 200, 60),)),
        build_row("streaming_32", budget=32, cache=(32.0, 44.8, 224.0)),
        build_row("streaming_64", budget=64, kv_bytes=2 * 2**20, cache=(64.0, 64.0, 64.0)),
    ]
