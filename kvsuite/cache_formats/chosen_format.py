"""The cache formats that a run asks for, and the one of a case. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options

from .by_layer import BY_LAYER, ByLayerFormat, OwnFormat
from .cache_format import SIDE, CacheFormat, parameters_of, wrong_format
from .cast_format import CAST_TYPES, CastFormat
from .ggml_format import GGML_TYPES, GgmlFormat

#: where a case has its format
PARAMETER = "kv_cache_dtype"
_HQQ = "hqq_int"


@dataclass(frozen=True)
class HqqFormat:
    """transformers' own quantised cache with hqq along the rows of head vectors (its axis 1): a foreign reference.

    Parameters
    ----------
    bits
        Of an element, 4 or 8.
    group
        Numbers that share a scale and a zero point.
    residual
        Tokens in the model's dtype until all are packed anew; a prompt is packed at once, and attends to itself unpacked.
    """

    bits: int
    group: int = 64
    residual: int = 128

    @property
    def label(self) -> str:
        """What stands in names of cases and in tables."""
        return str(self)

    def __str__(self) -> str:
        return f"{_HQQ}{self.bits}(group={self.group},residual={self.residual})"


#: what a case may ask for beside the model's own numbers
StoredFormat = OwnFormat | HqqFormat | GgmlFormat | CastFormat


def parse_format(typed: str) -> StoredFormat | None:
    """Read a format's name, a foreign one included; ``None`` for ``auto``.

    Raises
    ------
    UserError
        For a number format, parameter or combination that there is not.
    """
    if typed.strip().startswith(BY_LAYER):
        return ByLayerFormat.parse(typed)
    if typed.strip() in CAST_TYPES:
        return CastFormat(typed.strip())
    sides = [part.strip() for part in typed.split(":")]
    if any(side in GGML_TYPES for side in sides):
        if len(sides) > 2 or not all(side in GGML_TYPES for side in sides):
            raise wrong_format(
                typed, "a type of llama.cpp stands for both, or beside another one of its types: f16:q8_0"
            )
        return GgmlFormat(sides[0], sides[-1])
    if not typed.strip().startswith(_HQQ):
        return CacheFormat.parse(typed)
    found = SIDE.fullmatch(typed.strip())
    if found is None or found[1] not in (f"{_HQQ}4", f"{_HQQ}8") or found[3]:
        raise wrong_format(
            typed, f"transformers' cache with hqq is {_HQQ}4 or {_HQQ}8, for keys and values alike, without rotation"
        )
    return HqqFormat(int(found[1].removeprefix(_HQQ)), **parameters_of(typed, found[1], found[2]))


def label_of(name: str) -> str:
    """What stands in tables and figures for a format that a case's parameters have under ``name``."""
    return ByLayerFormat.parse(name).label if name.startswith(f"{BY_LAYER}(") else name


@dataclass(frozen=True)
class ChosenFormat:
    """A format that a run asks for, as cases take it.

    Parameters
    ----------
    format
        ``None`` for ``auto``, which adds nothing to a case.
    """

    format: StoredFormat | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What it adds to the parameters of a case."""
        return {} if self.format is None else {PARAMETER: str(self.format)}

    def named(self, name: str, between: str = "_") -> str:
        """The name of a case, with the format behind it."""
        return name if self.format is None else f"{name}{between}{self.format.label}"


def selected_cache_formats(options: Options) -> tuple[ChosenFormat, ...]:
    """The formats of ``--kv-cache-dtype``, in order.

    Raises
    ------
    UserError
        If there is no such format, one is named twice in two ways, or a residual window is no shorter than every text.
    """
    typed = options.of(CommonOptions).cache_dtype
    found = tuple(ChosenFormat(parse_format(one)) for one in typed)
    for index, one in enumerate(found):
        if one in found[:index]:
            first = typed[found.index(one)]
            raise UserError(
                f"--kv-cache-dtype={','.join(typed)}: {typed[index]} and {first} are one format; name it once"
            )
    return found


def format_of(case: Case) -> StoredFormat | None:
    """The format of a case, ``None`` for the model's dtype.

    Raises
    ------
    UserError
        If its parameters name one that there is not.
    """
    name = case.params.get(PARAMETER)
    return None if name is None else parse_format(str(name))


def refuse_long_residual(chosen: ChosenFormat, tokens: int, option: str) -> None:
    """Refuse a residual window in which the whole text lies: nothing would be packed.

    Raises
    ------
    UserError
        Naming both.
    """
    if isinstance(chosen.format, OwnFormat) and chosen.format.residual >= tokens:
        raise UserError(
            f"--kv-cache-dtype={chosen.format.label}: the residual window of {chosen.format.residual} tokens is no shorter "
            f"than the text of {tokens} ({option}), of which nothing would be packed; lower residual or give a longer text"
        )
