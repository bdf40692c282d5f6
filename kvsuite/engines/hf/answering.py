"""Questions to a context whose cache is already made: prefill, compression, question, greedy answer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsuite.engines.questions import Answer, Asked, Ends
from kvsuite.engines.results import TokenProgress
from kvsuite.errors import CaseInvalid

from .cache import EvictionCache

if TYPE_CHECKING:
    from .generation import AnyCache, Generation

# tokens of contexts that are prefilled together
_TOGETHER = {"cpu": 2560}
_TOGETHER_ELSEWHERE = 32_768


def answer_questions(
    generation: Generation, asked: Sequence[Asked], progress: TokenProgress | None = None
) -> list[list[Answer]]:
    """Answers to every question of ``asked``; contexts of one shape are computed together.

    Where a policy acts while decoding, a question is fed one token a forward: a token that is evicted in between is not seen by
    the tokens that follow, which would see it in one forward over the whole question.

    Raises
    ------
    CaseInvalid
        For a press that keeps its state outside the cache, which cannot be asked anew.
    """
    if generation.method.eager_only:
        raise CaseInvalid(
            f"{generation.method.eager_only}, so that its cache cannot be asked several times; leave it out"
        )
    budget = _TOGETHER.get(generation.device.type, _TOGETHER_ELSEWHERE)
    # presses and caches of others hold one prompt
    alone = generation.method.press is not None or generation.foreign is not None
    found: list[list[Answer]] = [[] for _ in asked]
    done = 0
    for places in _batches(asked, 1 if alone else budget):
        for place, answers in zip(places, _answer(generation, [asked[place] for place in places]), strict=True):
            found[place] = answers
        done += len(places)
        if progress:
            progress(done, len(asked))
    generation.drop_cache()
    return found


def _batches(asked: Sequence[Asked], budget: int) -> list[list[int]]:
    """Places of contexts that are computed together: of one shape, of no more tokens than ``budget`` unless it is one."""
    shapes: dict[tuple[int | bool, ...], list[int]] = {}
    for place, one in enumerate(asked):
        shapes.setdefault(one.shape, []).append(place)
    batches = []
    for places in shapes.values():
        together = max(1, budget // len(asked[places[0]].context))
        batches += [places[at : at + together] for at in range(0, len(places), together)]
    return batches


def _answer(generation: Generation, batch: Sequence[Asked]) -> list[list[Answer]]:
    """Answers of contexts of one shape."""
    first, steps = batch[0], batch[0].steps
    found: list[list[Answer]] = [[] for _ in batch]
    with torch.inference_mode(), generation.pressed():
        cache = generation.new_cache(len(first.context), steps, len(batch))
        generation.prefill(_rows([one.context for one in batch], generation.device), cache)
        cache = generation.settle(cache, steps)
        kept = fmean(cache.lengths())
        for index in range(len(first.questions)):
            is_last = index == len(first.questions) - 1
            own = cache if first.in_turn or is_last else generation.fork(cache)
            questions = [one.questions[index] for one in batch]
            output, nll = _ask(
                generation,
                own,
                _rows([one.tokens for one in questions], generation.device),
                _rows([one.answer for one in questions], generation.device),
                questions[0].limit,
                [one.ends for one in questions],
                goes_on=first.in_turn and not is_last,
            )
            for answers, tokens, losses in zip(found, output, nll, strict=True):
                answers.append(Answer(tokens, losses, kept))
            if own is not cache and isinstance(own, EvictionCache):
                own.refuse_vectors()
        if isinstance(cache, EvictionCache):
            cache.refuse_vectors()
    return found


def _ask(
    generation: Generation,
    cache: AnyCache,
    question: Tensor,
    answer: Tensor,
    limit: int,
    ends: Sequence[Ends | None],
    *,
    goes_on: bool,
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy outputs, and losses of the right answers, of each context of a batch.

    Parameters
    ----------
    question, answer
        Token ids ``[batch, n]``.
    limit
        Tokens that are generated, at most.
    ends
        Of each context, what says that its output is complete.
    goes_on
        Whether the output's last token is fed too, since another question follows.
    """
    forward = generation.decoder.forward
    for part in torch.split(question, question.shape[1] if _feeds_together(generation) else 1, 1):
        logits = forward(part, cache)
    first = logits[:, -1]
    losses = [_losses(first, answer[:, 0])] if answer.shape[1] else []
    if answer.shape[1] > 1:
        right = generation.fork(cache)
        losses += [
            _losses(forward(answer[:, at - 1 : at], right)[:, -1], answer[:, at]) for at in range(1, answer.shape[1])
        ]
        del right
    output = [first.argmax(-1, keepdim=True)]
    sizes = [limit] * len(ends)
    while not _completed(output, ends, sizes) and len(output) < limit:
        output.append(generation.step(output[-1], cache))
    if goes_on:
        forward(output[-1], cache)
    tokens = torch.cat(output, 1).tolist()
    nll: list[list[float]] = torch.stack(losses, 1).tolist() if losses else [[] for _ in ends]
    return [row[:size] for row, size in zip(tokens, sizes, strict=True)], nll


def _completed(output: Sequence[Tensor], ends: Sequence[Ends | None], sizes: list[int]) -> bool:
    """Whether every row of ``output`` is complete; notes in ``sizes`` how many tokens each has that ended now."""
    if not any(ends):
        # nothing is brought from the device
        return False
    count = len(output)
    rows = torch.cat(list(output), 1).tolist()
    for at, (row, end) in enumerate(zip(rows, ends, strict=True)):
        if end and sizes[at] > count and end(row):
            sizes[at] = count
    return all(size <= count for size in sizes)


def _feeds_together(generation: Generation) -> bool:
    """Whether a question may be one forward: nothing of the cache goes while it is fed."""
    decoder, method = generation.decoder, generation.method
    return (
        method.press is None
        and not method.acts_in_decode
        and generation.foreign is None
        and decoder.of_layers.switch_length is None
        and not decoder.bounded_layers(generation.span)
    )


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses ``[batch]`` of ``targets`` by ``logits`` ``[batch, vocab]``."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _rows(tokens: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([list(row) for row in tokens], dtype=torch.int64, device=device)
