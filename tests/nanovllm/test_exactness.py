"""What the runtime computes is what transformers computes, however the work is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoders import KINDS, WINDOW, forward, fresh, generated, greedy, loaded, prompts, text
from serving import LogitsByRequest, serving

from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.request import Status
from kvsuite.quantization.apply import apply_quantization

MIXED = (1, 40, 7, 16, 33, 3, 57, 15, 17, 21)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_a_plain_forward_pass(kind: str) -> None:
    """Several sequences, chunks of prompts, preemption: every output token's logits."""
    of = loaded(kind)
    given = prompts(MIXED)
    texts = [prompt + text(10, seed=100 + i) for i, prompt in enumerate(given)]
    expected = [forward(of, tokens)[len(prompt) - 1 : -1] for prompt, tokens in zip(given, texts, strict=True)]
    # a model that sees 12 tokens back holds few blocks
    blocks = 20 if kind == "mistral-window" else 32
    with serving(of, max_num_batched_tokens=24, num_blocks=blocks, block_size=4, prefix_caching=False) as runtime:
        seen = LogitsByRequest(runtime)
        requests = [
            greedy(prompt, 10, forced=tokens[len(prompt) :]) for prompt, tokens in zip(given, texts, strict=True)
        ]
        runtime.run(requests)
        assert runtime.counters.preemptions > 0
    for request, wanted, tokens in zip(requests, expected, texts, strict=True):
        assert request.tokens == tokens
        found = seen.of(request)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prefill_first", [False, True])
@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_greedy_output_equals_generate(block_size: int, prefill_first: bool) -> None:
    of = loaded("llama")
    given = prompts(MIXED)
    expected = [generated(of, prompt, 24) for prompt in given]
    blocks = 90 // block_size + 1
    options: dict[str, Any] = {"prefill_first": prefill_first, "block_size": block_size, "num_blocks": blocks}
    with serving(of, max_model_len=84, max_num_batched_tokens=20, **options) as runtime:
        requests = runtime.run([greedy(prompt, 24) for prompt in given])
        assert runtime.counters.preemptions > 0
    assert [request.output for request in requests] == expected
    assert all(request.status is Status.FINISHED and request.reason == "length" for request in requests)


def test_a_repeated_prompt_is_found_and_gives_the_same() -> None:
    of = loaded("qwen3")
    shared = text(37)
    given = [shared, shared + text(9, seed=1), shared[:20] + text(5, seed=2), shared, shared[:32]]
    expected = [generated(of, prompt, 12) for prompt in given]
    with serving(of, block_size=8) as runtime:
        found = [runtime.run([greedy(prompt, 12)])[0] for prompt in given]
        assert [request.output for request in found] == expected
        # whole blocks of the prompt, and of its output where the text goes on with it; the last token is always computed
        assert [request.prefix_hits for request in found] == [0, 32, 16, 32, 24]
        assert runtime.counters.prefix_hit_tokens == 104
    with serving(of, block_size=8, prefix_caching=False) as runtime:
        found = [runtime.run([greedy(prompt, 12)])[0] for prompt in given]
        assert [request.output for request in found] == expected
        assert runtime.counters.prefix_hit_tokens == 0


def test_output_can_be_found_as_a_prefix() -> None:
    of = loaded("llama")
    with serving(of, block_size=4) as runtime:
        [first] = runtime.run([greedy(text(9), 10)])
        [second] = runtime.run([greedy(first.tokens + text(2, seed=3), 6)])
        assert second.prefix_hits == 16
    assert second.output == generated(of, second.prompt, 6)


def test_prefixes_shared_by_running_requests_are_stored_once() -> None:
    of = loaded("llama")
    shared = text(32)
    with serving(of, block_size=8) as runtime:
        runtime.run([greedy(shared, 1)])
        for seed in (1, 2, 3):
            runtime.add(greedy(shared + text(3, seed=seed), 4))
        runtime.step()
        assert runtime.tables[0].pool.used == 4 + 3


