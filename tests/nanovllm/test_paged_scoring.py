"""Teacher-forced losses through the paged cache: those of a plain forward pass, however the work is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import VOCAB, forward, generated, greedy, loaded, text, wrap
from serving import serving
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

from kvsuite.compression import get_policy
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.scoring import Passage, Scores, rows_at_once, score_passages, score_steps

LENGTHS = (40, 2, 17, 33, 64, 9)


def passages(lengths: tuple[int, ...] = LENGTHS) -> list[Passage]:
    """Random texts of which all but some first tokens are targets."""
    found = []
    for seed, length in enumerate(lengths):
        tokens = text(length, seed=seed)
        found.append(Passage(tokens[:-1], tokens[1 + length // 3 :]))
    return found


def by_hand(of: Any, given: list[Passage]) -> Scores:
    """One plain forward pass a passage, float64 losses."""
    nll: list[float] = []
    correct: list[bool] = []
    for passage in given:
        rows = forward(of, passage.tokens)[-len(passage.targets) :].double()
        targets = torch.tensor(passage.targets)
        nll += torch.nn.functional.cross_entropy(rows, targets, reduction="none").tolist()
        correct += (rows.argmax(-1) == targets).tolist()
    return Scores(nll, correct)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox", "llava", "mistral-window", "qwen3-mixed"])
def test_passages_score_as_in_a_plain_forward_pass(kind: str) -> None:
    of, given = loaded(kind), passages()
    with serving(of, block_size=4, max_num_batched_tokens=24, prefix_caching=False) as runtime:
        found = score_passages(runtime, given)
        assert runtime.counters.logical_output_tokens == 0
        assert runtime.counters.computed_prefill_tokens == sum(len(p.tokens) for p in given)
        # several of them in a step, and the longest in several steps
        assert runtime.counters.steps == -(-sum(len(p.tokens) for p in given) // 24)
    wanted = by_hand(of, given)
    assert found.nll == pytest.approx(wanted.nll, abs=1e-5)
    assert found.correct == wanted.correct


def test_preempted_passages_are_scored_the_same() -> None:
    """Requests that were there before grow and take the blocks of a passage that is half computed."""
    of, given = loaded("llama"), passages((60, 50, 44, 57))
    with serving(of, block_size=1, num_blocks=80, max_num_batched_tokens=5, max_num_seqs=5) as runtime:
        growing = [runtime.add(greedy(text(4, seed=20 + i), 26)) for i in range(2)]
        found = score_passages(runtime, given)
        assert runtime.counters.preemptions > 0
        assert all(request.preemptions == 0 for request in growing)
    assert found.nll == pytest.approx(by_hand(of, given).nll, abs=1e-5)


def test_few_rows_are_projected_at_a_time() -> None:
    of, given = loaded("llama"), passages()
    most = []
    with serving(of, max_num_batched_tokens=200) as runtime:
        logits = runtime.runner.logits

        def note(rows: Tensor) -> Tensor:
            most.append(len(rows))
            return logits(rows)

        runtime.runner.logits = note  # type: ignore[method-assign]
        found = score_passages(runtime, given, rows=7)
        assert max(most) == 7
        assert 0 < rows_at_once(runtime) * VOCAB * 4 <= 32 * 2**20
    assert found.nll == pytest.approx(by_hand(of, given).nll, abs=1e-5)


def test_what_a_model_does_around_its_head_is_done() -> None:
    """Granite divides its logits."""
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = GraniteConfig(num_attention_heads=2, num_key_value_heads=1, logits_scaling=0.25, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        of = wrap(GraniteForCausalLM(config))
    given = passages((20, 31))
    with serving(of) as runtime:
        found = score_passages(runtime, given)
    assert found.nll == pytest.approx(by_hand(of, given).nll, abs=1e-5)


def test_scored_rows_are_computed_although_their_tokens_are_cached() -> None:
    of = loaded("llama")
    tokens = text(40)
    given = [Passage(tokens[:-1], tokens[-8:])]
    with serving(of, block_size=4) as runtime:
        runtime.run([greedy(tokens, 1)])
        computed = runtime.counters.computed_prefill_tokens
        found = score_passages(runtime, given)
        # 39 tokens, of which 31 are context: seven whole blocks of it
        assert runtime.counters.prefix_hit_tokens == 28
        assert runtime.counters.computed_prefill_tokens == computed + 39 - 28
    assert found.nll == pytest.approx(by_hand(of, given).nll, abs=1e-5)


def test_scoring_and_serving_share_steps() -> None:
    of, given = loaded("llama"), passages()
    with serving(of, max_num_batched_tokens=32) as runtime:
        request = runtime.add(greedy(text(12, seed=9), 12))
        found = score_passages(runtime, given)
        assert request.status is Status.FINISHED
    assert request.output == generated(of, request.prompt, 12)
    assert found.nll == pytest.approx(by_hand(of, given).nll, abs=1e-5)


def test_progress_ends_with_the_mean_loss() -> None:
    of, given = loaded("llama"), passages()
    seen: list[tuple[int, int, float]] = []
    with serving(of, max_num_batched_tokens=24) as runtime:
        found = score_passages(runtime, given, progress=lambda *event: seen.append(event))
    count = len(found.nll)
    assert len(seen) > 3
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (count, count, pytest.approx(sum(found.nll) / count, rel=1e-5))


def test_a_passage_that_cannot_be_served_ends_the_scoring_and_nothing_else() -> None:
    of = loaded("llama")
    tokens = text(60)
    with serving(of, max_model_len=50) as runtime:
        other = runtime.add(greedy(text(5), 3))
        with pytest.raises(RuntimeError, match=r"59 tokens .* max_model_len=50"):
            score_passages(runtime, [Passage(tokens[:20], tokens[1:21]), Passage(tokens[:-1], tokens[1:])])
        assert runtime.on_rows is None
        runtime.run()
        assert other.status is Status.FINISHED
        # a passage as long as the limit needs no room for output
        assert len(score_passages(runtime, [Passage(tokens[:50], tokens[1:51])]).nll) == 50


def test_what_cannot_be_scored_in_rows_is_refused() -> None:
    of = loaded("llama")
    policy = get_policy("recent_only", window=8)
    with serving(of, policy=policy) as runtime, pytest.raises(RuntimeError, match="with a policy or forced output"):
        score_passages(runtime, passages((20,)))
    with serving(of) as runtime:
        too_many = runtime.add(Request(text(5), scored=6))
        assert "scored=6: the prompt has 5 tokens" in str(too_many.reason)


@pytest.mark.parametrize("first", [0, 1])
def test_steps_score_as_rows_do(first: int) -> None:
    of = loaded("qwen3")
    tokens = text(50)
    with serving(of, max_num_batched_tokens=16) as runtime:
        found = score_steps(runtime, tokens[:20], tokens[20:], first=first)
        assert runtime.counters.decode_steps == 29
        at_once = score_passages(runtime, [Passage(tokens[:-1], tokens[20 + first :])])
    assert found.nll == pytest.approx(at_once.nll, abs=1e-5)
    assert found.correct == at_once.correct
