"""Prompts that a model writes itself: what it takes for text, where one reference text is of one kind alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

#: how prose begins; the model goes on
OPENINGS = (
    "The history of", "In the early", "She had never", "According to the", "Once upon a time", "Most people", "The city of",
    "After the war,", "Scientists have", "To understand", "He opened the", "During the summer", "A recent study",
    "The first time", "My grandmother", "The river", "Although", "It is often said that", "The film", "For centuries,",
    "When the train", "Children", "The company", "There are many", "The song", "At the age of", "The animal", "Her brother",
    "In the village", "The battle of", "Music", "The president",
)  # fmt: skip


@torch.inference_mode()
def own_samples(
    model: Any, openings: Sequence[Sequence[int]], count: int, length: int, generator: torch.Generator
) -> Tensor:
    """Texts ``[count, length]`` that a model goes on with, drawn token by token from what it predicts.

    Parameters
    ----------
    model
        A causal language model of transformers.
    openings
        First tokens of texts, which are taken in turn from one that is drawn.
    count, length
        Texts and tokens of each.
    generator
        Draws.
    """
    first = int(torch.randint(len(openings), (1,), generator=generator))
    begun = [list(openings[(first + index) % len(openings)])[:length] for index in range(count)]
    found = torch.zeros(count, length, dtype=torch.int64)
    given = torch.zeros(count, length, dtype=torch.bool)
    for row, tokens in enumerate(begun):
        found[row, : len(tokens)] = torch.tensor(tokens)
        given[row, : len(tokens)] = True
    cache = DynamicCache()
    for at in range(1, length):
        logits = model(input_ids=found[:, at - 1 : at], past_key_values=cache, use_cache=True).logits[:, -1].float()
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
        found[:, at] = torch.where(given[:, at], found[:, at], drawn)
    return found
