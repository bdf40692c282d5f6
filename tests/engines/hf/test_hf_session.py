"""The session of the hf engine on the tiny dummy model: what it stamps, counts and refuses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hf_sessions import LAYERS, TOKEN_BYTES, CountingClock, case, random_tokens, session, streaming
from policy_matrix import MATRIX, Line
from requests_served import timed, times_of, tokens_of

from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.cache import EvictionCache
from kvsuite.engines.hf.engine import HfEngine
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.registry import SessionPool, get_engine
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.meters.clock import PerfCounterClock
from kvsuite.quantization.bytes import step_weight_bytes

PROMPT = random_tokens(64)
EVERY_LINE = pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])


def case_of(line: Line, **common: Any) -> Any:
    return case(name=line.id, policy=line.policy, policy_params=line.parameters | common)


@contextmanager
def fed_tokens(on: HfSession) -> Iterator[list[int]]:
    """Numbers of tokens of every forward of the model."""
    fed: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        fed.append(kwargs["input_ids"].shape[1])

    handle = on.decoder.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield fed
    finally:
        handle.remove()


def greedy(tokens: list[int], count: int) -> list[int]:
    """transformers' own greedy generation with its own cache."""
    ids = torch.tensor([tokens])
    made = session().decoder.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return [int(t) for t in made[0, len(tokens) :]]


def test_greedy_output_is_that_of_transformers() -> None:
    on = session()
    for of in (case(), streaming(10**6), streaming(10**6, positions="cache")):
        on.prepare(of)
        assert tokens_of(on, PROMPT, 24) == greedy(PROMPT, 24)
    on.prepare(streaming(8))
    assert tokens_of(on, PROMPT, 24) != greedy(PROMPT, 24)


@EVERY_LINE
def test_cases_do_not_reach_one_another(line: Line) -> None:
    on = session()
    on.prepare(case_of(line))
    first = tokens_of(on, PROMPT, 16)
    for other in (streaming(8, positions="cache", skip_layers=[1]), case()):
        on.prepare(other)
        tokens_of(on, random_tokens(30, seed=5), 8)
    on.prepare(case_of(line))
    assert tokens_of(on, PROMPT, 16) == first


def test_defect_06_ttft_holds_the_whole_prefill() -> None:
    on = session()
    on.prepare(streaming(16))
    with fed_tokens(on) as fed:
        clock = CountingClock(lambda: sum(fed))
        times = times_of(on, PROMPT, 8, clock)
    # prefill, first token, seven more; the first two stamps stand after all of the prompt
    assert clock.starts == 1
    assert clock.at_start == 0
    assert clock.counts == [64, 64, 65, 66, 67, 68, 69, 70, 71]
    assert fed == [64] + [1] * 7
    assert (times.prefill_end, times.ttft_s, times.e2e_s) == (1.0, 2.0, 9.0)
    assert (times.prompt_tokens, times.prefill_computed, times.generated) == (64, 64, 8)


def test_defect_06_a_long_prompt_has_a_longer_ttft_than_one_token() -> None:
    on = session()
    on.prepare(case())
    long, clock = random_tokens(1500), PerfCounterClock()
    for prompt in (long, long[:1]):
        times_of(on, prompt, 1, clock)
    prefill = min(times_of(on, long, 1, clock).ttft_s for _ in range(3))
    first_step = min(times_of(on, long[:1], 1, clock).ttft_s for _ in range(3))
    assert prefill > 2 * first_step


@pytest.mark.parametrize("new_tokens", [1, 2, 9])
def test_defect_06_as_many_tokens_as_asked(new_tokens: int) -> None:
    on = session()
    on.prepare(case())
    with fed_tokens(on) as fed:
        times, output = timed(on, PROMPT, new_tokens, CountingClock())
    assert times.generated == new_tokens
    assert len(fed) == new_tokens
    assert len(output) == new_tokens
    assert len(tokens_of(on, PROMPT, new_tokens)) == new_tokens


def test_defect_05_warm_up_runs_the_timed_shape() -> None:
    on = session()
    on.prepare(streaming(16))
    with fed_tokens(on) as fed:
        tokens_of(on, PROMPT, 8)
    assert fed == [64] + [1] * 7


def test_timed_rounds_reuse_their_buffers() -> None:
    on = session()
    on.prepare(streaming(16))

    def buffers() -> list[int]:
        cache = on._generation.persistent_cache(64, 7)
        assert isinstance(cache, EvictionCache)
        return [t.data_ptr() for layer in cache.layers for t in layer.store.tensors()]

    times_of(on, PROMPT, 8, CountingClock())
    at = buffers()
    assert len(at) == 2 * LAYERS
    for seed in (1, 2):
        times_of(on, random_tokens(64, seed=seed), 8, CountingClock())
    assert buffers() == at


def test_the_last_output_is_that_of_an_untimed_run() -> None:
    on = session()
    for of in (case(), streaming(16), streaming(16, positions="cache")):
        on.prepare(of)
        _, output = timed(on, PROMPT, 12, CountingClock())
        assert output == tokens_of(on, PROMPT, 12)


