"""Prompts for speed runs: each one different from its first block of tokens on, so that no prefix cache helps."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.errors import UserError

FIRST_BLOCK = 16


def make_prompts(
    *, count: int, length: int, vocab_size: int, seed: int, token_pool: Sequence[int] | None
) -> list[list[int]]:
    """Make token prompts of one length, the same ones for the same arguments.

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
    return prompts_of(
        [length] * count, typed=f"--kv-prompt-tokens={length}", vocab_size=vocab_size, seed=seed, token_pool=token_pool
    )


def prompts_of(
    lengths: Sequence[int],
    *,
    typed: str,
    vocab_size: int,
    seed: int,
    token_pool: Sequence[int] | None,
    mend: str = "ask for shorter ones or give a longer --kv-corpus",
) -> list[list[int]]:
    """Make token prompts of these lengths, of which no two agree in their first 16 tokens.

    Parameters
    ----------
    lengths
        Tokens of each; where the shortest has fewer than 16, no two agree in as many as that one has.
    typed
        Option and value that gave the lengths, for messages.
    vocab_size, seed, token_pool
        As of `make_prompts`.
    mend
        What to do where the text is too short.

    Raises
    ------
    UserError
        If there are not so many different prompts.
    """
    import numpy as np

    count, shortest, longest = len(lengths), min(lengths, default=0), max(lengths, default=0)
    if shortest < 1:
        raise UserError(f"{typed}: {count} prompt(s) asked; both must be at least 1")
    random = np.random.default_rng(seed)
    head = min(shortest, FIRST_BLOCK)
    prompts: dict[tuple[int, ...], list[int]] = {}
    if token_pool is None:
        if vocab_size**head < count:
            raise UserError(
                f"{typed}: a vocabulary of {vocab_size} has fewer than {count} different prompts; ask for longer ones"
            )
        while len(prompts) < count:
            prompt: list[int] = random.integers(0, vocab_size, size=lengths[len(prompts)]).tolist()
            prompts.setdefault(tuple(prompt[:head]), prompt)
        return list(prompts.values())

    pool = list(token_pool)
    for offset in random.permutation(max(0, len(pool) - longest + 1)).tolist():
        window = pool[offset : offset + lengths[len(prompts)]]
        prompts.setdefault(tuple(window[:head]), window)
        if len(prompts) == count:
            return list(prompts.values())
    raise UserError(
        f"{typed}: the corpus of {len(pool)} tokens has only {len(prompts)} different prompts of "
        f"that length, {count} needed; {mend}"
    )
