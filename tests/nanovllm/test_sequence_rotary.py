"""Frequencies that follow the length of a sequence: every request gets those that it would get alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decoders import VOCAB, generated, greedy, text, wrap
from serving import serving
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from kvsuite.compression import get_policy
from kvsuite.engines.nano.runtime import RuntimeHolder
from kvsuite.engines.nano.scoring import score_rows, score_text
from kvsuite.errors import CaseInvalid
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.request import Status
from kvsuite.nanovllm.scoring import Passage, score_passages

SWITCH = 32
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": SWITCH,
    },
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", list(ROPES))
MIXED = (5, 31, 90, 32, 33, 28)


def changing(kind: str, family: tuple[Any, Any] = (LlamaConfig, LlamaForCausalLM), **config: Any) -> LoadedModel:
    """A model that changes beyond 32 tokens, so much that another frequency is another token."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.15, "rope_parameters": dict(ROPES[kind]), "pad_token_id": 0,
        "max_position_embeddings": SWITCH if kind == "dynamic" else 512, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return wrap(family[1](family[0](**shape, **config)))


def afresh(of: LoadedModel) -> None:
    """transformers keeps the frequencies of the longest sequence so far until one comes that is shorter than the switch."""
    with torch.inference_mode():
        of.model(input_ids=torch.tensor([[3]]))


def outputs(of: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """What `transformers.generate` gives each prompt alone."""
    found = []
    for prompt in prompts:
        afresh(of)
        found.append(generated(of, prompt, new_tokens))
    return found


def alone(of: LoadedModel, tokens: Sequence[int], together: int) -> Tensor:
    """Logits ``[n, vocab]`` of a sequence whose first tokens are fed at once, and the others one by one."""
    afresh(of)
    with torch.inference_mode():
        out = of.model(input_ids=torch.tensor([list(tokens[:together])]), use_cache=True)
        found, cache = [out.logits[0]], out.past_key_values
        for token in tokens[together:]:
            out = of.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            found.append(out.logits[0])
    return torch.cat(found)


def losses(logits: Tensor, targets: Sequence[int]) -> list[float]:
    found: list[float] = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()
    return found


@KINDS
@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_batched_tokens": 512, "num_blocks": 64},
        {"max_num_batched_tokens": 9, "num_blocks": 64},
        {"max_num_batched_tokens": 24, "num_blocks": 28, "block_size": 4, "prefix_caching": False},
        {"max_num_batched_tokens": 24, "num_blocks": 28, "block_size": 4},
    ],
    ids=["whole", "chunks", "preempted", "preempted with prefixes"],
)
def test_requests_get_what_they_get_alone(kind: str, limits: dict[str, Any]) -> None:
    of = changing(kind)
    prompts = [text(length, seed=length) for length in MIXED]
    expected = outputs(of, prompts, 12)
    with serving(of, max_model_len=128, **limits) as runtime:
        found = runtime.run([greedy(prompt, 12) for prompt in prompts])
        assert (runtime.counters.preemptions > 0) == (limits["num_blocks"] == 28)
    assert [request.output for request in found] == expected
    # and the model is as it was
    assert outputs(of, prompts, 12) == expected


@KINDS
def test_a_prefix_is_shared_by_sequences_of_equal_frequencies_alone(kind: str) -> None:
    of = changing(kind)
    shared = text(24)
    given = [shared + text(3, seed=1), shared + text(2, seed=2), shared + text(30, seed=3), shared + text(29, seed=4),
             shared + text(30, seed=5)]  # fmt: skip
    expected = outputs(of, given, 10)
    with serving(of, block_size=8) as runtime:
        found = [runtime.run([greedy(prompt, 10)])[0] for prompt in given]
    assert [request.output for request in found] == expected
    # dynamic scaling has other frequencies for 53 tokens than for 54
    assert [request.prefix_hits for request in found] == [0, 24, 0, 0 if kind == "dynamic" else 24, 24]


@KINDS
@pytest.mark.parametrize("step", [8, 512])
def test_windows_are_scored_as_each_in_a_pass_of_its_own(kind: str, step: int) -> None:
    of = changing(kind)
    texts = [text(length, seed=length) for length in MIXED]
    wanted = [loss for own in texts for loss in losses(alone(of, own[:-1], len(own) - 1), own[1:])]
    with serving(of, max_num_batched_tokens=step, prefix_caching=False) as runtime:
        found = score_passages(runtime, [Passage(own[:-1], own[1:]) for own in texts])
    assert found.nll == pytest.approx(wanted, abs=1e-4)


@KINDS
@pytest.mark.parametrize("step", [16, 2048])
def test_protocols_are_scored_as_they_feed_their_tokens(kind: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsuite.engines.nano.runtime._STEP_TOKENS", {"cpu": step})
    of = changing(kind)
    tokens = text(80)
    holder = RuntimeHolder(of, "auto")
    # a policy that never acts: tokens are fed one by one
    idle = get_policy("streaming_llm", start_size=4, recent_size=100)
    for protocol, prefix in (("streaming-decode", 1), ("prefix-continuation", 20), ("prefix-continuation", 50)):
        wanted = losses(alone(of, tokens[:-1], prefix)[prefix - (protocol == "streaming-decode") :],
                        tokens[prefix + (protocol != "streaming-decode") :])  # fmt: skip
        for policy in (None, idle):
            found = score_text(holder, policy, tokens, protocol, prefix, None)
            assert found.nll == pytest.approx(wanted, abs=1e-4), (protocol, policy)
        holder.drop()
    whole = score_rows(holder, tokens, 21, len(tokens), full=False)
    holder.drop()
    with torch.inference_mode():
        reference = of.model(input_ids=torch.tensor([tokens])).logits[0, 20:-1]
    assert whole.nll == pytest.approx(losses(reference, tokens[21:]), abs=1e-4)


@KINDS
def test_nothing_changes_where_no_sequence_can_pass_the_switch(kind: str) -> None:
    of = changing(kind)
    prompt = text(20)
    with serving(of, max_model_len=SWITCH) as runtime:
        assert runtime.rotary is None
        [request] = runtime.run([greedy(prompt, 12)])
    assert request.output == generated(of, prompt, 12)


def test_a_model_that_computes_all_again_at_its_switch_is_refused_there_alone() -> None:
    """Phi-3's generate throws the cache away when an output passes the switch."""
    of = changing("longrope", (Phi3Config, Phi3ForCausalLM), original_max_position_embeddings=SWITCH)
    served, refused = [(20, 13), (32, 1), (33, 20), (60, 9)], [(20, 14), (32, 2)]
    with serving(of, max_model_len=128) as runtime:
        found = [runtime.run([greedy(text(length), new)])[0] for length, new in served]
        for length, new in refused:
            [request] = runtime.run([greedy(text(length), new)])
            assert request.status is Status.FAILED
            assert "computes everything again" in str(request.reason)
    assert [request.output for request in found] == [generated(of, text(length), new) for length, new in served]


def test_another_angle_than_the_embeddings_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of = changing("dynamic")
    own: Callable[..., Any] = of.model.model.rotary_emb.forward
    monkeypatch.setattr(
        of.model.model.rotary_emb, "forward", lambda x, position_ids: tuple(one * 2 for one in own(x, position_ids))
    )
    with pytest.raises(CaseInvalid, match="changes its frequencies"), serving(of):
        pass
