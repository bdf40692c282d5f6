"""The paged caches of both engines against TVM's, which is MLC-LLM's, on the same queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from decoders import WINDOW, greedy, loaded, text
from serving import serving
from torch import Tensor
from tvm_cache import TvmCache

from kvsuite.compression.streaming_llm import StreamingLLM
from kvsuite.engines.hf.decoder import CachedDecoder
from kvsuite.engines.rotary import Rotary
from kvsuite.models.load import LoadedModel

pytest.importorskip("tvm", reason="TVM's cache is the reference: pip install 'kvsuite[tvm]'")

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
OUTPUT = 28
# TVM's pages hold 16 tokens: prompts below, of and beyond one
PROMPTS = (5, 16, 41)


class Seen:
    """What the attention layers of a model are given before rotation, and what they give back."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], list[Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """``queries``, ``keys``, ``values`` or ``mixed``, ``[layers, tokens, heads, head_dim]``."""
        return torch.stack([torch.cat(self._parts[name, layer]) for layer in range(LAYERS)])

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        handles = []
        for layer, block in enumerate(model.model.layers):
            attention = block.self_attn
            given = {
                "queries": getattr(attention, "q_norm", attention.q_proj),
                "keys": getattr(attention, "k_norm", attention.k_proj),
                "values": attention.v_proj,
            }
            handles += [
                module.register_forward_hook(partial(self._given, name, layer)) for name, module in given.items()
            ]
            handles.append(attention.o_proj.register_forward_pre_hook(partial(self._mixed, layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _given(self, name: str, layer: int, module: Any, taken: Any, states: Tensor) -> None:
        self._keep(name, layer, states)

    def _mixed(self, layer: int, module: Any, taken: tuple[Tensor]) -> None:
        self._keep("mixed", layer, taken[0])

    def _keep(self, name: str, layer: int, states: Tensor) -> None:
        # [1, tokens, heads * head_dim], or [1, tokens, heads, head_dim] behind a norm of heads
        self._parts.setdefault((name, layer), []).append(states[0].unflatten(-1, (-1, HEAD_DIM)).flatten(1, -2).clone())


def on_hf(of: LoadedModel, policy: StreamingLLM | None, tokens: list[int]) -> Seen:
    """A prompt at once and then a token a step, through the cache of engine `hf`."""
    seen = Seen()
    decoder = CachedDecoder(of.model, of.text_config, of.device)
    rotary = None if policy is None else Rotary(of.model)
    cache = decoder.new_cache(policy, (128, 128), "ring", rotary, tokens=len(tokens))
    prompt = len(tokens) - OUTPUT
    with torch.inference_mode(), seen.of(of.model):
        for chunk in (tokens[:prompt], *([token] for token in tokens[prompt:])):
            decoder.forward(torch.tensor([chunk]), cache)
    return seen


def on_nano(of: LoadedModel, policy: StreamingLLM | None, tokens: list[int], **limits: Any) -> Seen:
    """The same through the pages of engine `nano`."""
    seen = Seen()
    rotation = None if policy is None else Rotary(of.model)
    with serving(of, policy=policy, rotation=rotation, block_size=8, prefix_caching=False, **limits) as runtime:
        forced = [*tokens[-OUTPUT:], 3]
        with seen.of(of.model):
            runtime.run([greedy(tokens[:-OUTPUT], len(forced), forced=forced)])
    return seen


def on_tvm(texts: list[Seen], windows: tuple[int | None, ...], slides: tuple[int, int] | None = None) -> list[Tensor]:
    """TVM's attention ``[layers, tokens, heads, head_dim]`` of each text, all of them in one cache and in the same steps."""
    cache = TvmCache(windows, HEADS, KV_HEADS, HEAD_DIM, sequences=len(texts), slides=slides)
    given = [[one[name] for name in ("queries", "keys", "values")] for one in texts]
    mixed: list[list[Tensor]] = [[] for _ in texts]
    fed = [0] * len(texts)
    for step in range(1 + OUTPUT):
        counts = [one[0].shape[1] - OUTPUT if step == 0 else 1 for one in given]
        parts = [
            torch.cat([one[part][:, at : at + n] for one, at, n in zip(given, fed, counts, strict=True)], dim=1)
            for part in range(3)
        ]
        out = cache.step(dict(enumerate(counts)), *parts)
        for own, rows in zip(mixed, out.split(counts, dim=1), strict=True):
            own.append(rows)
        fed = [at + n for at, n in zip(fed, counts, strict=True)]
    return [torch.cat(own, dim=1) for own in mixed]


def assert_same(hf: list[Seen], nano: list[Seen], tvm: list[Tensor]) -> None:
    for one, other, reference in zip(hf, nano, tvm, strict=True):
        for name in ("queries", "keys", "values"):
            torch.testing.assert_close(other[name], one[name], atol=1e-4, rtol=0)
        torch.testing.assert_close(one["mixed"], reference, atol=1e-4, rtol=0)
        torch.testing.assert_close(other["mixed"], reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("window", "sinks"), [(12, 4), (33, 20), (9, 0)])
def test_attention_sinks_are_those_of_tvm(window: int, sinks: int) -> None:
    """TVM counts sinks into what stays, and gives keys and queries the positions of their places: so does the paper."""
    of, texts = loaded("llama"), [text(length + OUTPUT, seed=length) for length in PROMPTS]
    policy = partial(StreamingLLM, start_size=sinks, recent_size=window - sinks, positions="cache")
    hf = [on_hf(of, policy(), tokens) for tokens in texts]
    nano = [on_nano(of, policy(), tokens) for tokens in texts]
    tvm = on_tvm(hf, (None,) * LAYERS, (window, sinks))
    assert_same(hf, nano, tvm)
    # one sink or one recent token fewer is another attention: the comparison can fail
    for wrong in ((window - 1, sinks), (window, sinks + 1)):
        assert max((a - b).abs().max() for a, b in zip(on_tvm(hf, (None,) * LAYERS, wrong), tvm, strict=True)) > 1e-2


def test_a_sliding_window_without_sinks_is_that_of_tvm() -> None:
    """What `nano` calls a window holds the query's own token, which TVM adds to its; no position matters but the distance."""
    of = loaded("llama")
    # a prompt that slides would be attended whole by TVM
    tokens = text(11 + OUTPUT)
    nano = on_nano(of, None, tokens, sliding_window=13)
    [tvm] = on_tvm([nano], (None,) * LAYERS, (12, 0))
    torch.testing.assert_close(nano["mixed"], tvm, atol=1e-4, rtol=0)


@pytest.mark.slow  # kernels of its own
def test_windows_of_layers_are_those_of_tvm() -> None:
    """A model with windows of its own in one layer of three; in 0.27 TVM is right where the prompt fits the window."""
    of, texts = loaded("qwen3-mixed"), [text(length + OUTPUT, seed=length) for length in (5, WINDOW)]
    hf = [on_hf(of, None, tokens) for tokens in texts]
    nano = [on_nano(of, None, tokens) for tokens in texts]
    assert_same(hf, nano, on_tvm(hf, (None, WINDOW, None)))
