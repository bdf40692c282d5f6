"""The text that a compressor is fitted on: cut into prompts, the last of them held out, and none that the suites measure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvsuite.errors import UserError
from kvsuite.workloads.corpus import check_corpus, load_corpus
from kvsuite.workloads.token_rows import require_rows

#: what the suites measure unless they are told otherwise
MEASURED = "default"
_HELD_OUT_SHARE = 0.1
_MOST_HELD_OUT = 8
_LEAST = 8


def check_text(request: str) -> None:
    """Find out what can be known about a text without reading it.

    Raises
    ------
    UserError
        If it is the one that suites measure, or there is no such text.
    """
    if request == MEASURED:
        raise UserError(f"--text={request}: is what the suites measure; give pydoc, or a text of your own")
    check_corpus(request, option="--text")


def training_prompts(request: str, tokenizer: Any, vocabulary: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts to learn from and prompts held out, each ``[count, length]``, in an order drawn by the seed.

    The text is cut from its start, and its last tenth is held out, at most 8 prompts of it.

    Raises
    ------
    UserError
        If the text cannot be read, or is too short.
    """
    typed = f"--text={request}"
    ids = torch.tensor(
        tokenizer(load_corpus(request, num_texts=1, option="--text").texts[0], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    )
    require_rows(ids.tolist(), vocabulary, tokenizer)
    rows = ids[: len(ids) // length * length].view(-1, length)
    held = min(_MOST_HELD_OUT, int(len(rows) * _HELD_OUT_SHARE))
    if len(rows) < _LEAST or held < 1:
        raise UserError(
            f"{typed}: has {len(ids)} tokens, {len(rows)} prompts of {length}; give a longer text or shorter prompts, so that "
            f"there are at least {max(_LEAST, round(1 / _HELD_OUT_SHARE))}"
        )
    first = len(rows) - max(held, int(len(rows) * _HELD_OUT_SHARE))
    generator = torch.Generator().manual_seed(seed)
    learnt, rest = rows[:first], rows[first:]
    return (
        learnt[torch.randperm(len(learnt), generator=generator)],
        rest[torch.randperm(len(rest), generator=generator)[:held]],
    )
