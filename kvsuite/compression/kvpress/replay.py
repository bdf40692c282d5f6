"""Further forwards that some presses run over the prompt: on its cache, but not counted as tokens it has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvsuite.errors import CaseSkipped

if TYPE_CHECKING:
    import torch


@contextmanager
def replays(model: Any, interval: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let a press run further forwards of ``model.model`` after the prompt's, the first one of this block.

    A layer that counts the tokens it has seen would count the replayed ones, which the press cuts off again, so that
    all later positions would be wrong. Until the block ends the cache has plain layers instead.

    Parameters
    ----------
    model
        The causal LM.
    interval
        Context around each replay, for timing.
    """
    base = model.model
    own, forward = base.__dict__.get("forward"), base.forward
    calls = 0
    with ExitStack() as stack:

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return forward(*args, **kwargs)
            if calls == 2:
                stack.enter_context(_plain_layers(kwargs["past_key_values"]))
            # the replayed tokens follow the prompt, whatever positions the prompt was given
            for name in ("position_ids", "cache_position"):
                kwargs.pop(name, None)
            with interval():
                return forward(*args, **kwargs)

        base.forward = counted
        try:
            yield
        finally:
            base.__dict__.pop("forward", None)
            if own is not None:
                base.forward = own


@contextmanager
def raw_text_tokenizer(model: Any, tokenizer: Any, name: str) -> Iterator[None]:
    """Give KVzip and KVgrad a tokenizer without a chat template.

    With a template they take the first tokens of the prompt for the template's and evict them first; kvsuite's prompts
    are raw token windows.

    Parameters
    ----------
    model
        The causal LM.
    tokenizer
        Its tokenizer, ``None`` to load it from ``model.config.name_or_path``.
    name
        Name of the method, for the message.

    Raises
    ------
    CaseSkipped
        If no tokenizer is given and none can be loaded.
    """
    from kvpress.presses import kvzip_press

    own = kvzip_press.AutoTokenizer
    if tokenizer is None:
        try:
            tokenizer = own.from_pretrained(model.config.name_or_path)
        except (OSError, ValueError) as error:
            raise CaseSkipped(f"{name} needs the model's tokenizer, and there is none: {error}") from error
    raw = SimpleNamespace(chat_template=None, encode=tokenizer.encode)
    kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: raw)
    try:
        yield
    finally:
        kvzip_press.AutoTokenizer = own


@contextmanager
def _plain_layers(cache: Any) -> Iterator[None]:
    """Lend the cache plain layers with the same tensors, and give its own layers what these hold at the end."""
    from transformers.cache_utils import DynamicLayer

    own = list(cache.layers)
    # KVgrad lends read-only layers of its own
    if all(type(layer) is DynamicLayer or type(layer).__module__.startswith("kvpress.") for layer in own):
        yield
        return
    plain = []
    for layer in own:
        lent = DynamicLayer()
        lent.dtype, lent.device, lent.is_initialized = layer.keys.dtype, layer.keys.device, True
        lent.keys, lent.values = layer.keys, layer.values
        # not a slice: that would keep the whole prompt's storage alive beside the replay's
        layer.keys, layer.values = _emptied(layer.keys), _emptied(layer.values)
        plain.append(lent)
    cache.layers = plain
    try:
        yield
    finally:
        for layer, lent in zip(own, plain, strict=True):
            layer.keys, layer.values = lent.keys, lent.values
        cache.layers = own


def _emptied(states: torch.Tensor) -> torch.Tensor:
    return states.new_empty((*states.shape[:-2], 0, states.shape[-1]))
