"""Teacher-forced scoring of token windows: batched, only scored rows projected, no logits of a whole window kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvsuite.errors import UserError
from kvsuite.meters.divergence import TokenDivergence, row_divergence
from kvsuite.meters.quality import TokenScores
from kvsuite.models.language_head import LanguageHead, token_losses
from kvsuite.workloads.windows import Window

from .results import WindowProgress, WindowScores
from .window_batches import Batches, Pass, WindowText

#: hidden states of token ids ``[batch, tokens]``
StatesOf = Callable[[LanguageHead, Tensor], Tensor]
# logits of so many bytes are made at a time: few enough to stay small beside the weights, enough rows for a fast product
_LOGIT_BYTES = {"cpu": 32 * 2**20}
_LOGIT_BYTES_ELSEWHERE = 512 * 2**20


def score_windows(
    model: Any,
    tokens: Sequence[int],
    windows: Sequence[Window],
    *,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    prefix: str = "none",
    prefix_token: int | None = None,
    progress: WindowProgress | None = None,
    states_of: StatesOf = LanguageHead.hidden,
) -> WindowScores:
    """Score the targets of ``windows``.

    Neighbours that begin at the same token are one forward pass; windows of equal length are batched. The loss is a float32
    log-softmax of the model's own logits, made for some hundred rows at a time. Nothing else is shared: where windows overlap
    but begin at different tokens, every hidden state differs.

    Parameters
    ----------
    model
        A transformers causal language model in evaluation mode.
    tokens
        The text.
    windows
        From `kvsuite.workloads.windows.plan_windows`.
    batch_tokens
        Most tokens in one forward; at least one window is taken. ``None``: on the CPU one window, or as many as fit 2,048
        tokens if a timing of both on the first windows says that this is faster; on CUDA what a quarter of the free memory
        holds, at most 65,536; elsewhere 16,384.
    device
        Where the ids go; the model's own device if left out.
    prefix, prefix_token
        Prefix rule that the windows were planned with, and its token.
    progress
        Called after every forward. On an accelerator this waits for the forward.
    states_of
        Computes hidden states, where they go through a cache.

    Raises
    ------
    UserError
        If the rule needs a prefix token and there is none.
    CaseInvalid
        If a token id lies outside the vocabulary.
    """
    text = WindowText(model, tokens, windows, prefix, prefix_token)
    at = model.device if device is None else torch.device(device)
    with torch.inference_mode():
        head = LanguageHead(model)
        batches = Batches(text.passes, batch_tokens, model, at)
        targets = text.targets(at)
        nll = torch.empty(len(targets), dtype=torch.float32, device=at)
        correct = torch.empty(len(targets), dtype=torch.bool, device=at)
        rows, report = _rows_at_once(model, at), _Report(progress, nll)
        done = 0
        for batch in batches:
            states = _predicting_rows(states_of(head, text.inputs(batch, at)), batch)
            for part, piece in _pieces(states, rows, done):
                logits = head.logits(piece)
                nll[part] = token_losses(logits, targets[part])
                correct[part] = logits.argmax(-1) == targets[part]
                # the next piece is made before the name is bound anew: without this, two would be alive
                del logits
            done += len(states)
            report(done)
    effective = {
        "head": "split" if head.split else "whole",
        "logit_rows": rows,
        "batch_tokens": batches.budget,
        "batch_windows": batches.most,
    }
    scores = TokenScores(text.target_ids, text.positions, nll.tolist(), correct.tolist())
    return WindowScores(scores, batches.tokens, batches.forwards, effective)


def compare_windows(
    model: Any,
    reference_model: Any,
    tokens: Sequence[int],
    windows: Sequence[Window],
    *,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    prefix: str = "none",
    prefix_token: int | None = None,
    progress: WindowProgress | None = None,
    states_of: StatesOf = LanguageHead.hidden,
) -> TokenDivergence:
    """Compare a model with a reference on the same windows, position by position; both are in memory, no logits are kept.

    Parameters
    ----------
    model, reference_model
        Two transformers models of one vocabulary on one device.
    tokens, windows, batch_tokens, device, prefix, prefix_token, progress, states_of
        As for `score_windows`; the reference goes through no cache.

    Raises
    ------
    UserError
        As `score_windows`, and if the vocabularies differ.
    """
    sizes = [int(each.config.get_text_config().vocab_size) for each in (model, reference_model)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--kv-reference: a vocabulary of {sizes[1]} tokens cannot be compared with one of {sizes[0]}; "
            "give another format of the same model"
        )
    text = WindowText(model, tokens, windows, prefix, prefix_token)
    at = model.device if device is None else torch.device(device)
    with torch.inference_mode():
        heads = LanguageHead(model), LanguageHead(reference_model)
        targets = text.targets(at)
        nll, nll_reference, kld = (torch.empty(len(targets), dtype=torch.float32, device=at) for _ in range(3))
        same = torch.empty(len(targets), dtype=torch.bool, device=at)
        # logits, log-softmaxes and terms of both arms are alive at once
        rows, report = max(1, _rows_at_once(model, at) // 4), _Report(progress, nll)
        done = 0
        for batch in Batches(text.passes, batch_tokens, model, at):
            ids = text.inputs(batch, at)
            states = _predicting_rows(states_of(heads[0], ids), batch)
            reference_states = _predicting_rows(heads[1].hidden(ids), batch)
            for part, piece in _pieces(states, rows, done):
                logits = heads[0].logits(piece)
                reference = heads[1].logits(reference_states[part.start - done : part.stop - done])
                kld[part], same[part] = row_divergence(logits, reference)
                nll[part], nll_reference[part] = (
                    token_losses(logits, targets[part]),
                    token_losses(reference, targets[part]),
                )
                del logits, reference
            done += len(states)
            report(done)
    return TokenDivergence(nll.tolist(), nll_reference.tolist(), kld.tolist(), same.tolist())


def _predicting_rows(states: Tensor, batch: Sequence[Pass]) -> Tensor:
    """The rows ``[rows, hidden]`` that predict the targets: the last ones of each sequence."""
    return torch.cat([states[index, -each.window.targets :] for index, each in enumerate(batch)])


def _pieces(states: Tensor, rows: int, done: int) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of ``states``, each with its place among all targets."""
    for at in range(0, len(states), rows):
        piece = states[at : at + rows]
        yield slice(done + at, done + at + len(piece)), piece


class _Report:
    """Passes the running mean loss on, adding up only what is new."""

    def __init__(self, progress: WindowProgress | None, nll: Tensor) -> None:
        self._progress, self._nll = progress, nll
        self._done, self._sum = 0, 0.0

    def __call__(self, done: int) -> None:
        if self._progress is None:
            return
        self._sum += float(self._nll[self._done : done].sum(dtype=torch.float64))
        self._done = done
        self._progress(done, len(self._nll), self._sum / done)


def _rows_at_once(model: Any, device: torch.device) -> int:
    size = _LOGIT_BYTES.get(device.type, _LOGIT_BYTES_ELSEWHERE)
    # 4 bytes: the float32 copy is the larger one
    return max(1, size // (4 * int(model.config.get_text_config().vocab_size)))
