"""Which positions of a prompt a method keeps, read from what each engine stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from serving import serving
from torch import Tensor
from transformers import DynamicCache

from kvsuite.compression.base import Policy
from kvsuite.compression.kvpress.adapter import KvpressMethod
from kvsuite.engines.hf.attention import register_observed_attention
from kvsuite.engines.hf.decoder import CachedDecoder
from kvsuite.engines.rotary import Rotary
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters

#: scores nearer to each other than this may be ranked either way
APART = 1e-5


def turning(of: LoadedModel, policy: Policy) -> Rotary | None:
    wanted = policy.positions == "cache" or policy.needs.query_statistics is not None
    return Rotary(of.model) if wanted else None


def spied(policy: Policy) -> list[Tensor]:
    """The scores by which ``policy`` ranks, layer after layer, as it computes them."""
    found: list[Tensor] = []
    importance = policy.importance  # type: ignore[attr-defined]

    def importance_and_note(view: Any) -> Tensor:
        found.append(importance(view))
        return found[-1]

    policy.importance = importance_and_note  # type: ignore[attr-defined]
    return found


@torch.inference_mode()
def full_keys(of: LoadedModel, prompt: Sequence[int]) -> list[Tensor]:
    """Keys ``[kv_heads, n, head_dim]`` of every layer."""
    cache = DynamicCache()
    of.model(input_ids=torch.tensor([list(prompt)], device=of.device), past_key_values=cache, logits_to_keep=1)
    return [layer.keys[0] for layer in cache.layers]


def places_of(keys: Tensor, among: Tensor) -> Tensor:
    """Where each of ``keys`` ``[kv_heads, k, head_dim]`` stands in ``among`` ``[kv_heads, n, head_dim]``, ascending."""
    distance = torch.cdist(keys, among, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.min(dim=-1)
    assert float(nearest.values.max()) < 1e-4
    return nearest.indices.sort(dim=-1).values


@torch.inference_mode()
def kept_on_hf(of: LoadedModel, policy: Policy, prompt: Sequence[int]) -> Tensor:
    """Positions ``[layers, kv_heads, k]``."""
    decoder = CachedDecoder(of.model, of.text_config, of.device)
    decoder.set_attention(register_observed_attention("sdpa"))
    cache = decoder.new_cache(policy, (len(prompt), len(prompt)), "ring", turning(of, policy))
    decoder.forward(torch.tensor([list(prompt)]), cache)
    decoder.set_attention("sdpa")
    whole = full_keys(of, prompt)
    return torch.stack([places_of(layer.keys[0], own) for layer, own in zip(cache.layers, whole, strict=True)])


@torch.inference_mode()
def kept_by_kvpress(of: LoadedModel, press: str, keep_ratio: float, prompt: Sequence[int], **given: Any) -> Tensor:
    """Positions ``[layers, kv_heads, k]`` that a press keeps on engine `hf`."""
    whole, cache = full_keys(of, prompt), DynamicCache()
    method = KvpressMethod.create(press, keep_ratio=keep_ratio, **given)
    with method.session(of.model) as session, session.prefill():
        of.model(input_ids=torch.tensor([list(prompt)]), past_key_values=cache, logits_to_keep=1)
    return torch.stack([places_of(layer.keys[0], own) for layer, own in zip(cache.layers, whole, strict=True)])


def kept_on_nano(of: LoadedModel, policy: Policy, prompt: Sequence[int], *, chunk: int, **limits: Any) -> Tensor:
    """Positions ``[layers, kv_heads, k]``, the prompt fed ``chunk`` tokens a step."""
    # a runtime gives the model its own attention
    whole = full_keys(of, prompt)
    small = {"max_model_len": len(prompt) + 8, "max_num_batched_tokens": chunk, "prefix_caching": False} | limits
    with serving(of, policy=policy, rotation=turning(of, policy), **small) as runtime:
        # a request that ends with its first token would leave nothing to look at
        request = runtime.add(
            Request(list(prompt), SamplingParameters(max_new_tokens=3, temperature=0.0, ignore_eos=True))
        )
        for _ in range(len(prompt)):
            if request.computed == len(prompt):
                break
            runtime.step()
        assert request.computed == len(prompt), (request.status, request.reason)
        kept = kept_in_pool(runtime, request, whole)
        runtime.run()
    return kept


def kept_in_pool(runtime: Runtime, request: Request, whole: Sequence[Tensor]) -> Tensor:
    """Positions ``[layers, kv_heads, k]`` of what the blocks of a request hold, among the keys of its whole prompt."""
    slots = torch.from_numpy(runtime.tables[0].stored_slots(request.row)).to(runtime.device)
    stored = runtime.pools[0].keys_of(slots)
    return torch.stack([places_of(keys.cpu(), own.cpu()) for keys, own in zip(stored, whole, strict=True)])


def differing(one: Tensor, other: Tensor, scores: Sequence[Tensor]) -> int:
    """Positions that only one of two choices ``[layers, kv_heads, k]`` keeps; all their scores must be within `APART`."""
    assert one.shape == other.shape
    count = 0
    for layer, (ours, theirs) in enumerate(zip(one.tolist(), other.tolist(), strict=True)):
        for head, (own, its) in enumerate(zip(ours, theirs, strict=True)):
            assert len(set(own)) == len(own)
            apart = sorted(set(own) ^ set(its))
            if apart:
                at_issue = scores[layer].reshape(-1, scores[layer].shape[-1])[head][apart]
                assert float(at_issue.max() - at_issue.min()) <= APART, (layer, head, apart, at_issue.tolist())
            count += len(apart)
    return count