@pytest.mark.parametrize("kind", ["mistral-window", "qwen3-mixed"])
def test_a_models_own_window_frees_blocks(kind: str) -> None:
    of = loaded(kind)
    prompt = text(70)
    with serving(of, block_size=4, max_num_batched_tokens=16, prefix_caching=False) as runtime:
        [windowed] = [table for table in runtime.tables if table.window is not None]
        runtime.add(greedy(prompt, 40))
        most = 0
        while runtime.unfinished:
            runtime.step()
            most = max(most, windowed.pool.used)
        # a window, a chunk, and a block cut at either end
        assert most <= (WINDOW + 16) // 4 + 2
        if kind == "qwen3-mixed":
            assert [group.layers for group in runtime.groups] == [(0, 2), (1,)]


@pytest.mark.parametrize("name", ["q4f32_1", "fake_q3"])
def test_quantised_weights(name: str) -> None:
    of = fresh("llama")
    apply_quantization(of, name)
    given = prompts((5, 30, 11))
    expected = [generated(of, prompt, 12) for prompt in given]
    with serving(of, max_num_batched_tokens=16) as runtime:
        assert [request.output for request in runtime.run([greedy(p, 12) for p in given])] == expected


def test_the_model_is_given_back() -> None:
    of = loaded("llava")
    before = of.text_config._attn_implementation, of.model.config.vision_config._attn_implementation
    with serving(of) as runtime:
        assert of.model.config.vision_config._attn_implementation == before[1]
        runtime.run([greedy(text(5), 3)])
    assert (of.text_config._attn_implementation, of.model.config.vision_config._attn_implementation) == before


def generated_together(of: LoadedModel, given: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy output of `transformers.generate` for left-padded prompts: what it gives for each alone, in less time."""
    width = max(map(len, given))
    padded = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in given])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in given])
    out = of.model.generate(
        padded, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    found: list[list[int]] = out[:, width:].tolist()
    return found


@pytest.mark.parametrize(
    ("count", "new_tokens", "blocks", "preemptions", "prefix_hits"),
    # at each commit SmolLM2's tokens are compared with hf's, and preempted small models with `generate`
    [pytest.param(12, 12, 24, 3, 0, marks=pytest.mark.slow), pytest.param(32, 64, 80, 10, 1, marks=pytest.mark.slow)],
)
def test_smollm2_equals_generate(count: int, new_tokens: int, blocks: int, preemptions: int, prefix_hits: int) -> None:
    of = load_model(resolve_model("smollm2"), device="cpu", dtype="float32")
    words = (
        "The capital of France is the city of Paris, which lies on the river Seine. A cache keeps keys and values of "
        "tokens that were seen, so that nothing is computed twice. Once upon a time there was a small language model "
        "that wanted to know how much memory it needs, and what it forgets when it is given less of it than it would "
        "like to have. In 1969 two people walked on the Moon, while a third one waited for them in orbit. "
    ) * 2
    ids = of.tokenizer(words)["input_ids"]
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 64, (count,), generator=generator).tolist()
    # a third of the prompts share their beginning
    starts = [0 if i % 3 == 0 else int(torch.randint(0, 60, (1,), generator=generator)) for i in range(count)]
    given = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    expected = generated_together(of, given, new_tokens)
    # padding changes nothing, not even for the shortest, which has most of it
    shortest = min(range(count), key=lambda i: len(given[i]))
    assert generated(of, given[shortest], new_tokens) == expected[shortest]
    with serving(of, max_num_seqs=count, num_blocks=blocks, max_num_batched_tokens=96) as runtime:
        requests = runtime.run([greedy(prompt, new_tokens) for prompt in given])
        assert runtime.counters.preemptions >= preemptions
        assert runtime.counters.prefix_hit_tokens >= prefix_hits
        # chunks: the step's budget is smaller than all prompts that came at once
        assert runtime.counters.steps - runtime.counters.decode_steps >= sum(lengths) // 96
        assert runtime.counters.logical_output_tokens == count * new_tokens
        assert max(request.preemptions for request in requests) > 0
    wrong = [i for i, request in enumerate(requests) if request.output != expected[i]]
    assert wrong == []
