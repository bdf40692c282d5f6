"""A press at work on a model: around the prompt, while decoding, and leaving no trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from kvsuite.compression.ratio import keep_count
from kvsuite.errors import CaseInvalid

from .compat import attention_patch, cache_position
from .replay import raw_text_tokenizer, replays
from .table import PressInfo

if TYPE_CHECKING:
    import torch
    from torch import nn


class KvpressSession:
    """One press on one model. `KvpressMethod.session` opens it.

    Attributes
    ----------
    press
        The kvpress object.
    info
        What it does.
    """

    def __init__(
        self,
        model: Any,
        press: Any,
        info: PressInfo,
        targets: list[Any],
        keep_ratio: float,
    ) -> None:
        self.model = model
        self.press = press
        self.info = info
        self._targets = targets
        self._keep_ratio = keep_ratio
        self._on_interval: Callable[[bool], None] | None = None
        self._inside = False
        self._hook_is_timed = False
        self._decoding = ExitStack()

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """Run one prompt inside: a single forward of the whole prompt through an empty cache.

        Call the model with ``input_ids`` and ``past_key_values`` by name. A press that compresses while decoding stays
        on until the next ``prefill`` or the end of the session; one that compresses on exit does so as the block ends.

        Raises
        ------
        CaseInvalid
            If the prompt breaks a rule of the press, such as being shorter than its window.
        """
        self.close()
        if "decode" in self.info.compresses:
            self._decoding.enter_context(self._pressed())
            yield
        else:
            with self._pressed():
                yield

    @contextmanager
    def timed(self, on_interval: Callable[[bool], None]) -> Iterator[None]:
        """Report every piece of work of the press inside this block, which has to lie around ``prefill``.

        Without it nothing of kvpress is changed, so that the timing pass measures kvpress alone.

        Parameters
        ----------
        on_interval
            Called with ``True`` right before and with ``False`` right after: each layer's compression, or, for a press
            that compresses on exit, each replay and the exit. The pieces never overlap.
        """
        if self.info.compresses != "exit" and not self._hook_is_timed:
            self.press.forward_hook = self._timed(self.press.forward_hook)
            self._hook_is_timed = True
        self._on_interval = on_interval
        try:
            yield
        finally:
            self._on_interval = None

    def first_decode_position(self, cache: Any, prompt_tokens: int) -> int:
        """Position of the first token after the prompt; positions go on by one from there.

        The prompt's true length, or the number of stored tokens after a press that moves the keys to their place in the
        cache (``info.positions == "cache"``).
        """
        return _stored(cache.layers[0]) if self.info.positions == "cache" else prompt_tokens

    def measure_effective(self, cache: Any, full_tokens: int) -> dict[str, Any]:
        """What the press really removed. See the function `measure_effective`."""
        return measure_effective(self.model, cache, full_tokens)

    def close(self) -> None:
        """Take the press off the model."""
        self._decoding.close()

    @contextmanager
    def _pressed(self) -> Iterator[None]:
        attentions = attention_modules(self.model)
        failure: BaseException | None = None
        with ExitStack() as stack:
            stack.enter_context(cache_position(attentions))
            if self._targets:
                handle = attentions[0].register_forward_pre_hook(self._set_targets, with_kwargs=True)
                stack.callback(handle.remove)
            if self.info.compresses == "exit":
                stack.enter_context(replays(self.model, self._interval))
            try:
                with self.press(self.model):
                    try:
                        yield
                    except BaseException as error:
                        failure = error
                        raise
                    if self.info.compresses == "exit":
                        stack.enter_context(self._interval())
            except BaseException as error:
                # KVCompose fails once more on exit when the prompt's forward failed
                if failure is not None and error is not failure:
                    raise failure from None
                if isinstance(error, AssertionError) and _raised_in_kvpress(error):
                    raise CaseInvalid(f"kvpress:{self.info.name}: {error}") from error
                raise

    def _set_targets(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["past_key_values"].get_seq_length(module.layer_idx) == 0:
            kept = keep_count(kwargs["hidden_states"].shape[1], self._keep_ratio)
            for press in self._targets:
                press.target_size = kept if self._keep_ratio < 1 else sys.maxsize

    @contextmanager
    def _interval(self) -> Iterator[None]:
        if self._on_interval is None or self._inside:
            yield
            return
        self._inside = True
        self._on_interval(True)
        try:
            yield
        finally:
            self._on_interval(False)
            self._inside = False

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._interval():
                return hook(*args, **kwargs)

        return timed


@contextmanager
def open_session(
    model: Any,
    press: Any,
    info: PressInfo,
    targets: list[Any],
    keep_ratio: float,
    tokenizer: Any,
    seed: int,
) -> Iterator[KvpressSession]:
    """Open a session and undo everything that it did to the model, also after an error."""
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    with ExitStack() as stack:
        stack.callback(cleanup, model)
        # KVCompose leaves it at eager when the prompt's forward fails
        stack.callback(setattr, config, "_attn_implementation", implementation)
        stack.enter_context(attention_patch())
        if info.random:
            stack.enter_context(_seeded(model.device, seed))
        if info.needs_tokenizer:
            stack.enter_context(raw_text_tokenizer(model, tokenizer, f"kvpress:{info.name}"))
        session = KvpressSession(model, press, info, targets, keep_ratio)
        stack.callback(session.close)
        yield session


def attention_modules(model: Any) -> list[nn.Module]:
    """The attention modules that kvpress puts its hooks on, in layer order."""
    base = model.model
    language_model = base.language_model if hasattr(base, "language_model") else base
    return [layer.self_attn for layer in language_model.layers]


def cleanup(model: Any) -> None:
    """Remove what kvpress leaves on a model: masks and the rotary embedding it hangs on every attention module.

    Masks would otherwise hide positions of the next case's cache until its first forward of a whole prompt.
    """
    base = model.model
    language_model = base.language_model if hasattr(base, "language_model") else base
    for module in attention_modules(model):
        if "masked_key_indices" in module.__dict__:
            del module.masked_key_indices
        if module._modules.get("rotary_emb") is language_model.rotary_emb:
            del module.rotary_emb


def measure_effective(model: Any, cache: Any, full_tokens: int) -> dict[str, Any]:
    """Count what a cache stores and what masks hide of it.

    Parameters
    ----------
    model
        The model the cache belongs to; the masks are on its attention modules.
    cache
        The cache after the prompt.
    full_tokens
        Tokens the full cache would store.

    Returns
    -------
    dict
        ``stored_tokens``: tokens stored per layer; ``masked_tokens``: of these, masked per layer, as the mean over
        batch and KV heads; ``removed_ratio``: fraction of the full cache's tokens not stored, over all layers;
        ``masked_ratio``: fraction stored but masked.
    """
    stored = [_stored(layer) for layer in cache.layers]
    masked = []
    for module, layer in zip(attention_modules(model), cache.layers, strict=True):
        indices = getattr(module, "masked_key_indices", None)
        masked.append(0.0 if indices is None else len(indices[0]) / (layer.keys.shape[0] * layer.keys.shape[1]))
    full = full_tokens * len(stored)
    return {
        "stored_tokens": stored,
        "masked_tokens": masked,
        "removed_ratio": 1 - sum(stored) / full,
        "masked_ratio": sum(masked) / full,
    }


def _stored(layer: Any) -> int:
    """Tokens in the layer's tensors; ``get_seq_length`` may count the tokens seen instead."""
    if hasattr(layer, "_quantized_keys"):
        return int(layer.get_seq_length())
    return int(layer.keys.shape[-2])


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _raised_in_kvpress(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("kvpress.")
