"""kvpress 0.5.5 on transformers 5.2 to 5.23: an import without side effects, and what newer versions dropped.

Nothing here changes kvpress: every repair belongs to one ``with`` block and is undone when it ends.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvsuite.errors import CaseSkipped

if TYPE_CHECKING:
    from torch import nn

KVPRESS_VERSION = "0.5.5"
# --no-deps: its own pins would hold transformers below 5.3; cachetools and fire are what it imports beyond ours
INSTALL = f"pip install cachetools fire && pip install --no-deps kvpress=={KVPRESS_VERSION}"


def load_kvpress() -> Any:
    """Import kvpress and leave transformers' attention functions as they were.

    kvpress replaces every registered attention function of the process when it is imported, so a full-cache case would
    run other code after a kvpress case than before it. `attention_patch` puts the wrappers on where they are needed.

    Returns
    -------
    module
        The ``kvpress`` module.

    Raises
    ------
    CaseSkipped
        If kvpress, or a module it imports, is missing, or if another version than the tested one is installed.
    """
    if importlib.util.find_spec("kvpress") is None:
        raise CaseSkipped(f"kvpress is not installed: {INSTALL}")
    installed = importlib.metadata.version("kvpress")
    if installed != KVPRESS_VERSION:
        raise CaseSkipped(f"kvpress {installed} is installed, only {KVPRESS_VERSION} is known: {INSTALL}")
    functions = _attention_functions()
    before = dict(functions)
    try:
        with warnings.catch_warnings():
            # fire 0.6 imports the standard library's deprecated pipes
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module("kvpress")
    except ModuleNotFoundError as error:
        raise CaseSkipped(f"kvpress needs the module {error.name}: {INSTALL}") from error
    _restore(functions, before)
    return module


@contextmanager
def attention_patch() -> Iterator[None]:
    """Wrap the registered attention functions the way kvpress does, for this block only.

    The wrapper makes presses that mask instead of evicting work: it overwrites the masked keys at every decode step.
    """
    from kvpress.attention_patch import attention_patch as wrap

    functions = _attention_functions()
    before = dict(functions)
    try:
        for name, function in before.items():
            if function.__module__ != wrap.__module__:
                functions[name] = wrap(function)
        yield
    finally:
        _restore(functions, before)


@contextmanager
def cache_position(attentions: list[nn.Module]) -> Iterator[None]:
    """Give the attention modules' hooks the ``cache_position`` that transformers dropped in 5.4.

    kvpress recognises the prompt by it. It is what transformers 5.2 passed: consecutive integers that start at
    ``past_key_values.get_seq_length()``. Where the model still passes it, nothing is changed.

    Parameters
    ----------
    attentions
        The model's attention modules.
    """
    handles = [module.register_forward_pre_hook(_add_cache_position, with_kwargs=True) for module in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_cache_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    import torch

    if kwargs.get("cache_position") is not None:
        return None
    hidden, cache = kwargs["hidden_states"], kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))
    return args, kwargs | {"cache_position": torch.arange(past, past + hidden.shape[1], device=hidden.device)}


def _attention_functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _restore(functions: Any, before: dict[str, Callable[..., Any]]) -> None:
    for name, function in before.items():
        if functions[name] is not function:
            del functions[name]  # drops the override, so that a later AttentionInterface.register still shows
            if functions.get(name) is not function:
                functions[name] = function