def test_defect_15_the_dtype_is_said() -> None:
    for asked, found in (("float32", "float32"), ("bfloat16", "bfloat16"), ("checkpoint", "float32")):
        on = HfSession(case(dtype=asked), EngineSettings(threads=1))
        on.prepare(case(dtype=asked))
        assert on.dtype_name == on.effective["dtype"] == found
        assert on.decoder.model.dtype == getattr(torch, found)
        assert on.full_kv_bytes(1) == TOKEN_BYTES // (1 if found == "float32" else 2)


def test_what_is_in_effect() -> None:
    on = session()
    on.prepare(streaming(16, positions="cache", skip_layers=[2]))
    assert on.effective == {
        "device": "cpu", "dtype": "float32", "attention": "sdpa", "threads": 1, "decode_step": "eager",
        "implementation": "ring", "positions": "cache", "skip_layers": [2], "frees_memory": True,
        "weight_format": "fp32",
    }  # fmt: skip
    on.prepare(case())
    assert (on.effective["positions"], on.effective["skip_layers"]) == ("original", [])


def test_what_a_method_was_asked_to_remove() -> None:
    on = session()
    for of, ratio in (
        (case(), None),
        (streaming(16), None),
        (case(policy="fix_size_l2", policy_params={"size": 8, "keep_ratio": 0.5}), None),
        (case(policy="l2_compress", policy_params={"keep_ratio": 0.9}), 0.1),
    ):
        on.prepare(of)
        assert on.ratio_requested == ratio


def test_a_graph_on_a_cpu_is_invalid() -> None:
    on = HfSession(case(), EngineSettings(threads=1, decode_step="graph"))
    with pytest.raises(CaseInvalid, match="--kv-decode-step=graph: CUDA graphs need a CUDA device; use auto or eager"):
        on.prepare(case())


def test_rules_of_a_case() -> None:
    on = session()
    with pytest.raises(UserError, match=r"--kv-skip-layers=.*4,9: the model has layers 0 to 3; leave out 4, 9"):
        on.prepare(streaming(16, skip_layers=[0, 4, 9]))
    with pytest.raises(CaseInvalid, match="SM partitions"):
        on.prepare(case(partition={"sms": 16}))
    with pytest.raises(UserError, match="unknown policy"):
        on.prepare(case(policy="nosuch"))
    with pytest.raises(UserError, match="snapkv_lite: not part of kvsuite; use kvpress:SnapKV"):
        on.prepare(case(policy="snapkv_lite"))


def test_devices_that_are_not_here() -> None:
    engine = HfEngine()
    assert engine.unavailable("cpu") is None
    assert "runs where torch does" in str(engine.unavailable("vulkan:0"))
    if not torch.cuda.is_available():
        reason = str(engine.unavailable("cuda:0"))
        assert "sees no CUDA device" in reason
        assert "--kv-device=cpu" in reason
    with pytest.raises(UserError, match="--kv-engine=nosuch"):
        get_engine("nosuch")


def test_a_session_serves_the_cases_of_one_model() -> None:
    pool = SessionPool(threads=1)
    first = pool.get(case())
    assert pool.get(streaming(8)) is first is pool.current
    other = pool.get(case(dtype="bfloat16"))
    assert other is not first
    assert other.dtype_name == "bfloat16"
    with pytest.raises(CaseSkipped, match="vulkan:0"):
        pool.get(case(device="vulkan:0"))
    pool.close()
    assert pool.current is None


def test_a_closed_session_gives_its_weights_back() -> None:
    import weakref

    pool = SessionPool(threads=1)
    on = pool.get(case())
    assert isinstance(on, HfSession)
    on.prepare(streaming(8))
    times_of(on, PROMPT, 4, CountingClock())
    weights = weakref.ref(on.decoder.model.lm_head.weight)
    del on
    pool.close()
    gc.collect()
    assert weights() is None


def test_decode_reads_all_weights_but_an_untied_embedding() -> None:
    on = HfSession(case(), EngineSettings(threads=1))
    model = on.decoder.model
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert on.model["step_weight_bytes"] == step_weight_bytes(model) == total - 512 * 64 * 4
    model.lm_head.weight = model.model.embed_tokens.weight
    assert step_weight_bytes(model) == total - 512 * 64 * 4


def test_copy_and_ring_generate_the_same() -> None:
    copying = HfSession(case(), EngineSettings(threads=1, implementation="copy"))
    copying.decoder.model.load_state_dict(session().decoder.model.state_dict())
    for line in MATRIX:
        tokens = []
        for on in (session(), copying):
            on.prepare(case_of(line))
            tokens.append(tokens_of(on, PROMPT, 24))
        assert tokens[0] == tokens[1], line.id
        assert (session().effective["implementation"], copying.effective["implementation"]) == ("ring", "copy")
