"""Prompts for speed runs: each one different from its first block of tokens on, so that no prefix cache helps."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.errors import UserError

FIRST_BLOCK = 16


def make_prompts(
    *, count: int, length: int, vocab_size: int, seed: int, token_pool: Sequence[int] | None
) -> list[list[int]]:
    """Make token prompts, the same ones for the same arguments.

    Parameters
    ----------
    count
        Number of prompts.
    length
        Tokens in each prompt.
    vocab_size
        Random ids come from ``[0, vocab_size)``.
    seed
        Of ``numpy.random.default_rng``.
    token_pool
        Tokens of a real text: prompts are windows of it at different offsets, unchanged, and may overlap. ``None``: ids
        drawn evenly from the whole vocabulary, special tokens among them.

    Returns
    -------
    list[list[int]]
        ``count`` prompts of ``length`` tokens. No two agree in their first 16 tokens (in all, if they are shorter).

    Raises
    ------
    UserError
        If there are not so many different prompts.
    """
    import numpy as np

    if count < 1 or length < 1:
        raise UserError(f"--kv-prompt-tokens={length}: {count} prompt(s) asked; both must be at least 1")
    random = np.random.default_rng(seed)
    head = min(length, FIRST_BLOCK)
    prompts: dict[tuple[int, ...], list[int]] = {}
    if token_pool is None:
        if vocab_size**head < count:
            raise UserError(
                f"--kv-prompt-tokens={length}: a vocabulary of {vocab_size} has fewer than {count} different prompts; "
                "ask for longer ones"
            )
        while len(prompts) < count:
            prompt: list[int] = random.integers(0, vocab_size, size=length).tolist()
            prompts.setdefault(tuple(prompt[:head]), prompt)
        return list(prompts.values())

    pool = list(token_pool)
    for offset in random.permutation(max(0, len(pool) - length + 1)).tolist():
        prompts.setdefault(tuple(pool[offset : offset + head]), pool[offset : offset + length])
        if len(prompts) == count:
            return list(prompts.values())
    raise UserError(
        f"--kv-prompt-tokens={length}: the corpus of {len(pool)} tokens has only {len(prompts)} different prompts of "
        f"that length, {count} needed; ask for shorter ones or give a longer --kv-corpus"
    )
