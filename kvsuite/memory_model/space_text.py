"""What ``--kv-space`` may say: the name of a space, or the values of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible
from kvsuite.memory_model.design_point import AXES, OFF, QUANTIZATION, Axis
from kvsuite.memory_model.design_space import NAMED, DesignSpace, named_space, union
from kvsuite.options.numbers import whole

Value = TypeVar("Value", int, str)

#: joins products of axes
UNION = "|"
# what is shown of a space: products of many axes are long
SPACE_LIMIT = 400
EXAMPLE = "ctx=4096,8192;batch=1,4;window=off,2048;sink=0,4"
_SHORT_QUANTIZATION = ("quant", "q")
_AXES: dict[str, Axis] = {name: axis for axis in AXES for name in (axis.name, *axis.short)}
_SHORT = (*(axis.short[0] for axis in AXES), _SHORT_QUANTIZATION[0])


def parse_space(
    text: str,
    *,
    quantizations: Sequence[str] | None = None,
    default: Sequence[str] = ("q4f16_1",),
    option: str = "--kv-space",
) -> DesignSpace:
    """Make the space that a text names.

    Parameters
    ----------
    text
        ``schemes``, ``small``, ``full``, or ``axis=value,value;axis=...`` with the axes ``ctx``, ``chunk``, ``batch``,
        ``window``, ``sink`` and ``quant`` (also by the original's names). An axis that is not named has one value: context
        4096, batch 1, no window, no sinks, and a chunk of 1024, or of the smallest context where that is less. Several such
        products are joined by ``|``; a point of two of them is one point, and the weight formats are those of all.
    quantizations
        Weight formats that were asked for elsewhere, ``None`` if none were.
    default
        Weight formats if nobody names one.
    option
        What the user typed it behind, for messages.

    Raises
    ------
    UserError
        If the text names no space, an axis or a value twice or in a way that cannot be, or weight formats that were asked
        for elsewhere as well.
    """
    shown = f"{option}={visible(text, SPACE_LIMIT)}"
    text = text.strip()
    if text in NAMED:
        return named_space(text, _formats(shown, list(quantizations or default)))
    if "=" not in text:
        names = ", ".join(NAMED)
        raise UserError(f'{shown}: no such space; give {names} or axes such as "{EXAMPLE}"')
    formats: list[str] | None = None
    products = []
    for piece in text.split(UNION):
        axes, named = _axes(shown, piece)
        if named is not None and formats is not None:
            raise UserError(f"{shown}: quantization is named twice; name it once, it is that of all products")
        formats = named or formats
        products.append(_completed(axes))
    if formats is not None and quantizations is not None:
        raise UserError(f"{shown}: quantization is given here and as an option of its own; give it once")
    return union(products, _formats(shown, list(formats or quantizations or default)), name=text)


def _axes(shown: str, text: str) -> tuple[dict[str, list[int]], list[str] | None]:
    """Values of the axes that a product names, and its weight formats."""
    axes: dict[str, list[int]] = {}
    formats: list[str] | None = None
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if not parts:
        raise UserError(f'{shown}: an empty product beside "{UNION}"; give it axes, or leave the "{UNION}" out')
    for part in parts:
        name, equals, listed = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UserError(f"{shown}: {part} is not axis=value,value; the names {', '.join(NAMED)} stand alone")
        given = [value.strip() for value in listed.split(",")]
        if name in (QUANTIZATION, *_SHORT_QUANTIZATION):
            if formats is not None:
                raise UserError(f"{shown}: quantization is named twice; name it once, with all its values")
            formats = _formats(shown, given)
            continue
        if name not in _AXES:
            raise UserError(f"{shown}: no axis {name}; the axes are {', '.join(_SHORT)}")
        axis = _AXES[name]
        if axis.name in axes:
            raise UserError(
                f'{shown}: {axis.name} is named twice; name it once, with all its values, or join products by "{UNION}"'
            )
        axes[axis.name] = _distinct(shown, name, [_value(shown, name, axis, value) for value in given])
    return axes, formats


def _completed(axes: dict[str, list[int]]) -> dict[str, list[int]]:
    full = {axis.name: axes.get(axis.name, [axis.unnamed]) for axis in AXES}
    if "prefill_chunk_size" not in axes:
        # whoever did not name the chunk did not ask for one that breaks a rule
        full["prefill_chunk_size"] = [min(*full["prefill_chunk_size"], *full["context_window_size"])]
    return full


def _value(shown: str, name: str, axis: Axis, text: str) -> int:
    if axis.name == "sliding_window_size" and text.lower() in ("off", str(OFF)):
        return OFF
    try:
        return whole(text, axis.minimum, axis.maximum)
    except ValueError as error:
        raise UserError(f"{shown}: {name}={visible(text, VALUE_LIMIT)} {axis.must_be}") from error


def _formats(shown: str, given: list[str]) -> list[str]:
    if not all(given):
        raise UserError(f"{shown}: a weight format is empty; name formats such as q4f16_1")
    return _distinct(shown, QUANTIZATION, given)


def _distinct(shown: str, name: str, values: list[Value]) -> list[Value]:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise UserError(f"{shown}: {name} has the value {twice[0]} twice; ids would not be unique, name it once")
    return values
