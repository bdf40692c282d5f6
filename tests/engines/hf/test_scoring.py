"""Teacher-forced scoring through a cache, on small random models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hf_sessions import VOCAB, case, random_tokens, session, streaming
from requests_served import memory_of
from transformers import DynamicCache

from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.scoring import PROTOCOLS
from kvsuite.engines.hf.session import HfSession
from kvsuite.errors import CaseInvalid

TOKENS = random_tokens(60)


def by_hand(tokens: list[int], first: int = 1) -> list[float]:
    """Losses by transformers' own cache, one token a forward."""
    model, cache = session().decoder.model, DynamicCache()
    losses = []
    with torch.no_grad():
        for at, token in enumerate(tokens[:-1]):
            logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            losses.append(-float(logits.log_softmax(-1)[tokens[at + 1]]))
    return losses[first - 1 :]


def relative(found: list[float], wanted: list[float]) -> float:
    return abs(math.fsum(found) / math.fsum(wanted) - 1)


def test_streaming_decode_scores_all_tokens_but_the_first() -> None:
    on = session()
    on.prepare(case())
    scores = on.score(TOKENS, "streaming-decode", 0)
    assert scores.targets == TOKENS[1:]
    assert scores.positions == list(range(1, 60))
    assert len(scores.nll) == len(scores.correct) == 59
    assert scores.nll == pytest.approx(by_hand(TOKENS), rel=1e-5)


def test_prefix_continuation_leaves_its_first_token_out() -> None:
    on = session()
    on.prepare(case())
    scores = on.score(TOKENS, "prefix-continuation", 40)
    assert scores.targets == TOKENS[41:]
    assert scores.positions == list(range(41, 60))
    assert scores.nll == pytest.approx(by_hand(TOKENS, 41), rel=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_full_cache_is_one_forward(protocol: str) -> None:
    on = session()
    on.prepare(case())
    scores = on.score(TOKENS, protocol, 20)
    reference = on.score_reference(TOKENS, scores.positions[0])
    assert (reference.targets, reference.positions) == (scores.targets, scores.positions)
    assert reference.nll == pytest.approx(scores.nll, rel=1e-5)
    assert relative(reference.nll, scores.nll) < 1e-5
    assert reference.correct == scores.correct


def test_rows_of_the_reference_are_scored_in_parts() -> None:
    # more tokens than are turned to float32 at once
    long = random_tokens(600, seed=3)
    on = session()
    reference = on.score_reference(long, 1)
    with torch.no_grad():
        logits = on.decoder.model(input_ids=torch.tensor([long])).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(long[1:]), reduction="none")
    assert reference.nll == pytest.approx(wanted.tolist(), rel=1e-6)
    assert reference.correct == (logits.argmax(-1) == torch.tensor(long[1:])).tolist()


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_budget_beyond_the_text_is_the_full_cache(protocol: str, positions: Any) -> None:
    on = session()
    on.prepare(case())
    full = on.score(TOKENS, protocol, 20).nll
    on.prepare(streaming(10**6, positions=positions))
    found = on.score(TOKENS, protocol, 20).nll
    assert relative(found, full) < 1e-6
    if positions == "original":
        assert found == full
    on.prepare(streaming(8, positions=positions))
    assert relative(on.score(TOKENS, protocol, 20).nll, full) > 1e-5


def test_the_same_losses_again() -> None:
    on = session()
    on.prepare(streaming(8))
    first = on.score(TOKENS, "streaming-decode", 0)
    on.prepare(case())
    on.score(TOKENS, "streaming-decode", 0)
    on.prepare(streaming(8))
    assert on.score(TOKENS, "streaming-decode", 0) == first


def test_the_number_of_texts_scored_before_does_not_matter() -> None:
    """A cache is one text's: nothing of a text reaches the next one."""
    on = session()
    on.prepare(streaming(8))
    on.score(random_tokens(50, seed=9), "streaming-decode", 0)
    after = on.score(TOKENS, "streaming-decode", 0)
    on.prepare(streaming(8))
    assert on.score(TOKENS, "streaming-decode", 0) == after


def test_the_first_continuation_token_comes_from_the_whole_prompt() -> None:
    """Why it is not scored: the policy changes every loss but that one."""
    on = session()
    ids = torch.tensor([TOKENS])
    logits = []
    for of in (case(), streaming(8)):
        on.prepare(of)
        cache = on._generation.new_cache(20, 1)
        with torch.inference_mode():
            logits.append([on.decoder.forward(ids[:, :20], cache), on.decoder.forward(ids[:, 20:21], cache)])
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.allclose(logits[0][1], logits[1][1], atol=1e-4)


