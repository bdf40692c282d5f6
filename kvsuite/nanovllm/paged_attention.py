"""The bridge into transformers: an attention function that hands every layer's tokens to the current backend."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from .batch import StepBatch

PAGED = "kvsuite_paged"


class AttentionBackend(Protocol):
    """Attention over paged keys and values. Layers are the model's own layer indices."""

    def begin(self, batch: StepBatch) -> None:
        """Plan a step on the host, once for all layers."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the step's keys and values ``[T, kv_heads, head_dim]`` in their slots."""

    def attend(self, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Attention of the step's queries ``[T, heads, head_dim]`` over what their sequences hold, shaped like them.

        It is written to ``out`` where that is given.
        """


def written_to(out: Tensor | None, found: Tensor) -> Tensor:
    """What was found, in ``out`` where that is given."""
    return found if out is None else out.copy_(found)


class _Current(threading.local):
    """What belongs to a thread's forward pass under way; functions inside the model have no other way to learn it."""

    backend: AttentionBackend | None = None
    spans: Tensor | None = None


_current = _Current()


def register_paged_attention() -> str:
    """Make the attention known to transformers and return its name.

    No mask function is registered: transformers then makes no mask at all, and spends no time on one.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PAGED, paged_attention)
    return PAGED


@contextmanager
def attending(backend: AttentionBackend, spans: Tensor | None = None) -> Iterator[None]:
    """Let forward passes inside the block attend through ``backend``; their tokens have these spans (`StepBatch.spans`)."""
    before = _current.backend, _current.spans
    _current.backend, _current.spans = backend, spans
    try:
        yield
    finally:
        _current.backend, _current.spans = before


def spans_under_way() -> Tensor | None:
    """Spans of the tokens of the forward pass under way, int64 ``[T]``; ``None`` where nothing depends on them."""
    return _current.spans


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function as transformers calls it: ``[1, heads, T, head_dim]`` in, ``[1, T, heads, head_dim]`` out.

    ``dropout`` is 0 in evaluation; it has its place because kvpress' wrapper gives it by position.
    """
    backend = _current.backend
    if backend is None:
        raise RuntimeError(f"attention {PAGED} works inside a kvsuite.nanovllm step only; set another implementation")
    layer: int = module.layer_idx  # type: ignore[assignment]
    backend.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return backend.attend(layer, query[0].transpose(0, 1), scale)[None], None
