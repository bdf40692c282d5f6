"""Sliding windows with attention sinks against a dense mask, and the blocks they free."""

from __future__ import annotations

import pytest
import torch
from decoders import forward, greedy, loaded, text
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import LogitsByRequest, serving
from torch import Tensor

from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.reference_attention import visible


def dense(tokens: list[int], window: int, sinks: int) -> Tensor:
    """Logits ``[n, vocab]`` where every query sees the sinks and the last ``window`` tokens, its own among them."""
    at = torch.arange(len(tokens))
    query, key = at[:, None], at[None]
    mask = (key <= query) & ((key < sinks) | (query - key < window))
    with torch.inference_mode():
        logits: Tensor = (
            loaded("llama")
            .model(input_ids=torch.tensor([tokens]), attention_mask=mask[None, None], use_cache=False)
            .logits[0]
        )
    return logits


@pytest.mark.parametrize("chunk", [8, 200])
@pytest.mark.parametrize(("window", "sinks"), [(8, 0), (8, 4), (9, 5), (1, 1), (30, 7), (500, 4)])
def test_logits_equal_a_dense_mask(window: int, sinks: int, chunk: int) -> None:
    texts = [text(length + 20, seed=length) for length in (3, 50, 33, 1)]
    with serving(
        loaded("llama"),
        sliding_window=window,
        attention_sinks=sinks,
        block_size=4,
        max_num_batched_tokens=chunk,
        num_blocks=40,
    ) as runtime:
        seen = LogitsByRequest(runtime)
        requests = runtime.run([greedy(tokens[:-20], 20, forced=tokens[-20:]) for tokens in texts])
    for request, tokens in zip(requests, texts, strict=True):
        wanted = dense(tokens, window, sinks)[len(tokens) - 21 : -1]
        torch.testing.assert_close(seen.of(request), wanted, atol=2e-5, rtol=1e-4)


def test_a_window_changes_what_a_model_says() -> None:
    tokens = text(40)
    assert not torch.allclose(dense(tokens, 8, 4), forward(loaded("llama"), tokens), atol=1e-2)
    torch.testing.assert_close(dense(tokens, 40, 0), forward(loaded("llama"), tokens), atol=1e-5, rtol=1e-5)


def test_blocks_outside_the_window_are_free_while_the_request_runs() -> None:
    """A text far longer than the pool: sinks' blocks, window, and a block cut at either end."""
    with serving(
        loaded("llama"),
        sliding_window=8,
        attention_sinks=5,
        block_size=4,
        max_num_batched_tokens=8,
        num_blocks=7,
        prefix_caching=False,
    ) as runtime:
        request = runtime.add(greedy(text(100), 60))
        while runtime.unfinished:
            runtime.step()
            if request.output_length > 1 and runtime.unfinished:
                # 5 sinks in 2 blocks; 8 tokens in 2 or 3 blocks
                assert runtime.tables[0].pool.used <= 2 + 3
        assert request.output_length == 60
        assert request.preemptions == 0


def test_a_prefix_found_under_a_window_gives_the_same() -> None:
    prompt = text(50)
    with serving(loaded("llama"), sliding_window=8, attention_sinks=4, block_size=4) as runtime:
        first, second = (runtime.run([greedy(prompt, 10)])[0] for _ in range(2))
        assert second.prefix_hits == 48
    assert first.output == second.output


def test_two_windows_are_refused() -> None:
    with (
        pytest.raises(CaseInvalid, match="own sliding window of 12"),
        serving(loaded("mistral-window"), sliding_window=8),
    ):
        pass


@settings(max_examples=200)
@given(
    window=st.integers(1, 20),
    sinks=st.integers(0, 9),
    block_size=st.integers(1, 5),
    past=st.integers(0, 40),
    queries=st.integers(1, 12),
    data=st.data(),
)
def test_the_mask_follows_positions(
    window: int, sinks: int, block_size: int, past: int, queries: int, data: st.DataObject
) -> None:
    """Whatever whole blocks between sinks and window are gone, a query sees the sinks and its window."""
    head = -(-sinks // block_size) * block_size
    gone_at_most = max(0, (past - window + 1 - head) // block_size)
    dropped = data.draw(st.integers(0, gone_at_most)) * block_size
    stored = [p for p in range(past + queries) if not head <= p < head + dropped]
    group = LayerGroup((0,), 1, 1, window=window, sinks=sinks)
    mask = visible(group, queries, len(stored), dropped, block_size, torch.device("cpu"))
    assert mask is not None
    for row, at in enumerate(range(past, past + queries)):
        seen = [p for p, shown in zip(stored, mask[row].tolist(), strict=True) if shown]
        assert seen == [p for p in range(at + 1) if p < sinks or at - p < window]
