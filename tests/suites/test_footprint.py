"""Memory of a case before it runs: the engine's own prediction, without its runtime."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvsuite.case import Case
from kvsuite.distribution.plan import plan
from kvsuite.engines.mlc.memory_model import MlcMemory
from kvsuite.engines.nano.memory_model import NanoMemory
from kvsuite.memory_model.config import architecture_of
from kvsuite.options.resolve import Options, default_options
from kvsuite.suites import registry
from kvsuite.suites.dse.cases import dse_cases, point_of
from kvsuite.suites.footprint import Footprint
from kvsuite.suites.pipeline.cases import pipeline_cases
from kvsuite.suites.pipeline.footprint import pool_footprint
from kvsuite.suites.registry import suite_named

LLAMA = "dummy:Llama-3-8B"
CONFIGURATIONS = Path(__file__).parents[1] / "data" / "configurations"


def planned(engine: str, **options: str) -> tuple[Case, Options, Footprint]:
    given = {
        "engine": engine,
        "model": LLAMA,
        "quantization": "q4f16_1",
        "device": "cuda:0",
        "max_new_tokens": "8",
        "space": "ctx=4096;chunk=1024",
    }
    resolved = default_options(**(given | options))
    (case,) = dse_cases(resolved)
    return case, resolved, suite_named(case.suite).footprint(case, resolved)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_point_of_mlc_is_predicted_by_the_formulas_of_mlc(batch: int) -> None:
    case, _, found = planned("mlc", space=f"ctx=8192;chunk=2048;batch={batch}")
    # the configuration is written for the point, and pages have room for every sequence's context
    mlc = MlcMemory.of(architecture_of(LLAMA), 2048, per_sequence=True).predict(point_of(case))
    assert (found.bytes, found.share, found.is_whole) == (mlc.needed, 0.85, True)
    nano = planned("nano", space=f"ctx=8192;chunk=2048;batch={batch}")[2]
    assert nano.bytes == NanoMemory(architecture_of(LLAMA), "bfloat16", "cuda").predict(point_of(case)).needed
    assert (nano.share, nano.weight_bytes) == (0.9, found.weight_bytes)
    assert nano.bytes != found.bytes


def test_short_contexts_get_what_mlc_wants_beside_a_request() -> None:
    case, _, found = planned("mlc", space="ctx=64;chunk=64")
    expected = MlcMemory(architecture_of(LLAMA), 64, per_sequence=True, sequence_tokens=32 + 8 + 176)
    assert found.bytes == expected.predict(point_of(case)).needed


def test_what_only_a_compiled_library_tells_is_a_lower_bound() -> None:
    _, _, found = planned("mlc", model="dummy:tiny")
    assert not found.is_whole
    assert found.bytes is not None
    assert "can only be read from its compiled library" in str(found.reason)


def test_an_engine_without_formulas_is_bounded_by_weights_and_cache() -> None:
    _, _, found = planned("hf", quantization="none", dtype="float16")
    architecture = architecture_of(LLAMA)
    assert found.bytes == found.weight_bytes + (2048 + 8) * architecture.kv_bytes_per_token(2)
    assert not found.is_whole


def configured(name: str, tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text((CONFIGURATIONS / f"{name}.json").read_text())
    return str(tmp_path)


def test_a_cache_of_layers_that_differ_is_bounded_by_what_they_store(tmp_path: Path) -> None:
    _, _, found = planned("hf", model=configured("gpt-oss-20b", tmp_path), quantization="none", dtype="float16")
    # every other layer slides over 128 tokens, and holds one less than that
    assert found.bytes == 12 * 8 * 2 * 64 * 2 * (2048 + 8) + 12 * 8 * 2 * 64 * 2 * 127
    assert "the weight shapes of gpt_oss are not known" in str(found.reason)
    # the weights come on top, so it may still be too large, but not said to be likely
    assert [found.fits(size) for size in (1 << 10, 1 << 40)] == ["no", "unknown"]


def test_where_neither_weights_nor_cache_are_known_there_is_no_number(tmp_path: Path) -> None:
    _, _, found = planned("nano", model=configured("DeepSeek-V3", tmp_path), quantization="none", dtype="float16")
    assert found.bytes is None
    assert "the weight shapes of deepseek_v3 are not known" in str(found.reason)
    assert "attends to latents" in str(found.reason)


def test_a_format_that_mlc_does_not_have_has_a_reason() -> None:
    _, _, found = planned("mlc", quantization="none")
    assert found.reason == (
        "--kv-quantization=none: no weight format of MLC; choose from " + str(found.reason).partition("choose from ")[2]
    )
    assert found.bytes == found.weight_bytes


def test_nothing_is_loaded_for_it() -> None:
    code = """
import sys
from kvsuite.options.resolve import default_options
from kvsuite.suites.dse.cases import dse_cases
from kvsuite.suites.registry import suite_named
for engine in ("mlc", "nano", "hf"):
    options = default_options(engine=engine, model="dummy:Llama-3-8B", device="cuda:0", quantization="q4f16_1")
    assert all(suite_named("dse").footprint(case, options).bytes for case in dse_cases(options))
print([name for name in ("torch", "transformers", "matplotlib") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_plan_asks_the_suite_of_a_case_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fifth(type(suite_named("compression"))):  # type: ignore[misc]
        name = "fifth"

        def footprint(self, case: Case, options: Options) -> Footprint:
            return Footprint(bytes=5.0, is_whole=True, reason="by hand")

    monkeypatch.setitem(registry._hooked, "fifth", Fifth())
    options = default_options(model="dummy:tiny", device="cpu")
    (ours, *_) = suite_named("compression").cases(options)
    theirs = replace(ours, suite="fifth")
    known, found = (one.memory for one in plan([ours, theirs], options, {}))
    assert found == Footprint(bytes=5.0, is_whole=True, reason="by hand")
    # one that says nothing of its own is bounded by weights and cache
    architecture = architecture_of("dummy:tiny")
    tokens = int(ours.workload["max_tokens"])
    assert known.bytes == known.weight_bytes + tokens * architecture.kv_bytes_per_token(4)


def test_what_waits_beside_the_pool_layer_by_layer_is_in_a_pipelines_lower_bound() -> None:
    def bytes_of(**options: str) -> list[float | None]:
        given = {
            "model": "dummy:Qwen3-8B", "device": "cuda:0", "dtype": "bfloat16", "pipeline_method": "mean_pool",
            "variants": "compression-only", "workloads": "synthetic-long", "synthetic_context": "1000", "factors": "5",
            "pipeline_batch_sizes": "4",
        }  # fmt: skip
        resolved = default_options(**(given | options))
        return [pool_footprint(case, resolved).bytes for case in pipeline_cases(resolved) if case.policy is not None]

    [at_the_end, paced] = bytes_of(decode_layers_per_step="off,4", synthetic_output="64")
    assert at_the_end is not None
    assert paced is not None
    assert paced - at_the_end == 200 * 36 * 2 * 8 * 128 * 2
    # a request of so few tokens is over before all layers are merged
    [at_the_end, paced] = bytes_of(decode_layers_per_step="off,4", synthetic_output="8")
    assert paced == at_the_end
