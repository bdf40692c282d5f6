"""Policies on paged blocks: the same logits as on the hf engine's cache, and no block lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoders import forward, generated, greedy, loaded, prompts, text
from serving import LogitsByRequest, serving
from torch import Tensor

from kvsuite.compression import get_policy
from kvsuite.compression.base import CacheView, Policy
from kvsuite.compression.streaming_llm import StreamingLLM
from kvsuite.engines.hf.attention import register_observed_attention
from kvsuite.engines.hf.decoder import CachedDecoder
from kvsuite.engines.rotary import Rotary
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.request import Status

STREAMING = ("streaming_llm", {"start_size": 3, "recent_size": 9})
OTHERS = (
    ("recent_only", {"window": 12}),
    ("l2_compress", {"keep_ratio": 0.5, "prune_after": 14, "mode": "single_shot"}),
    ("l2_compress", {"keep_ratio": 0.5, "prune_after": 14, "mode": "every_token"}),
    ("l2_compress", {"keep_ratio": 0.5, "prune_after": 14, "mode": "interval=5"}),
    ("fix_size_l2", {"size": 12, "keep_ratio": 0.25, "strategy": "keep_low"}),
    ("fix_size_l2", {"size": 13, "keep_ratio": 0.25, "strategy": "random", "seed": 5}),
    ("snapkv", {"keep_ratio": 0.5, "window": 4}),
    ("tova", {"keep_ratio": 0.4}),
    ("h2o", {"keep_ratio": 0.5, "recent_share": 0.25}),
    ("knorm", {"keep_ratio": 0.5}),
    ("expected_attention", {"keep_ratio": 0.5, "future": 16, "sinks": 2}),
    ("streaming_llm", {"start_size": 2, "factor": 3}),
    ("l2_compress", {"factor": 3}),
    ("h2o", {"factor": 3}),
    ("uniform_stride", {"factor": 3}),
)
LENGTHS = (30, 1, 12, 47, 13)


def rotation_of(of: LoadedModel, policy: Policy) -> Rotary | None:
    wanted = policy.positions == "cache" or policy.needs.query_statistics is not None
    return Rotary(of.model) if wanted else None


@torch.inference_mode()
def on_hf(of: LoadedModel, policy: Policy, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Logits ``[output, vocab]`` of the hf engine's cache."""
    decoder = CachedDecoder(of.model, of.text_config, of.device)
    rotary = rotation_of(of, policy)
    decoder.set_attention(register_observed_attention("sdpa"))
    cache = decoder.new_cache(policy, (64, 128), "ring", rotary)
    logits = [decoder.forward(torch.tensor([list(prompt)]), cache)[0, -1]]
    logits += [decoder.forward(torch.tensor([[token]]), cache)[0, -1] for token in output[:-1]]
    decoder.set_attention("sdpa")
    return torch.stack(logits)


