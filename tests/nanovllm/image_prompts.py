"""Prompts of text and images for the small LLaVA of `decoders`."""

from __future__ import annotations

from typing import Any

import numpy as np
from decoders import VOCAB, text

from kvsuite.models.images import ImagePixels

IMAGE = VOCAB - 1
# of decoders.py's LLaVA: 8 pixels in patches of 4
TOKENS, SIZE = 4, 8


def image(seed: int) -> ImagePixels:
    return ImagePixels(np.random.default_rng(seed).normal(size=(3, SIZE, SIZE)).astype(np.float32))


def prompt(*parts: Any, seed: int = 0) -> tuple[list[int], list[ImagePixels]]:
    """Tokens and images of a prompt: a number is so many tokens of text, an image stands where it is."""
    tokens, images = [], []
    for index, part in enumerate(parts):
        if isinstance(part, ImagePixels):
            tokens += [IMAGE] * TOKENS
            images.append(part)
        else:
            tokens += text(part, seed=10 * seed + index)
    return tokens, images


MIXED = [
    prompt(image(1), 20, seed=1),
    prompt(13, seed=2),
    prompt(3, image(2), 9, image(3), 2, seed=3),
    prompt(17, image(4), seed=4),
    prompt(30, seed=5),
    # one behind the other, and the same image as another request's
    prompt(image(1), image(5), 8, seed=6),
]
