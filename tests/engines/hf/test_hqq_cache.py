"""transformers' quantised cache with hqq through our scoring is transformers' quantised cache with hqq."""

from __future__ import annotations

import pytest
import torch
from hf_sessions import case, random_tokens, session

from kvsuite.engines.hf.hqq_cache import INSTALL
from kvsuite.errors import CaseInvalid, CaseSkipped

TOKENS = random_tokens(60)


def needs_hqq() -> None:
    pytest.importorskip("hqq", reason=f"hqq is not installed: {INSTALL}")


def by_hand(tokens: list[int], prefix: int, bits: int) -> list[float]:
    """Losses by a plain loop over transformers' cache: a prompt, then one token a forward."""
    from transformers.cache_utils import QuantizedCache

    model = session().decoder.model
    cache = QuantizedCache(
        "hqq", model.config, nbits=bits, axis_key=1, axis_value=1, q_group_size=16, residual_length=8
    )
    losses = []
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens[:prefix]]), past_key_values=cache)
        for at in range(prefix, len(tokens) - 1):
            logits = model(input_ids=torch.tensor([tokens[at : at + 1]]), past_key_values=cache).logits[0, -1]
            losses.append(-float(logits.float().log_softmax(-1)[tokens[at + 1]]))
    return losses


@pytest.mark.parametrize("bits", [4, 8])
def test_losses_are_those_of_a_plain_loop(bits: int) -> None:
    needs_hqq()
    on = session()
    on.prepare(case(params={"kv_cache_dtype": f"hqq_int{bits}(group=16,residual=8)"}))
    found = on.score(TOKENS, "prefix-continuation", 30)
    assert found.nll == pytest.approx(by_hand(TOKENS, 30, bits), abs=1e-4)
    on.prepare(case())
    plain = on.score(TOKENS, "prefix-continuation", 30)
    if bits == 4:
        assert found.nll != pytest.approx(plain.nll, abs=1e-3), (
            "the cache changes nothing, so the test would see no mistake"
        )


def test_its_bytes_are_measured_and_not_predicted() -> None:
    needs_hqq()
    from requests_served import memory_of

    on = session()
    on.prepare(case(params={"kv_cache_dtype": "hqq_int4(group=16,residual=8)"}))
    found = memory_of(on, TOKENS[:30], 5)
    assert found.kv_bytes_decode is not None
    assert 0 < found.kv_bytes_decode < on.full_kv_bytes(34)
    assert on.planned_kv_bytes(30, 5) is None
    assert "transformers" in on.planned_unknown()


def test_what_it_does_not_combine_with_is_refused() -> None:
    policy = {"policy": "streaming_llm", "policy_params": {"start_size": 2, "recent_size": 6}}
    with pytest.raises(CaseInvalid, match=r"^--kv-cache-dtype=hqq_int4.*: transformers' cache"):
        session().prepare(case(params={"kv_cache_dtype": "hqq_int4(group=16,residual=8)"}, **policy))


def test_without_hqq_the_case_is_skipped_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CaseSkipped, match=r"needs hqq, which is not installed; run: pip install hqq"):
        session().prepare(case(params={"kv_cache_dtype": "hqq_int4(group=16)"}))
