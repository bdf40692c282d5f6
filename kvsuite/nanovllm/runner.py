"""Runs a step: tokens of many sequences in one forward pass, logits of the rows that are wanted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kvsuite.errors import CaseInvalid
from kvsuite.models.language_head import LanguageHead
from kvsuite.models.load import LoadedModel

from .attention_layers import set_attention
from .batch import StepBatch
from .paged_attention import AttentionBackend, attending, register_paged_attention
from .prompt_observer import PromptObserver
from .reference_attention import ReferenceAttention
from .turns import Turns


class Runner(Protocol):
    """Runs the steps of a runtime on a model that belongs to it until `close`."""

    @property
    def captured_bytes(self) -> int:
        """What torch gave captured steps and their static tensors, measured; 0 where nothing is captured."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is really done, for records: ``attention`` and ``decode_step`` at least."""

    def run(self, batch: StepBatch) -> Tensor:
        """Run one step and return logits ``[R, vocab]`` of ``batch.sample_rows``; the next step may overwrite them."""

    def hidden(self, batch: StepBatch) -> Tensor:
        """Run one step and return what `logits` makes them from, ``[R, hidden]``; the next step may overwrite it."""

    def logits(self, rows: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of some rows of what `hidden` returned."""

    observer: PromptObserver | None

    def use_captured(self, streams: str) -> None:
        """Replay the decode steps captured on the streams of a name (``""``: the first), on the current stream if it is new."""

    def beside(self, turns: Turns) -> Runner:
        """Another runner of the same model and pools for steps on another stream, the current one; `turns` pauses them.

        It captures nothing, and ends with this one.
        """

    def close(self) -> None:
        """Give the model back as it was."""


class ModelRunner:
    """A loaded transformers model that attends through a backend.

    From construction to `close` the model's language layers belong to the runner: their attention needs a step.

    Parameters
    ----------
    loaded
        The model.
    backend
        Attention over the pools.
    """

    def __init__(self, loaded: LoadedModel, backend: AttentionBackend) -> None:
        self.backend = backend
        self.model: Any = loaded.model
        self.device = loaded.device
        self._config = loaded.text_config
        self._head: LanguageHead | None = None
        self._before = set_attention(self._config, register_paged_attention())
        self.captured_bytes = 0
        #: sees the queries of prompts, for a policy that looks at them
        self.observer: PromptObserver | None = None
        self._turns: Turns | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        reference = isinstance(self.backend, ReferenceAttention)
        return {
            "attention": f"paged: {'reference' if reference else type(self.backend).__name__}",
            "decode_step": "eager",
        }

    def run(self, batch: StepBatch) -> Tensor:
        """Run one step and return logits ``[R, vocab]`` of ``batch.sample_rows``, in the model's dtype.

        The result may be overwritten by the next step.
        """
        wanted = batch.sample_rows.shape[0]
        # a step in the middle of a prompt wants no logits, and not every final layer takes zero rows
        rows = batch.sample_rows if wanted else batch.ids.new_zeros(1)
        self.backend.begin(batch)
        with torch.inference_mode(), attending(self._observed(self.backend, batch), batch.spans):
            logits: Tensor = self.model(
                **self._fed(batch),
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=rows,
            ).logits
        return logits[0, :wanted]

    def hidden(self, batch: StepBatch) -> Tensor:
        """Run one step and return the last hidden states ``[R, hidden]`` of ``batch.sample_rows``.

        Logits ``[R, vocab]`` for models that cannot be split before their final layer.
        """
        head = self._language_head()
        self.backend.begin(batch)
        with torch.inference_mode(), attending(self._observed(self.backend, batch), batch.spans):
            return head.hidden(**self._fed(batch), positions=batch.positions[None])[0, batch.sample_rows]

    def logits(self, rows: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of some rows of what `hidden` returned."""
        with torch.inference_mode():
            return self._language_head().logits(rows)

    def use_captured(self, streams: str) -> None:
        """Nothing: it captures nothing."""

    def beside(self, turns: Turns) -> Self:
        """Another runner of the same model and pools for steps on another stream, the current one.

        Raises
        ------
        CaseInvalid
            If the attention cannot be had twice.
        """
        again = getattr(self.backend, "beside", None)
        if again is None:
            raise CaseInvalid(
                f"lanes=2: the attention {type(self.backend).__name__} cannot serve two lanes; use lanes=1"
            )
        other = copy.copy(self)
        other.backend, other.observer, other._turns = again(), None, turns
        return other

    def close(self) -> None:
        """Give the model its own attention back."""
        set_attention(self._config, self._before)

    def _fed(self, batch: StepBatch) -> dict[str, Tensor]:
        """What the model is fed: ids, or embeddings where features of images stand among them."""
        if batch.images is None:
            return {"input_ids": batch.ids[None]}
        return {"inputs_embeds": batch.images.into(self.model.get_input_embeddings()(batch.ids))[None]}

    def _observed(self, backend: AttentionBackend, batch: StepBatch) -> AttentionBackend:
        if self.observer is not None:
            backend = self.observer.around(backend, batch)
        return backend if self._turns is None else self._turns.around(backend)

    def _language_head(self) -> LanguageHead:
        """Made when it is first asked for: most runtimes score nothing."""
        if self._head is None:
            paged = set_attention(self._config, self._before)
            try:
                self._head = LanguageHead(self.model)
            finally:
                set_attention(self._config, paged)
        return self._head
