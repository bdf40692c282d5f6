"""What a compressor learns from: prompts with the keys and values of a model, and what it answers from its full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class Lessons:
    """Prompts of equal length, served greedily from the full cache.

    Parameters
    ----------
    keys, values
        Of the prompts, ``[layers, count, kv_heads, prompt, head_dim]``; keys rotated.
    answers
        The continuation's tokens, int64 ``[count, tokens]``.
    logits
        What the full cache predicted behind each of them but the last, ``[count, tokens - 1, vocabulary]``, in half precision.
    """

    keys: Tensor
    values: Tensor
    answers: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return int(self.answers.shape[0])

    def part(self, indices: Sequence[int]) -> Lessons:
        """Some of them."""
        own = list(indices)
        return Lessons(self.keys[:, own], self.values[:, own], self.answers[own], self.logits[own])

    @staticmethod
    def joined(parts: Sequence[Lessons]) -> Lessons:
        """All of several."""
        return Lessons(
            torch.cat([part.keys for part in parts], dim=1),
            torch.cat([part.values for part in parts], dim=1),
            torch.cat([part.answers for part in parts]),
            torch.cat([part.logits for part in parts]),
        )


@torch.inference_mode()
def serve(model: Any, prompts: Tensor, tokens: int) -> Lessons:
    """Serve prompts ``[count, prompt]`` greedily for ``tokens`` tokens each, and note what a compressor has to know."""
    length = prompts.shape[1]
    cache = DynamicCache()
    found = model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    keys = torch.stack([layer.keys for layer in cache.layers]).half()
    values = torch.stack([layer.values for layer in cache.layers]).half()
    chosen = [found.logits[:, -1].argmax(dim=-1)]
    logits = []
    for step in range(tokens - 1):
        at = torch.full((len(prompts), 1), length + step, device=prompts.device)
        found = model(input_ids=chosen[-1][:, None], past_key_values=cache, position_ids=at, use_cache=True)
        logits.append(found.logits[:, -1].half())
        chosen.append(found.logits[:, -1].argmax(dim=-1))
    return Lessons(keys, values, torch.stack(chosen, dim=1), torch.stack(logits, dim=1))


def divergence(model: Any, lessons: Lessons, keys: Tensor, values: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence, in nats, of what the full cache predicts from what a cache of ``keys`` and ``values`` does.

    The answers are forced through the model behind ``keys`` and ``values`` ``[layers, count, kv_heads, n, head_dim]``, at the
    positions that they had. Gradients flow to both.
    """
    prompt, answers = lessons.keys.shape[3], lessons.answers[:, :-1]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    at = torch.arange(prompt, prompt + answers.shape[1], device=answers.device).expand(answers.shape)
    found = model(input_ids=answers, past_key_values=cache, position_ids=at, use_cache=True).logits.float()
    wanted = lessons.logits.float().log_softmax(dim=-1)
    own = found.log_softmax(dim=-1)
    return torch.nn.functional.kl_div(own, wanted, log_target=True, reduction="none").sum(dim=-1).mean()
