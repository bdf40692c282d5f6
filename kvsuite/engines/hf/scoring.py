"""Teacher-forced scoring through a case's cache: the two cache protocols, and the full-cache reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsuite.engines.results import TakeRow, WholeScores
from kvsuite.errors import CaseInvalid
from kvsuite.meters.quality import TokenScores
from kvsuite.models.language_head import LanguageHead

from .attention import showing
from .cache import EvictionCache
from .decoder import CachedDecoder

if TYPE_CHECKING:
    from .generation import Generation

PROTOCOLS = ("streaming-decode", "prefix-continuation")
Progress = Callable[[int, int], None]
_ROWS = 256


def score_tokens(
    generation: Generation,
    tokens: Sequence[int],
    protocol: str,
    prefix: int,
    progress: Progress | None,
    take: TakeRow | None = None,
) -> TokenScores:
    """Score ``tokens`` one forward a token (docs/protocols.md).

    Parameters
    ----------
    tokens
        The text.
    protocol
        ``streaming-decode``: every token is fed alone from an empty cache and the policy acts after each; tokens
        1 .. N - 1 are scored. ``prefix-continuation``: the first ``prefix`` tokens are prefilled and compressed, the others
        fed one by one; the first continuation token is not scored, since its logits come from the uncompressed prefill.
    prefix
        Prompt length of ``prefix-continuation``.
    progress
        Called with tokens done and in all.
    take
        Called with each scored row's index and logits ``[1, vocab]``.
    """
    start = prefix if protocol == "prefix-continuation" else 0
    targets = torch.tensor(list(tokens[start + 1 :]), dtype=torch.int64, device=generation.device)
    ids = generation.ids(tokens)
    nll = torch.empty(len(targets), dtype=torch.float32, device=generation.device)
    hits = torch.empty(len(targets), dtype=torch.bool, device=generation.device)
    steps = len(targets)
    with torch.inference_mode(), generation.pressed():
        # streaming-decode feeds its first token as a step: one more than there are targets after it
        cache = generation.new_cache(max(start, 1), steps)
        if start:
            generation.prefill(ids[:, :start], cache)
            cache = generation.settle(cache, steps)
        for step in range(steps):
            at = start + step
            logits = generation.decoder.forward(ids[:, at : at + 1], cache)[0, -1:]
            _score_rows(logits, targets[step : step + 1], nll[step : step + 1], hits[step : step + 1])
            if take:
                take(step, logits)
            if progress and (step % 16 == 15 or step == steps - 1):
                progress(step + 1, steps)
        if isinstance(cache, EvictionCache):
            cache.refuse_vectors()
    generation.drop_cache()
    return TokenScores(
        targets=[int(t) for t in tokens[start + 1 :]],
        positions=list(range(start + 1, len(tokens))),
        nll=nll.tolist(),
        correct=hits.tolist(),
    )


def score_reference(decoder: CachedDecoder, tokens: Sequence[int], first: int) -> TokenScores:
    """Score ``tokens[first:]`` by one teacher-forced forward over the whole text with the full cache."""
    ids = torch.tensor([list(tokens)], dtype=torch.int64, device=decoder.device)
    targets = ids[0, first:]
    nll = torch.empty(len(targets), dtype=torch.float32, device=decoder.device)
    hits = torch.empty(len(targets), dtype=torch.bool, device=decoder.device)
    with torch.inference_mode():
        logits = decoder.all_logits(ids)[0, first - 1 : -1]
        # a float32 copy of all logits would be the largest tensor of the run
        for row in range(0, len(targets), _ROWS):
            part = slice(row, row + _ROWS)
            _score_rows(logits[part], targets[part], nll[part], hits[part])
    return TokenScores(
        targets=[int(t) for t in tokens[first:]],
        positions=list(range(first, len(tokens))),
        nll=nll.tolist(),
        correct=hits.tolist(),
    )


def score_whole(generation: Generation, tokens: Sequence[int], take: TakeRow) -> WholeScores:
    """Score ``tokens[1:]`` by one forward pass over all tokens, in which every query reads what the case's cache stores.

    That is what feeding them one by one gives: `EvictionLayer.update`. No policy acts in it.

    Raises
    ------
    CaseInvalid
        If the storages of the cache are not what the formulas say, or a vector cannot be stored.
    """
    decoder, chosen = generation.decoder, generation.format
    _refuse_foreign(generation)
    ids, head = generation.ids(tokens), LanguageHead(decoder.model)
    targets = ids[0, 1:]
    nll = torch.empty(len(targets), dtype=torch.float32, device=decoder.device)
    hits = torch.empty(len(targets), dtype=torch.bool, device=decoder.device)
    with torch.inference_mode():
        cache = decoder.new_cache(None, (0, len(tokens)), "ring", None, len(tokens), chosen)
        states = _states(generation, cache, head, ids)[0, :-1]
        for row in range(0, len(targets), _ROWS):
            part = slice(row, row + _ROWS)
            logits = head.logits(states[part])
            _score_rows(logits, targets[part], nll[part], hits[part])
            for index, one in enumerate(logits):
                take(row + index, one[None])
    allocated, headroom = cache.kv_bytes()
    counted = generation.decoder.cache_bytes(cache.lengths(), len(tokens), chosen)
    if allocated - headroom != counted:
        raise CaseInvalid(f"the cache's storages hold {allocated - headroom} bytes, its tokens {counted}")
    found = TokenScores([int(t) for t in tokens[1:]], list(range(1, len(tokens))), nll.tolist(), hits.tolist())
    return WholeScores(found, counted)


def states_through(generation: Generation) -> Callable[[LanguageHead, Tensor], Tensor]:
    """How hidden states of whole windows are computed: reading what a cache of the case's format stores, or with none."""
    decoder, chosen = generation.decoder, generation.format
    _refuse_foreign(generation)
    if chosen is None:
        return LanguageHead.hidden

    def states(head: LanguageHead, ids: Tensor) -> Tensor:
        batch, tokens = ids.shape
        cache = decoder.new_cache(None, (0, tokens), "ring", None, tokens, chosen, batch=batch)
        return _states(generation, cache, head, ids)

    return states


def _states(generation: Generation, cache: EvictionCache, head: LanguageHead, ids: Tensor) -> Tensor:
    """Hidden states of ids ``[batch, tokens]`` that go through an empty cache."""
    batch, tokens = ids.shape
    positions = cache.begin(tokens).expand(batch, -1)
    with showing(cache if cache.is_shown else None):
        found = head.hidden(ids, positions if generation.decoder.takes_positions else None, cache)
    cache.commit()
    cache.refuse_vectors()
    return found


def _refuse_foreign(generation: Generation) -> None:
    if generation.foreign is not None:
        raise CaseInvalid(
            f"--kv-cache-dtype={generation.foreign}: transformers' cache lets a prompt attend to itself unpacked, so "
            "whole windows would show nothing of it; use the compression suite"
        )


def _score_rows(logits: Tensor, targets: Tensor, nll: Tensor, hits: Tensor) -> None:
    """Fill ``nll`` and ``hits`` ``[rows]`` from ``logits`` ``[rows, vocab]``."""
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    nll.copy_(losses)
    hits.copy_(logits.argmax(-1) == targets)