def test_six_hundred_tokens_are_599_predictions() -> None:
    on = session()
    on.prepare(streaming(256, skip_layers=[0, 1]))
    lengths: list[list[int]] = []
    forward = on.decoder.forward

    def watched(ids: Any, cache: Any) -> Any:
        logits = forward(ids, cache)
        lengths.append(cache.lengths())
        return logits

    on.decoder.forward = watched  # type: ignore[method-assign]
    try:
        scores = on.score(random_tokens(600, seed=4), "streaming-decode", 0)
    finally:
        del on.decoder.forward
    assert len(scores.nll) == len(lengths) == 599
    assert lengths[-1] == [599, 599, 256, 256]
    assert lengths[99] == [100] * 4


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary() -> None:
    on = HfSession(case(), EngineSettings(threads=1))
    on.decoder.model.lm_head.weight.data.zero_()
    for of in (case(), streaming(8), streaming(8, positions="cache")):
        on.prepare(of)
        for protocol in PROTOCOLS:
            assert on.score(TOKENS, protocol, 20).nll == pytest.approx(
                [math.log(VOCAB)] * (59 if "stream" in protocol else 39)
            )


def test_progress_is_told() -> None:
    on = session()
    on.prepare(case())
    told: list[tuple[int, int]] = []
    on.score(TOKENS, "streaming-decode", 0, lambda done, of: told.append((done, of)))
    assert told == [(16, 59), (32, 59), (48, 59), (59, 59)]


@pytest.mark.parametrize("press", ["SnapKV", "Knorm"])
class TestPresses:
    """kvpress scored by prefix-continuation; the continuation is fed one token at a time at its true positions."""

    PREFIX = 100
    TEXT = random_tokens(130, seed=7)

    def scores(self, press: str, keep: float) -> Any:
        pytest.importorskip("kvpress")
        on = session()
        on.prepare(case(policy=f"kvpress:{press}", policy_params={"keep_ratio": keep}))
        return on.score(self.TEXT, "prefix-continuation", self.PREFIX)

    def test_keeping_all_is_the_full_cache(self, press: str) -> None:
        found = self.scores(press, 1.0)
        assert found.positions == list(range(self.PREFIX + 1, 130))
        on = session()
        on.prepare(case())
        full = on.score(self.TEXT, "prefix-continuation", self.PREFIX)
        assert found.nll == pytest.approx(full.nll, rel=1e-6)
        reference = on.score_reference(self.TEXT, self.PREFIX + 1)
        assert found.nll == pytest.approx(reference.nll, rel=1e-5)

    def test_compression_shows(self, press: str) -> None:
        # a single forward over the text would give the same losses at every ratio: the hook runs after attention
        full, half, tenth = (self.scores(press, keep).nll for keep in (1.0, 0.5, 0.1))
        assert relative(half, full) > 1e-6
        assert relative(tenth, full) > 1e-6
        assert half != tenth

    def test_a_press_is_gone_when_its_case_is_over(self, press: str) -> None:
        on = session()
        on.prepare(case())
        before = on.score(self.TEXT, "prefix-continuation", self.PREFIX).nll
        self.scores(press, 0.1)
        on.prepare(case())
        assert on.score(self.TEXT, "prefix-continuation", self.PREFIX).nll == before

    def test_the_compressed_prompt_is_what_is_stored(self, press: str) -> None:
        pytest.importorskip("kvpress")
        on = session()
        on.prepare(case(policy=f"kvpress:{press}", policy_params={"keep_ratio": 0.25}))
        found = memory_of(on, self.TEXT[: self.PREFIX], 5)
        assert found.lengths_prefill == [25] * 4
        assert found.lengths_decode == [29] * 4
        assert found.kv_bytes_prefill == on.full_kv_bytes(25)
        assert found.kv_bytes_decode == on.full_kv_bytes(29)
        assert found.compress_s is not None
        assert found.compress_s > 0
        assert on.ratio_requested == 0.75


def test_press_trap_attention_is_what_the_press_needs() -> None:
    pytest.importorskip("kvpress")
    on = session()
    on.prepare(case(policy="kvpress:ObservedAttention", policy_params={"keep_ratio": 0.5}))
    assert on.effective["attention"] == on.decoder.model.config._attn_implementation == "eager"
    on.prepare(case())
    assert on.effective["attention"] == on.decoder.model.config._attn_implementation == "sdpa"


def test_a_model_that_kvpress_does_not_know_is_skipped() -> None:
    pytest.importorskip("kvpress")
    from kvsuite.errors import CaseSkipped

    with pytest.raises((CaseSkipped, CaseInvalid)):
        neox_session().prepare(case(policy="kvpress:Knorm", policy_params={"keep_ratio": 0.5}))


def neox_session() -> HfSession:
    from tiny_decoders import decoder

    built = HfSession(case(), EngineSettings(threads=1))
    built._loaded.model = decoder("neox").model
    return built
