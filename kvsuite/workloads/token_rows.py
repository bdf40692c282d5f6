"""Tokens for which a model has a row, and those for which it has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvsuite.errors import CaseInvalid


def require_rows(tokens: Iterable[int], rows: int, tokenizer: Any = None) -> None:
    """Refuse a token without a row, which ends in an index error on a CPU and ends the process on CUDA.

    Parameters
    ----------
    tokens
        Token ids of a text.
    rows
        Of the model's embedding: ids lie in ``[0, rows)``.
    tokenizer
        That made them, for the message.

    Raises
    ------
    CaseInvalid
        If the text has a token beyond; the message names it, the rows and the tokenizer.
    """
    highest = max(tokens, default=0)
    if highest < rows:
        return
    whose = "the tokenizer"
    if tokenizer is not None:
        whose = f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens)"
    raise CaseInvalid(
        f"the text has token {highest}, and the model's embedding has {rows} rows: {whose} is not the model's; give --kv-model "
        "with its own tokenizer"
    )
