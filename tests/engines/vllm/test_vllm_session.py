"""Engine vllm on recorded answers of a real vLLM: what is made of them, by counting.

What this cannot prove: that vLLM still answers so. docs/vllm.md says what was seen with the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_sessions import BATCH, NEW, POOL, PROMPT, TOKEN_BYTES, case, engine, load, requests

from kvsuite.engines.vllm.model_folder import model_folder
from kvsuite.engines.vllm.session import VllmSession
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.config import architecture_of
from kvsuite.memory_model.design_point import DesignPoint
from kvsuite.models.resolve import resolve_model
from kvsuite.workloads.windows import plan_windows

BLOCKS = BATCH * 2 + 1


@pytest.fixture(scope="module")
def session() -> Iterator[VllmSession]:
    found = load()
    yield found
    found.close()


def test_what_is_held_is_counted_and_was_predicted(session: VllmSession) -> None:
    found = session.memory(requests())
    assert found.kv_bytes_prefill == BATCH * PROMPT * TOKEN_BYTES
    # the last token is chosen and never fed
    assert found.kv_bytes_decode == BATCH * (PROMPT + NEW - 1) * TOKEN_BYTES
    assert found.kv_bytes_decode == session.planned_kv_bytes(PROMPT, NEW, BATCH)
    assert set(found.lengths_decode) == {PROMPT + NEW - 1}
    assert len(found.lengths_decode) == 28
    assert found.predicted == {"pool_bytes": BLOCKS * 32 * TOKEN_BYTES, "pool_blocks": BLOCKS}
    assert found.reported == found.predicted | {"kv_blocks": 6, "kv_block_bytes": 6 * 32 * TOKEN_BYTES}
    assert not found.warnings


def test_the_prediction_without_vllm_is_that_of_the_session(session: VllmSession) -> None:
    architecture = architecture_of("dummy:Qwen3-0.6B")
    point = DesignPoint("none", 64, 48, BATCH, -1, 0)
    before = engine().memory_model(architecture, case()).predict(point)
    assert before == session.memory_model(architecture).predict(point)
    assert before.allocation is not None
    assert before.allocation.bytes == BLOCKS * 32 * TOKEN_BYTES
    assert before.part("parameters") == session.model["weights_bytes"]


def test_requests_are_timed_by_the_steps_that_gave_their_tokens(session: VllmSession) -> None:
    served = session.serve(requests(), session.clock(None))  # type: ignore[arg-type]
    assert [one.generated for one in served.times] == [NEW] * BATCH
    assert [len(one) for one in served.outputs] == [NEW] * BATCH
    # 48 tokens a step: prompts of 40 end in steps 1, 2 and 3, and each later step gives every running request a token
    firsts = [one.chunks[0][0] for one in served.times]
    assert firsts == sorted(firsts)
    for earlier, later in zip(served.times, served.times[1:], strict=False):
        assert earlier.chunks[1][0] == later.chunks[0][0]
    assert served.counts["computed_prefill_tokens"] == served.counts["logical_prompt_tokens"] == BATCH * PROMPT
    assert served.counts["computed_decode_tokens"] == BATCH * (NEW - 1)
    assert (served.counts["largest_batch"], served.counts["preemptions"], served.counts["prefix_hit_tokens"]) == (
        BATCH,
        0,
        0,
    )
    assert served.engine is not None
    # vLLM's own stamps end where ours do, each from its own request's entry on
    assert 0 < served.engine.times["engine_ttft_s"] < max(firsts)
    assert served.engine.times["engine_tpot_s"] == pytest.approx(
        sum(one.tpot_s or 0 for one in served.times) / BATCH, rel=0.05
    )
    assert session.serve(requests()).times == []


def test_every_target_has_a_loss_and_the_last_token_of_a_full_context_too(session: VllmSession) -> None:
    tokens = list(range(100, 180))
    windows = plan_windows("disjoint", len(tokens), 64, 64, prefix="none")
    found = session.score_windows(tokens, windows, prefix="none", prefix_token=None)
    assert found.tokens.positions == [*range(1, 64), *range(65, 80)]
    assert found.tokens.targets == [tokens[at] for at in found.tokens.positions]
    assert len(found.tokens.nll) == len(found.tokens.correct) == 63 + 15
    assert (found.forwards, found.forward_tokens) == (2, 63 + 15)
    # random weights choose among all alike
    assert all(11.9 < nll < 12.0 for nll in found.tokens.nll)


def test_what_was_set_is_said(session: VllmSession) -> None:
    session.serve(requests())
    said = session.effective
    assert {name: said[name] for name in ("decode_step", "attention", "kv_cache_dtype", "kv_tensors", "dtype", "vllm")} == {
        "decode_step": "eager", "attention": "CPU_ATTN", "kv_cache_dtype": "auto", "kv_tensors": ["bfloat16"],
        "dtype": "bfloat16", "vllm": "0.32.0",
    }  # fmt: skip
    limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks", "prefix_caching")
    assert [said[name] for name in limits] == [64, BATCH, 48, 32, BLOCKS, False]
    assert said["compile_s"] == 0.0


@pytest.mark.parametrize("asked", ["fp8_e4m3", "fp8_e5m2"])
def test_eight_bits_double_the_tokens_of_a_pool_exactly(asked: str) -> None:
    pool = POOL
    blocks = {}
    for stored in ("auto", asked):
        params = {} if stored == "auto" else {"kv_cache_dtype": stored}
        session = load(case(params=params), vllm_pool_bytes=str(pool))
        try:
            found = session.memory(requests(1))
            assert not found.warnings
            assert found.predicted["pool_blocks"] == found.reported["pool_blocks"]
            assert session.effective["kv_tensors"] == (["bfloat16"] if stored == "auto" else ["uint8"])
            blocks[stored] = found.reported["pool_blocks"]
        finally:
            session.close()
    assert blocks == {"auto": 8, asked: 16}


def test_a_prompt_is_found_in_the_prefix_cache() -> None:
    session = load(case(workload={"prefix_caching": True}))
    try:
        first, second = (session.serve(requests(1), session.clock(None)) for _ in range(2))  # type: ignore[arg-type]
    finally:
        session.close()
    assert first.counts["prefix_hit_tokens"] == 0
    # a whole block of 32, of the 40 tokens
    assert second.counts["prefix_hit_tokens"] == 32
    assert second.times[0].prefill_computed == PROMPT - 32
    assert second.outputs == first.outputs


def test_a_pool_without_room_for_a_sequence_is_memory_that_ran_out() -> None:
    session = load(vllm_pool_bytes=str(32 * TOKEN_BYTES))
    try:
        with pytest.raises(
            MemoryError, match=r"^vLLM has no room \(start\): .*lower the batch, the context or --kv-vllm-pool"
        ):
            session.serve(requests())
    finally:
        session.close()


def test_more_requests_than_sequences_are_refused(session: VllmSession) -> None:
    with pytest.raises(CaseInvalid, match="4 requests for an engine of 3 sequences"):
        session.serve(requests(4))
    with pytest.raises(CaseInvalid, match="engine vllm serves all requests at once"):
        session.serve([type(requests(1)[0])([1, 2], 2, arrival_s=1.0)])


def test_axes_that_do_not_reach_vllm_are_named(session: VllmSession) -> None:
    reach = session.reach(case(params={"window": 32, "sink": 4}))
    assert set(reach.inert) == {"window", "sink"}
    assert reach.settings == session.reach(case()).settings
    assert session.reach(case(params={"prefill_chunk": 64})).settings != reach.settings


def test_a_preset_has_one_folder_for_all_its_cases(tmp_path: Path) -> None:
    # vLLM counts the path to what it compiles for: with another one for each case nothing compiled was ever found again
    spec = resolve_model("dummy:Qwen3-0.6B")
    first = Path(model_folder(spec, tmp_path))
    written = (first / "config.json").read_text()
    assert Path(model_folder(spec, tmp_path)) == first
    assert Path(model_folder(resolve_model("dummy:Qwen3-8B"), tmp_path)) != first
    # one that was cut short is written again
    (first / "config.json").write_text(written[:20])
    assert (Path(model_folder(spec, tmp_path)) / "config.json").read_text() == written
    assert [one.name for one in first.iterdir()] == ["config.json"]


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "vllm").write_text("a file")
    with pytest.raises(UserError, match=r"--kv-model=dummy:Qwen3-0\.6B: .*--kv-cache-dir"):
        model_folder(resolve_model("dummy:Qwen3-0.6B"), tmp_path)
