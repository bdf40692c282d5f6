"""A causal language model in two halves: hidden states, and logits of only the rows that are wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PROBE_TOKENS = 4


class LanguageHead:
    """Splits a transformers model so that rows of its logits can be made piece by piece.

    The second half is the model's own ``forward`` with its base replaced by ready hidden states, so whatever an architecture
    does around its head (scaling, soft capping, a bias) is done by its own code. A probe of four tokens compares the two
    halves with the whole model; where they differ, or the model has no base, all rows are projected.

    Parameters
    ----------
    model
        The transformers model, in evaluation mode.

    Attributes
    ----------
    split
        Whether rows can be projected piece by piece.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._base: Any = getattr(model, "base_model", None)
        self._output_class: Any = None
        self.split = self._base is not None and self._base is not model and self._halves_agree()

    def hidden(
        self,
        input_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[batch, tokens, hidden]`` of ``input_ids`` ``[batch, tokens]``; logits where there is no split.

        ``inputs_embeds`` ``[batch, tokens, hidden]`` may stand in the place of the ids.
        No cache is made and no mask is passed: every sequence is whole, which lets attention take its causal kernels.
        ``positions`` ``[batch, tokens]`` are those from 0 on if left out. With an empty ``cache`` the attention reads what that
        one stores.
        """
        fed = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        fed |= _given(positions, cache)
        return self._states(fed) if self.split else self._logits(fed)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits ``[rows, vocab]`` of rows of what `hidden` returned."""
        return self._project(rows) if self.split else rows

    def _states(self, fed: dict[str, Any]) -> Tensor:
        output = self._base(**fed)
        self._output_class = type(output)
        states: Tensor = output.last_hidden_state
        return states

    def _logits(self, fed: dict[str, Any]) -> Tensor:
        logits: Tensor = self.model(**fed).logits
        return logits

    def _project(self, rows: Tensor) -> Tensor:
        output = self._output_class(last_hidden_state=rows[None])
        # accelerate and bitsandbytes put a forward of their own on the instance: theirs comes back
        own = self._base.__dict__.get("forward")
        self._base.forward = lambda *args, **kwargs: output
        try:
            ids = torch.zeros(1, rows.shape[0], dtype=torch.int64, device=rows.device)
            return self._logits({"input_ids": ids, "use_cache": False})[0]
        finally:
            if own is None:
                del self._base.forward
            else:
                self._base.forward = own

    def _halves_agree(self) -> bool:
        ids = torch.arange(_PROBE_TOKENS, device=self.model.device)[None]
        fed = {"input_ids": ids, "use_cache": False}
        with torch.inference_mode():
            whole = self._logits(fed)[0]
            try:
                halves = self._project(self._states(fed)[0])
            except (AttributeError, TypeError, ValueError, LookupError):
                # the base of this architecture is not what a decoder's base is
                return False
        return whole.shape == halves.shape and torch.allclose(whole, halves, rtol=1e-2, atol=1e-3, equal_nan=True)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p`` of ``targets`` ``[rows]`` in nats, in float32, from ``logits`` ``[rows, vocab]``."""
    wide = logits.float()
    # cross_entropy adds a row's exponentials up in few lanes on a CPU, where the many small ones are lost: SmolLM2's losses
    # come out 1.6e-5 nats too low. logsumexp adds pairwise: 1e-8
    return wide.logsumexp(-1) - wide.gather(-1, targets[:, None])[:, 0]


def _given(positions: Tensor | None, cache: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    return given if positions is None else given | {"position_ids": positions}