def compare(kind: str, name: str, parameters: dict[str, Any], tolerance: float, preempt_at: Sequence[int] = ()) -> None:
    """Serve requests under a policy and compare every logit; after some steps the request admitted last is preempted."""
    of = loaded(kind)
    policy = get_policy(name, **parameters)
    texts = prompts([length + 25 for length in LENGTHS])
    given, outputs = [tokens[:-25] for tokens in texts], [tokens[-25:] for tokens in texts]
    expected = [on_hf(of, policy, prompt, output) for prompt, output in zip(given, outputs, strict=True)]
    # what looks at queries has to compute them
    limits: Any = {"block_size": 4, "max_num_batched_tokens": 20, "prefix_caching": not policy.needs.looks_at_queries}
    with serving(of, policy=policy, rotation=rotation_of(of, policy), **limits) as runtime:
        seen = LogitsByRequest(runtime)
        requests = [runtime.add(greedy(p, 25, forced=output)) for p, output in zip(given, outputs, strict=True)]
        while runtime.unfinished:
            runtime.step()
            if runtime.counters.steps in preempt_at:
                runtime.scheduler.preempt_for(greedy([1], 1))
        assert runtime.counters.preemptions == len(preempt_at)
        assert [request.reason for request in requests] == ["length"] * len(requests)
        assert runtime.counters.evicted_tokens > 0
    for request, wanted in zip(requests, expected, strict=True):
        torch.testing.assert_close(seen.of(request), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("skip", [(), (0, 2)])
@pytest.mark.parametrize(("positions", "tolerance"), [("original", 1e-5), ("cache", 1e-4)])
@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_streaming_llm_equals_hf(kind: str, positions: str, tolerance: float, skip: tuple[int, ...]) -> None:
    name, parameters = STREAMING
    compare(kind, name, parameters | {"positions": positions, "skip_layers": skip}, tolerance)


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize(("name", "parameters"), OTHERS)
def test_policies_equal_hf(name: str, parameters: dict[str, Any], positions: str) -> None:
    compare("llama", name, parameters | {"positions": positions}, 1e-4)


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize(("name", "parameters"), [STREAMING, OTHERS[2], OTHERS[4], OTHERS[8], *OTHERS[10:13]])
def test_a_preempted_request_is_compressed_again_as_before(
    name: str, parameters: dict[str, Any], positions: str
) -> None:
    compare("llama", name, parameters | {"positions": positions}, 1e-4, preempt_at=(5, 9, 15, 22))


@pytest.mark.parametrize(
    ("name", "parameters", "steps"),
    [
        ("knorm", {"keep_ratio": 0.3}, 2),
        ("snapkv", {"keep_ratio": 0.5, "window": 4}, 2),
        ("streaming_llm", {"start_size": 3, "recent_size": 9}, 11),
    ],
)
def test_a_resumed_request_is_fed_its_output_at_once_unless_the_policy_acts_on_it(
    name: str, parameters: dict[str, Any], steps: int
) -> None:
    of, prompt = loaded("llama"), text(30)
    found: list[Tensor] = []
    for preempted in (False, True):
        with serving(of, policy=get_policy(name, **parameters), block_size=4, prefix_caching=False) as runtime:
            seen = LogitsByRequest(runtime)
            request = runtime.add(greedy(prompt, 20))
            while len(request.output) < 10:
                runtime.step()
            before = runtime.counters.steps
            if preempted:
                runtime.scheduler.preempt_for(greedy([1], 1))
            while len(request.output) < 11:
                runtime.step()
            assert request.preemptions == preempted
            # the prompt, then the output that is known; a policy that acts while decoding has to see every token of it
            assert runtime.counters.steps - before == (steps if preempted else 1)
            while runtime.unfinished:
                runtime.step()
            found.append(seen.of(request))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize(
    ("name", "parameters"), [("streaming_llm", {"recent_size": 999}), ("fix_size_l2", {"size": 999})]
)
def test_a_policy_that_keeps_everything_changes_nothing(name: str, parameters: dict[str, Any], positions: str) -> None:
    of = loaded("llama")
    given = prompts(LENGTHS)
    expected = [generated(of, prompt, 12) for prompt in given]
    policy = get_policy(name, positions=positions, **parameters)
    with serving(of, policy=policy, rotation=Rotary(of.model)) as runtime:
        requests = runtime.run([greedy(prompt, 12) for prompt in given])
        assert runtime.counters.evicted_tokens == 0
    assert [request.output for request in requests] == expected


def test_a_compressed_sequence_holds_few_blocks() -> None:
    of = loaded("llama")
    policy = get_policy("streaming_llm", start_size=3, recent_size=9)
    with serving(of, policy=policy, block_size=4, prefix_caching=False) as runtime:
        request = runtime.add(greedy(text(60), 30))
        runtime.step()
        while runtime.unfinished:
            assert runtime.tables[0].pool.used == 3
            assert int(runtime.tables[0].lengths[request.row]) == 12
            runtime.step()
            # a token comes in before another one goes
        assert runtime.counters.evicted_tokens == 60 - 12 + 29


@pytest.mark.parametrize(
    ("name", "parameters", "more"),
    [
        ("streaming_llm", {"factor": 3}, False),
        ("snapkv", {"window": 4}, False),
        ("l2_compress", {"keep_ratio": 0.5, "prune_after": 14}, False),
        ("l2_compress", {"keep_ratio": 0.5, "prune_after": 50}, True),
        ("streaming_llm", {"recent_size": 12}, True),
    ],
)
@pytest.mark.parametrize("positions", ["original", "cache"])
def test_a_decode_step_costs_nothing_once_nothing_more_is_decided(
    name: str, parameters: dict[str, Any], more: bool, positions: str
) -> None:
    of = loaded("llama")
    policy = get_policy(name, positions=positions, **parameters)
    with serving(of, policy=policy, rotation=rotation_of(of, policy), prefix_caching=False) as runtime:
        request = runtime.add(greedy(text(30), 8))
        runtime.step()
        assert runtime.compression.due([request]) == [request], "its prompt has just ended"
        runtime.step()
        assert runtime.compression.due([request]) == ([request] if more else [])
        runtime.run()


@pytest.mark.parametrize(
    ("name", "keys", "values"), [("streaming_llm", 0, 0), ("uniform_stride", 0, 0), ("l2_compress", 1, 0), ("knorm", 1, 0),
     ("h2o", 1, 0), ("tova", 1, 0), ("expected_attention", 1, 1)],
)  # fmt: skip
def test_nothing_is_copied_that_the_policy_does_not_look_at(
    monkeypatch: pytest.MonkeyPatch, name: str, keys: int, values: int
) -> None:
    """What stays is moved; beside that no value is read where keys decide, and no key where positions do."""
    copied = {"keys_of": 0, "values_of": 0}
    for part in copied:
        original = getattr(KVPool, part)

        def counted(pool: KVPool, slots: Tensor, *layers: Any, part: str = part, original: Any = original) -> Tensor:
            copied[part] += 1
            found: Tensor = original(pool, slots, *layers)
            return found

        monkeypatch.setattr(KVPool, part, counted)
    of = loaded("llama")
    policy = get_policy(name, factor=3)
    with serving(of, policy=policy, rotation=rotation_of(of, policy), prefix_caching=False) as runtime:
        runtime.run([greedy(text(30), 3)])
        assert runtime.counters.evicted_tokens == 20
    # layer by layer, or several at once
    assert (copied["keys_of"] > 0, copied["values_of"] > 0) == (bool(keys), bool(values))


def test_a_shared_prefix_survives_compression() -> None:
    """The prompt's blocks can still be found, and give what they gave: compressed tokens went to other blocks."""
    of = loaded("llama")
    policy = get_policy("streaming_llm", start_size=3, recent_size=9)
    prompt, output = text(40), text(8, seed=9)
    wanted = on_hf(of, policy, prompt, output)
    with serving(of, policy=policy, block_size=4) as runtime:
        seen = LogitsByRequest(runtime)
        for hits in (0, 36, 36):
            [request] = runtime.run([greedy(prompt, 8, forced=output)])
            assert request.prefix_hits == hits
            torch.testing.assert_close(seen.of(request), wanted, atol=1e-5, rtol=1e-5)


def test_compressing_by_hand_equals_a_dense_mask() -> None:
    """Chosen tokens of one request go; another one that shares its blocks goes on undisturbed."""
    of = loaded("llama")
    prompt, output = text(22), text(9, seed=4)
    whole = forward(of, prompt + output)
    keep = torch.tensor([0, 1, 5, 6, 7, 11, 19, 20, 21])
    gone = sorted(set(range(22)) - set(keep.tolist()))
    mask = torch.ones(31, 31, dtype=torch.bool).tril()
    mask[22:, gone] = False
    with torch.inference_mode():
        wanted = of.model(
            input_ids=torch.tensor([prompt + output]), attention_mask=mask[None, None], use_cache=False
        ).logits[0]
    with serving(of, block_size=4, num_blocks=24) as runtime:
        seen = LogitsByRequest(runtime)
        request = runtime.add(greedy(prompt, 9, forced=output))
        runtime.step()
        other = runtime.fork(request)
        other.forced = output
        runtime.compress(request, keep)
        assert request.computed == 22
        assert int(runtime.tables[0].lengths[request.row]) == 9
        # three blocks of its own; the other one's six are untouched
        assert runtime.tables[0].pool.used == 3 + 6
        runtime.run()
    torch.testing.assert_close(seen.of(request), wanted[21:30], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.of(other), whole[22:30], atol=1e-5, rtol=1e-5)


def test_compressing_by_hand_is_repeated_after_preemption() -> None:
    of = loaded("llama")
    prompt, output = text(22), text(9, seed=4)
    keep = torch.arange(0, 22, 3)
    found = []
    for preempt in (False, True):
        with serving(of, block_size=4) as runtime:
            seen = LogitsByRequest(runtime)
            request = runtime.add(greedy(prompt, 9, forced=output))
            runtime.step()
            runtime.compress(request, keep)
            for _ in range(3):
                runtime.step()
            if preempt:
                assert runtime.scheduler.preempt_for(greedy([1], 1))
                assert request.status is Status.PREEMPTED
            runtime.run()
            assert request.preemptions == preempt
            found.append(seen.of(request))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_compressed_is_refused() -> None:
    of = loaded("llama")
    with serving(of) as runtime:
        request = runtime.add(greedy(text(10), 5))
        with pytest.raises(UserError, match="only a running one"):
            runtime.compress(request, torch.tensor([0]))
        runtime.step()
        for keep in ([10], [-1], []):
            with pytest.raises(UserError, match="tokens 0 to 9"):
                runtime.compress(request, torch.tensor(keep, dtype=torch.int64))
        with pytest.raises(UserError, match="2 lists of indices for 1 layer groups"):
            runtime.compress(request, [None, None])
        runtime.run()
    assert request.output == generated(of, request.prompt, 5)


def test_a_policy_on_a_sliding_window_is_refused() -> None:
    policy = get_policy("recent_only", window=8)
    with (
        pytest.raises(CaseInvalid, match="every layer has the model's own sliding window of 12"),
        serving(loaded("mistral-window"), policy=policy),
    ):
        pass
    with (
        pytest.raises(CaseInvalid, match="on top of a sliding window of 20"),
        serving(loaded("llama"), policy=policy, sliding_window=20),
    ):
        pass


def test_a_policy_that_looks_at_queries_does_not_take_a_prefix_from_the_cache() -> None:
    with (
        pytest.raises(CaseInvalid, match=r"policy h2o: it looks at the queries of a prompt.* leave prefix caching off"),
        serving(loaded("llama"), policy=get_policy("h2o")),
    ):
        pass
    # keys are in the cache, whoever computed them
    with serving(loaded("llama"), policy=get_policy("knorm")) as runtime:
        assert runtime.limits.prefix_caching


def test_cache_positions_need_something_to_rotate_with() -> None:
    policy = get_policy("recent_only", window=8, positions="cache")
    with pytest.raises(CaseInvalid, match="nothing to rotate keys with"), serving(loaded("llama"), policy=policy):
        pass


def test_a_policy_that_raises_costs_its_own_request() -> None:
    class Picky(StreamingLLM):
        def keep(self, view: CacheView) -> Tensor:
            if view.length == 21:
                raise ArithmeticError("21 tokens")
            return super().keep(view)

    of = loaded("llama")
    with serving(of, policy=Picky(start_size=3, recent_size=9), block_size=4) as runtime:
        good, bad = runtime.run([greedy(text(20), 6), greedy(text(21, seed=1), 6)])
    assert good.status is Status.FINISHED
    assert (bad.status, bad.reason) == (Status.FAILED, "compressing it failed: ArithmeticError: 21 tokens")
    assert isinstance(bad.error, ArithmeticError)
    wanted = on_hf(of, get_policy(*STREAMING[:1], **STREAMING[1]), good.prompt, good.output).argmax(-1)
    assert good.output == wanted.tolist()
