"""The session: losses, policies and requests beside engine hf on the same weights, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hf_sessions import session as hf_session
from llamacpp_sessions import case_of, needs_library, session_of, widened_session

from kvsuite.case import Case
from kvsuite.engines.capabilities import (
    AppliesPolicy,
    ComparesWindows,
    GivesLogits,
    ScoresThroughCache,
    ScoresWindows,
    lacking,
)
from kvsuite.engines.llamacpp.engine import LlamacppEngine
from kvsuite.engines.llamacpp.kv_log import flash_attention_said
from kvsuite.engines.llamacpp.library import LogLine
from kvsuite.engines.llamacpp.session import LlamacppSession
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import PerfCounterClock
from kvsuite.meters.reference_rows import ReferenceRows, RowComparison
from kvsuite.options.resolve import default_options
from kvsuite.workloads.windows import plan_windows

pytestmark = needs_library
TOKENS = [(7 * index + index * index) % 512 for index in range(48)]
#: nats; another token in the cache, or one at another position, moves losses by 0.1 and more
TOLERANCE = 5e-3
F32 = {"kv_cache_dtype": "f32"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamacppSession]:
    found = widened_session(tmp_path_factory.mktemp("cache"))
    yield found
    found.close()


def policy(name: str, positions: str, **sizes: int) -> dict[str, Any]:
    return {"policy": name, "policy_params": {"positions": positions, **sizes}}


def test_it_can_what_the_suites_ask_for(tiny: LlamacppSession) -> None:
    for capability in (AppliesPolicy, ScoresThroughCache, GivesLogits, ScoresWindows, ComparesWindows):
        assert lacking(tiny, capability) is None


@pytest.mark.parametrize(
    "method",
    [
        {},
        policy("streaming_llm", "original", start_size=4, recent_size=12),
        policy("streaming_llm", "cache", start_size=4, recent_size=12),
        policy("recent_only", "cache", window=16),
    ],
    ids=["full", "streaming", "streaming, positions in the cache", "recent only, positions in the cache"],
)
@pytest.mark.parametrize(("protocol", "prefix"), [("streaming-decode", 0), ("prefix-continuation", 20)])
def test_losses_through_the_cache_are_those_of_transformers(
    tiny: LlamacppSession, method: dict[str, Any], protocol: str, prefix: int
) -> None:
    ours, theirs = case_of(params=F32, **method), case_of(engine="hf", **method)
    reference = hf_session()
    tiny.prepare(ours)
    reference.prepare(theirs)
    found = tiny.score(TOKENS, protocol, prefix)
    expected = reference.score(TOKENS, protocol, prefix)
    assert (found.targets, found.positions) == (expected.targets, expected.positions)
    assert found.nll == pytest.approx(expected.nll, abs=TOLERANCE)
    assert tiny.score_reference(TOKENS, found.positions[0]).nll == pytest.approx(
        reference.score_reference(TOKENS, found.positions[0]).nll, abs=TOLERANCE
    )
    reference.finish()


@pytest.mark.parametrize("method", [{}, policy("streaming_llm", "cache", start_size=4, recent_size=12)])
def test_requests_get_the_tokens_of_transformers_and_the_planned_bytes(
    tiny: LlamacppSession, method: dict[str, Any]
) -> None:
    ours = case_of(params=F32, **method)
    tiny.prepare(ours)
    request = ServeRequest(TOKENS[:24], 8)
    served = tiny.serve([request], PerfCounterClock())
    reference = hf_session()
    reference.prepare(case_of(engine="hf", **method))
    assert served.outputs == reference.serve([request]).outputs
    [times] = served.times
    assert (times.generated, times.prefill_computed, len(times.itl_s)) == (8, 24, 7)
    assert times.prefill_end is not None
    assert 0 < times.prefill_end <= times.ttft_s
    found = tiny.memory([request])
    assert found.kv_bytes_decode == tiny.planned_kv_bytes(24, 8)
    assert found.kv_bytes_decode == reference.planned_kv_bytes(24, 8)
    assert found.lengths_decode == [16 if method else 31] * 4
    assert found.unseen is None
    assert found.kv_bytes_allocated == tiny.full_kv_bytes(256) * 2  # f32 for f16
    reference.finish()


def test_requests_that_are_served_together_get_what_each_gets_alone(tiny: LlamacppSession) -> None:
    requests = [ServeRequest(TOKENS[index : index + 10 + 3 * index], 4 + index) for index in range(8)]
    tiny.prepare(case_of(params=F32))
    alone = [tiny.serve([one]).outputs[0] for one in requests]
    together = tiny.serve(requests, PerfCounterClock())
    assert together.outputs == alone
    assert [one.generated for one in together.times] == [4 + index for index in range(8)]
    assert together.counts["largest_batch"] == 8
    assert together.counts["decode_steps"] == 10
    found = tiny.memory(requests)
    assert found.kv_bytes_decode == sum(
        2 * tiny.full_kv_bytes(len(one.prompt) + one.new_tokens - 1) for one in requests
    )
    # of the longest one, as on the other engines
    assert found.lengths_prefill == [10 + 3 * 7] * 4
    assert found.lengths_decode == [10 + 3 * 7 + 4 + 7 - 1] * 4


def point(context: int, chunk: int, batch: int, **given: Any) -> Case:
    params = {"context": context, "prefill_chunk": chunk, "batch": batch, "window": -1, "sink": 0} | given
    workload = {
        "protocol": "serving", "prompt_tokens": context // 2, "max_new_tokens": 4, "batch": batch, "prefix_caching": False,
    }  # fmt: skip
    return case_of(suite="dse", params=params, workload=workload)


def test_a_design_point_reaches_the_runtime(tiny: LlamacppSession) -> None:
    case = point(300, 32, 2)
    tiny.prepare(case)
    assert {name: tiny.effective[name] for name in ("cells", "sequences", "n_batch", "n_ubatch")} == {
        "cells": 512, "sequences": 2, "n_batch": 32, "n_ubatch": 32,
    }  # fmt: skip
    assert tiny.effective["kv_cache_dtype"] == "f16"
    served = tiny.serve([ServeRequest(TOKENS[:30], 4), ServeRequest(TOKENS[5:45], 4)])
    assert served.counts["prefill_steps"] == 3
    assert tiny.reach(case).inert == {}
    inert = tiny.reach(point(300, 512, 2, window=64, sink=4)).inert
    assert set(inert) == {"prefill_chunk", "window", "sink"}
    assert tiny.reach(point(300, 512, 2)).settings == tiny.reach(point(300, 1024, 2)).settings
    assert tiny.reach(case).settings != tiny.reach(point(300, 64, 2)).settings


def test_windows_are_scored_and_compared_with_the_cache_in_f16(tiny: LlamacppSession) -> None:
    windows = plan_windows("hf-strided", len(TOKENS), 24, 12)
    given: dict[str, Any] = {"prefix": "none", "prefix_token": None}
    tiny.prepare(case_of(params={"kv_cache_dtype": "bf16"}))
    found = tiny.score_windows(TOKENS, windows, **given).tokens
    reference = hf_session()
    reference.prepare(case_of(engine="hf"))
    expected = reference.score_windows(TOKENS, windows, **given).tokens
    assert (found.targets, found.positions) == (expected.targets, expected.positions)
    assert found.nll == pytest.approx(expected.nll, abs=0.05)
    compared = tiny.compare_windows(tiny, TOKENS, windows, **given)
    assert compared.nll == found.nll
    # three bits more than bfloat16: about an eighth of its error, whatever the processor
    assert _furthest(compared.nll_reference, expected.nll) < _furthest(found.nll, expected.nll) / 4
    assert 0 < max(compared.kld) < 1e-3
    tiny.prepare(case_of(params=F32))
    assert tiny.score_windows(TOKENS, windows, **given).tokens.nll == pytest.approx(expected.nll, abs=1e-4)
    reference.finish()


def _furthest(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def test_rows_of_the_full_cache_are_the_reference_and_no_distance_from_themselves(tiny: LlamacppSession) -> None:
    tiny.prepare(case_of(params=F32))
    rows = ReferenceRows()
    rows.scores = tiny.score_rows(TOKENS, "streaming-decode", 0, rows.add, full=True)
    again, other = RowComparison(rows), RowComparison(rows)
    same = again.found(tiny.score_rows(TOKENS, "streaming-decode", 0, again.add, full=True))
    assert same.nll == same.nll_reference
    assert max(same.kld) < 1e-6
    found = other.found(tiny.score_rows(TOKENS, "streaming-decode", 0, other.add, full=False))
    assert found.nll != found.nll_reference
    assert found.nll == pytest.approx(found.nll_reference, abs=5e-3)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"params": {"kv_cache_dtype": "int8"}}, r"^--kv-cache-dtype=int8: .*f32, f16, .*or --kv-engine=hf"),
        ({"quantization": "q4f16_1"}, r"^--kv-quantization=q4f16_1: .*--kv-gguf-type"),
        ({"dtype": "bfloat16"}, r"^--kv-dtype=bfloat16: llama.cpp computes in float32"),
        ({"policy": "h2o"}, r"^h2o on engine llamacpp: .*--kv-engine=hf"),
        ({"policy": "kvpress:SnapKV"}, r"^kvpress:SnapKV on engine llamacpp"),
    ],
)
def test_what_no_session_can_run_is_refused_before_anything_is_loaded(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(CaseInvalid, match=reason):
        LlamacppEngine().refuse(case_of(**given))
    LlamacppEngine().refuse(case_of(params={"kv_cache_dtype": "q8_0:q4_0"}, policy="streaming_llm"))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (case_of(params={"kv_cache_dtype": "q8_0"}), "stores 32 numbers together, and the head size 16"),
        (case_of(**policy("recent_only", "cache", window=8) | {"policy_params": {"window": 8, "skip_layers": [0]}}),
         "^--kv-skip-layers"),
        (case_of(params={"kv_cache_dtype": "bf16"}, **policy("recent_only", "cache", window=8)),
         "rotate keys in bf16 anew.*--kv-positions=original"),
        (point(1 << 30, 512, 64), "^no room: 64 sequences of 1073741824 tokens in f16 need .* bytes .*, and .* are free"),
        (case_of(partition={"decode": 8, "prefill": 8}), "leave the partition out"),
    ],
    ids=["head size", "layers", "shift", "room", "partition"],
)  # fmt: skip
def test_what_this_model_or_machine_cannot_have_is_one_line(tiny: LlamacppSession, case: Case, reason: str) -> None:
    with pytest.raises(CaseInvalid, match=reason) as caught:
        tiny.prepare(case)
    assert "\n" not in str(caught.value)


def test_a_cache_that_llama_cpp_does_not_make_is_refused_with_its_reason(tiny: LlamacppSession) -> None:
    from kvsuite.cache_formats.ggml_format import GgmlFormat
    from kvsuite.engines.llamacpp.context import Context, ContextSettings

    settings = ContextSettings(tokens=32, batch=32, micro_batch=32, format=GgmlFormat("q8_0", "q8_0"), threads=1)
    with pytest.raises(
        CaseInvalid, match=r"^--kv-cache-dtype=q8_0, --kv-flash-attention=auto: llama.cpp makes no such cache: "
    ):
        Context(tiny._model, tiny._of, settings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("llama_context: flash_attn            = disabled", "disabled"),
        # of what was left to it, it says later what came out; other parts are told of in the same words
        ("llama_context: flash_attn            = auto\nresolve: Flash Attention enabled", "enabled"),
        (
            "llama_context: flash_attn            = enabled\n"
            "sched_reserve: Flash Attention not supported, set to disabled\n"
            "sched_reserve: fused Gated Delta Net (chunked) enabled",
            "disabled",
        ),
        ("llama_context: flash_attn            = auto", None),
    ],
)
def test_whether_flash_attention_runs_is_what_is_said_last(text: str, said: str | None) -> None:
    assert flash_attention_said([LogLine(False, line) for line in text.split("\n")]) == said


def test_options_that_make_another_case_are_part_of_it() -> None:
    assert LlamacppEngine().case_params() == {}
    chosen = LlamacppEngine(default_options(ubatch="64", gguf_type="q8_0", flash_attention="auto"))
    assert chosen.case_params() == {"ubatch": 64, "gguf_type": "q8_0"}


def test_a_written_file_is_found_again(tmp_path: Path) -> None:
    session_of(cache_dir=tmp_path).close()
    [first] = (tmp_path / "gguf").glob("*.gguf")
    stamp = first.stat().st_mtime_ns
    session_of(cache_dir=tmp_path).close()
    session_of(cache_dir=tmp_path, gguf_type="q8_0").close()
    names = sorted(path.name for path in (tmp_path / "gguf").glob("*.gguf"))
    assert (len(names), first.stat().st_mtime_ns) == (2, stamp)
    assert not [path for path in (tmp_path / "gguf").iterdir() if path.name.startswith(".dummy")]
