"""Small random decoders, one way to feed them through an `EvictionCache`, and a slow reference for what must come out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from policy_matrix import Line
from shared_weights import share
from torch import Tensor
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from kvsuite.compression.base import CacheView, Policy
from kvsuite.engines.cache_plan import plan
from kvsuite.engines.hf.cache import EvictionCache
from kvsuite.engines.hf.decoder import CachedDecoder
from kvsuite.engines.rotary import Rotary

LAYERS, VOCAB, HEAD_DIM = 4, 512, 16
# wide weights: with the usual 0.02 attention is flat, and no mistake in a cache would show in the logits
_WEIGHTS = 0.1


@functools.cache
def model(kind: str, attention: str = "sdpa") -> Any:
    """A float32 Llama (2 KV heads for 4 heads), GPT-NeoX (4 heads, rotary on half of each head) or GPT-2."""
    made = _made(kind, attention)
    share(f"tiny_decoders.model({kind!r}, {attention!r})", made)
    return made


def _made(kind: str, attention: str) -> Any:
    common = {"vocab_size": VOCAB, "initializer_range": _WEIGHTS, "attn_implementation": attention}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, n_embd=64, n_head=4, **common)).eval()
        wide = common | {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        if kind == "neox":
            rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
            # rotary_pct is what transformers 5.2 reads
            config = GPTNeoXConfig(intermediate_size=128, rope_parameters=rope, rotary_pct=0.5, **wide)
            return GPTNeoXForCausalLM(config).eval()
        config = LlamaConfig(intermediate_size=128, num_key_value_heads=2, head_dim=HEAD_DIM, **wide)
        return LlamaForCausalLM(config).eval()


@functools.cache
def decoder(kind: str) -> CachedDecoder:
    built = model(kind)
    return CachedDecoder(built, built.config, torch.device("cpu"))


def text(tokens: int, *, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@dataclass
class Fed:
    """``logits`` ``[chunks, batch, vocab]`` after each chunk; ``lengths`` per layer after each chunk."""

    logits: Tensor
    lengths: list[list[int]]
    cache: EvictionCache

    def kept(self, layer: int) -> Tensor:
        """Logical positions that the layer stores, sorted: ``[n]`` or ``[batch, heads, n]``."""
        group = self.cache.layers[layer].group
        if group.policy is None:
            return torch.arange(group.length)
        group.settle()
        positions = group._positions[..., : group.slots]
        own: Tensor = positions[group.layers.index(layer)] if group.per_head else positions
        return own.sort(-1).values


@torch.no_grad()
def feed(
    kind: str,
    policy: Policy | None,
    ids: Tensor,
    chunks: Sequence[int],
    *,
    implementation: Any = "ring",
    capacity: tuple[int, int] | None = None,
) -> Fed:
    """Feed ``ids`` in ``chunks`` (a first one longer than 1 is a prompt), with the capacity that `plan` announces."""
    of = decoder(kind)
    if capacity is None:
        after = len(ids[0]) - chunks[0]
        capacity = plan(policy, chunks[0], after).capacity, plan(None, chunks[0], after).capacity
    cache = EvictionCache(
        layers=of.layers,
        policy=policy,
        batch=ids.shape[0],
        kv_heads=of.kv_heads,
        device=of.device,
        capacity=capacity,
        implementation=implementation,
        rotary=Rotary(of.model) if policy and policy.positions == "cache" else None,
    )
    logits, lengths, at = [], [], 0
    for tokens in chunks:
        logits.append(of.forward(ids[:, at : at + tokens], cache)[:, -1])
        lengths.append(cache.lengths())
        at += tokens
    return Fed(torch.stack(logits), lengths, cache)


def chunks_of(prompt: int, total: int) -> list[int]:
    return [prompt] + [1] * (total - prompt)


class Reference:
    """What a policy must compute, as an attention function: every key of the text is there, each query sees its list.

    Nothing is evicted, stored, or rotated back: for every query, layer and head a plain list says which positions a cache
    would hold. With ``positions="cache"`` (arXiv 2309.17453) keys and query are turned to their place in that list.
    """

    def __init__(self, line: Line, policy: Policy, chunks: Sequence[int], rotary_dim: int) -> None:
        self.line = line
        self.policy = policy
        self.chunks = chunks
        self.rotary_dim = rotary_dim
        self.kept: dict[tuple[int, int, int], list[int]] = {}

    def logits(self, kind: str, ids: Tensor) -> Tensor:
        """Logits after each chunk, ``[chunks, batch, vocab]``."""
        AttentionInterface.register("reference", self)
        ends = torch.tensor(self.chunks).cumsum(0) - 1
        with torch.no_grad():
            logits: Tensor = model(kind, "reference")(input_ids=ids, use_cache=False).logits
        return logits[:, ends].transpose(0, 1)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out = torch.empty_like(query)
        share = query.shape[1] // key.shape[1]
        for row in range(key.shape[0]):
            for head in range(key.shape[1]):
                seen = self._lists(module.layer_idx, row, head, key[row, head])
                for t, places in enumerate(seen):
                    k, v = key[row, head, places], value[row, head, places]
                    q = query[row, head * share : (head + 1) * share, t]
                    if self.policy.positions == "cache":
                        k = self._turn(k, torch.arange(len(places)) - torch.tensor(places))
                        q = self._turn(q, torch.tensor([len(places) - 1 - t]))
                    out[row, head * share : (head + 1) * share, t] = (q @ k.T * scaling).softmax(-1) @ v
        return out.transpose(1, 2).contiguous(), None

    def _lists(self, layer: int, row: int, head: int, keys: Tensor) -> list[list[int]]:
        norms = keys.double().norm(dim=-1).tolist()
        stored: list[int] = []
        seen: list[list[int]] = []
        done, fed = False, 0
        for tokens in self.chunks:
            for _ in range(tokens):
                stored = [*stored, fed]
                seen.append(stored)
                fed += 1
            acts = fed % self.line.every == 0 and not (self.line.once and done)
            if acts and layer not in self.policy.skip_layers:
                before = len(stored)
                stored = [stored[i] for i in self._choose(stored, [norms[i] for i in stored], layer, head)]
                done = done or len(stored) < before
        self.kept[layer, row, head] = stored
        return seen

    def _choose(self, stored: list[int], norms: list[float], layer: int, head: int) -> Sequence[int]:
        if self.line.kept is not None:
            return self.line.kept(len(stored), norms)
        view = CacheView(
            torch.tensor([stored]),
            stored[-1],
            torch.tensor([norms]),
            layer=layer,
            heads=torch.tensor([head]),
            step=stored[-1] + 1,
        )
        return [int(i) for i in self.policy.keep(view)[0]]

    def _turn(self, states: Tensor, by: Tensor) -> Tensor:
        """Rotate ``[n, dim]`` by ``by`` positions ``[n]`` or ``[1]``: RoPE written with complex numbers."""
        half = self.rotary_dim // 2
        angle = by[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        pair = torch.complex(states[:, :half].double(), states[:, half : self.rotary_dim].double())
        turned = pair * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real.float(), turned.imag.float(), states[:, self.rotary_dim :]], dim=-1)
