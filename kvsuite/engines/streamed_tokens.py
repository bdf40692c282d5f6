"""Tokens of a stream's chunks, where a server tells only how many there are in all."""

from __future__ import annotations

import itertools


def spread_tokens(tokens: int, chunks: int) -> list[int]:
    """Tokens of each chunk: one in the first, the others spread over those behind it.

    A chunk has one token, or several where the text of one was no whole UTF-8. Which ones is not told; the time of the first
    token, of the last one and their mean are right all the same.

    Parameters
    ----------
    tokens
        At least ``chunks``.
    chunks
        At least 1.
    """
    if chunks == 1:
        return [tokens]
    ends = [(tokens - 1) * part // (chunks - 1) for part in range(chunks)]
    return [1, *(later - earlier for earlier, later in itertools.pairwise(ends))]
