"""Models that are parted between cards: what is asked of vLLM, and that bytes are those of all cards."""

from __future__ import annotations

import pytest
from vllm_sessions import NEW, POOL, PROMPT, TOKEN_BYTES, case, load, requests

from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.vllm.memory_model import VllmMemory
from kvsuite.engines.vllm.session import VllmSession
from kvsuite.errors import CaseInvalid
from kvsuite.memory_model.config import architecture_of
from kvsuite.memory_model.design_point import DesignPoint

CARDS = 4


def on_cards(monkeypatch: pytest.MonkeyPatch, stored: str = "auto", **given: str) -> VllmSession:
    """A session of the recorded model on four cards, each with its part of the recorded pool."""
    monkeypatch.setenv("VLLM_DOUBLE_CARDS", str(CARDS))
    params = {} if stored == "auto" else {"kv_cache_dtype": stored}
    options = {"vllm_tensor_parallel_size": str(CARDS), "vllm_pool_bytes": str(POOL // CARDS)} | given
    return load(case(device="cuda:0", params=params), EngineSettings(decode_step="eager"), **options)


@pytest.mark.parametrize(("stored", "blocks"), [("auto", 8), ("fp8_e4m3", 16)])
def test_bytes_are_those_of_all_cards(stored: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    session = on_cards(monkeypatch, stored)
    try:
        found = session.memory(requests(1))
        assert session.effective["tensor_parallel_size"] == CARDS
    finally:
        session.close()
    token = TOKEN_BYTES if stored == "auto" else TOKEN_BYTES // 2
    assert found.kv_bytes_decode == (PROMPT + NEW - 1) * token
    assert found.kv_bytes_allocated == POOL
    assert found.predicted == {"pool_bytes": POOL, "pool_blocks": blocks}
    assert not found.warnings
    assert [found.reported[f"card{card}_pool_bytes"] for card in range(CARDS)] == [POOL // CARDS] * CARDS
    # what the recorded device said that its model holds
    assert [found.reported[f"card{card}_weights_bytes"] for card in range(CARDS)] == [311_296_000 // CARDS] * CARDS
    # a card's peak is that of the larger phase; a phase's that of all cards
    assert [found.reported[f"card{card}_peak_bytes"] for card in range(CARDS)] == [13_000, 13_001, 13_002, 13_003]
    assert (found.prefill.peak.value, found.decode.peak.value) == (4 * 12_000 + 6, 4 * 13_000 + 6)


def test_a_session_takes_the_cards_from_its_device_on(monkeypatch: pytest.MonkeyPatch) -> None:
    session = on_cards(monkeypatch)
    try:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert session._environment()["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-a,1")
        assert session._environment()["CUDA_VISIBLE_DEVICES"] == "7,5,GPU-a,1"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3")
        with pytest.raises(CaseInvalid, match="size=4: from cuda:0 on there are 3 cards; give less"):
            session._environment()
    finally:
        session.close()


@pytest.mark.parametrize(("stored", "element_bytes"), [("bfloat16", 2), ("fp8", 1)])
def test_a_model_of_seventy_billion_on_four_cards(stored: str, element_bytes: int) -> None:
    """80 layers, 8 heads of 128 for keys and for values: two heads of each on a card."""
    memory = VllmMemory(architecture_of("dummy:Llama-3-70B"), "bfloat16", element_bytes, 16, CARDS)
    token = 80 * 2 * 8 * 128 * element_bytes
    assert memory.block_bytes * CARDS == 16 * token
    found = memory.predict(DesignPoint("none", 8192, 2048, 16, -1, 0))
    assert found.part("parameters") == 2 * 70_553_706_496
    assert found.allocation is not None
    assert found.allocation.bytes == (16 * 8192 + 16) * token
    # with more cards than heads every card has a whole head
    sixteen = VllmMemory(architecture_of("dummy:Llama-3-70B"), "bfloat16", element_bytes, 16, 16)
    assert sixteen.block_bytes * 16 == 2 * 16 * token
