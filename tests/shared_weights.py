"""Models that the tests of several files share: a test that changes one fails itself, not whichever tests come after it."""

from __future__ import annotations

from typing import Any

_State = list[tuple[str, int, int]]
_SHARED: dict[str, tuple[Any, _State]] = {}


def share(name: str, model: Any) -> None:
    """Watch ``model`` (a torch module) from here on; ``name`` is what an error calls it."""
    _SHARED[name] = model, _state(model)


def changed() -> list[str]:
    """The shared models whose parameters were replaced or written to since they were last asked for."""
    found = []
    for name, (model, before) in _SHARED.items():
        if (now := _state(model)) != before:
            found.append(name)
            _SHARED[name] = model, now
    return found


def _state(model: Any) -> _State:
    # torch counts the writes to a tensor
    return [(name, t.data_ptr(), t._version) for name, t in model.named_parameters(remove_duplicate=False)]
