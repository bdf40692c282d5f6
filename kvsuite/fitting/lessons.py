"""What a compressor learns from: prompts with the keys and values of a model, and what it answers from its full cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_WATCHED = "kvsuite_watched"


@dataclass(frozen=True)
class Lessons:
    """Prompts of equal length, each answered greedily from its full cache; tensors are in half precision.

    Parameters
    ----------
    prompt
        Tokens of each prompt.
    keys, values
        Of prompts and answers, ``[layers, count, kv_heads, prompt + tokens - 1, head_dim]``; keys rotated.
    queries, attended
        What the answers' tokens, all but the last, asked in each layer, and what attention gave them:
        ``[layers, count, heads, tokens - 1, head_dim]``.
    answers
        The answers' tokens, int64 ``[count, tokens]``.
    logits
        What was predicted behind each of them but the last, ``[count, tokens - 1, vocabulary]``.
    """

    prompt: int
    keys: Tensor
    values: Tensor
    queries: Tensor
    attended: Tensor
    answers: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return int(self.answers.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(int(getattr(self, one.name).nbytes) for one in fields(Lessons)[1:])

    def part(self, indices: Sequence[int]) -> Lessons:
        """Some of them."""
        own = list(indices)
        return Lessons(
            self.prompt, self.keys[:, own], self.values[:, own], self.queries[:, own], self.attended[:, own],
            self.answers[own], self.logits[own],
        )  # fmt: skip

    def first(self, tokens: int) -> Lessons:
        """The same with the first ``tokens`` predictions behind each prompt alone, or all if there are fewer."""
        stored = self.prompt + tokens
        return Lessons(
            self.prompt, self.keys[..., :stored, :], self.values[..., :stored, :], self.queries[..., :tokens, :],
            self.attended[..., :tokens, :], self.answers[:, : tokens + 1], self.logits[:, :tokens],
        )  # fmt: skip

    @staticmethod
    def joined(parts: Sequence[Lessons]) -> Lessons:
        """All of several."""
        tensors = [
            torch.cat([getattr(part, one.name) for part in parts], dim=int(one.name not in ("answers", "logits")))
            for one in fields(Lessons)[1:]
        ]
        return Lessons(parts[0].prompt, *tensors)


class _Watch:
    """Queries and outputs of every attention layer of a model, while it is watched."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        found = sdpa_attention_forward(module, query, key, value, mask, **options)
        if query.shape[2] == 1:
            self.seen.append((query.half(), found[0].transpose(1, 2).half()))
        return found


@contextmanager
def _watched(model: Any) -> Iterator[_Watch]:
    watch = _Watch()
    before = model.config._attn_implementation
    AttentionInterface.register(_WATCHED, watch)
    model.set_attn_implementation(_WATCHED)
    try:
        yield watch
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def serve(model: Any, prompts: Tensor, tokens: int) -> Lessons:
    """Answer prompts ``[count, prompt]`` with ``tokens`` tokens each, and note what a compressor has to know."""
    length = prompts.shape[1]
    cache = DynamicCache()
    found = model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    chosen, logits = [found.logits[:, -1].argmax(dim=-1)], []
    with _watched(model) as watch:
        for step in range(tokens - 1):
            at = torch.full((len(prompts), 1), length + step, device=prompts.device)
            found = model(input_ids=chosen[-1][:, None], past_key_values=cache, position_ids=at, use_cache=True)
            logits.append(found.logits[:, -1].half())
            chosen.append(found.logits[:, -1].argmax(dim=-1))
    layers = len(cache.layers)
    queries, attended = (
        torch.stack([torch.cat([one[side] for one in watch.seen[layer::layers]], dim=2) for layer in range(layers)])
        for side in (0, 1)
    )
    return Lessons(
        length,
        torch.stack([layer.keys for layer in cache.layers]).half(),
        torch.stack([layer.values for layer in cache.layers]).half(),
        queries,
        attended,
        torch.stack(chosen, dim=1),
        torch.stack(logits, dim=1),
    )


def attention_error(lessons: Lessons, keys: Tensor, values: Tensor) -> Tensor:
    """How far attention over ``keys`` and ``values`` ``[layers, count, kv_heads, n, head_dim]`` is from that over the prompts'.

    Squared distance of what the answers' tokens attend to, behind the same keys of the answers, relative to its mean square in
    the layer; a mean over layers. No layer sees another's error.
    """
    length, tokens = keys.shape[3], lessons.queries.shape[3]
    own = (torch.cat([made, full[:, :, :, lessons.prompt :].float()], dim=3) for made, full in
           ((keys, lessons.keys), (values, lessons.values)))  # fmt: skip
    seen = torch.ones(tokens, length + tokens, dtype=torch.bool).tril(length)
    queries, wanted = lessons.queries.float().flatten(0, 1), lessons.attended.float()
    key, value = (one.flatten(0, 1).repeat_interleave(queries.shape[1] // one.shape[2], dim=1) for one in own)
    found = scaled_dot_product_attention(queries, key, value, attn_mask=seen).view_as(wanted)
    error = (found - wanted).square().mean(dim=(1, 2, 3, 4))
    return (error / wanted.square().mean(dim=(1, 2, 3, 4))).mean()


def divergence(model: Any, lessons: Lessons, keys: Tensor, values: Tensor) -> Tensor:
    """Mean KL divergence, in nats a token, of what a cache of ``keys`` and ``values`` predicts from what the full one does.

    The answers are forced through the model behind ``keys`` and ``values`` ``[layers, count, kv_heads, n, head_dim]``, at the
    positions that they had. Gradients flow to both.
    """
    answers = lessons.answers[:, :-1]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    at = torch.arange(lessons.prompt, lessons.prompt + answers.shape[1], device=answers.device).expand(answers.shape)
    found = model(input_ids=answers, past_key_values=cache, position_ids=at, use_cache=True).logits.float()
    wanted = lessons.logits.float().log_softmax(dim=-1)
    return kl_div(found.log_softmax(dim=-1), wanted, log_target=True, reduction="none").sum(dim=-1).mean()
