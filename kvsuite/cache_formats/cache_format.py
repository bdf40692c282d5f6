"""A number format of the cache by its name: ``int8:int4(group=32,residual=64)+hadamard``. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible
from kvsuite.models.layers import ModelLayers
from kvsuite.options.common import CommonOptions
from kvsuite.options.numbers import MOST_TOKENS, whole
from kvsuite.options.option import outside_brackets
from kvsuite.options.resolve import Options

#: the model's own dtype
AUTO = "auto"
#: bits of an element, and float16 numbers that a group has: its scale, or its scale and its least value
NUMBERS: dict[str, tuple[int, int]] = {"fp8_e4m3": (8, 1), "int8": (8, 1), "int4": (4, 2)}
#: where a case has its format
PARAMETER = "kv_cache_dtype"
SCALE_BYTES = 2
_CHANNEL, _HADAMARD, _KIVI = "_channel", "+hadamard", "kivi_"
_HQQ = "hqq_int"
#: formats of one engine alone, with the engine
ENGINE_FORMATS = {"fp8_e5m2": "vllm"}
#: other engines' names of formats that have one here
_ALIASES = {"fp8": "fp8_e4m3"}
_KIVI_GROUP, _KIVI_RESIDUAL = 32, 128
_SIDE = re.compile(r"([\w.-]+)(?:\(([^()]*)\))?(\+\w+)?")


@dataclass(frozen=True)
class SideFormat:
    """How keys, or values, are stored.

    Parameters
    ----------
    number
        ``auto`` (the model's dtype), ``fp8_e4m3``, ``int8`` or ``int4``.
    per_channel
        Whether numbers of one channel share a scale, those of ``group`` neighbouring tokens; else those of one token do.
    group
        Numbers that share a scale; ``None``: all of a token's head vector. ``fp8_e4m3`` has scales only where it is given.
    hadamard
        Whether head vectors are rotated before they are rounded.
    """

    number: str
    per_channel: bool = False
    group: int | None = None
    hadamard: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether anything but the model's own numbers is stored."""
        return self.number != AUTO

    @property
    def numbers_of_group(self) -> int:
        """float16 numbers that belong to a group of elements, 0 where nothing is scaled."""
        return 0 if self.number == "fp8_e4m3" and self.group is None else NUMBERS[self.number][1]

    @property
    def token_group(self) -> int:
        """Tokens that are packed together, 1 where each is on its own."""
        return self.group or 1 if self.per_channel else 1

    def width(self, head_size: int) -> int:
        """Bytes of the codes of a head vector."""
        return head_size * NUMBERS[self.number][0] // 8

    def bytes(self, head_size: int, tokens: int, element_bytes: int) -> int:
        """Bytes of ``tokens`` head vectors; of a format per channel a whole number of groups.

        Parameters
        ----------
        head_size
            Elements of a vector.
        tokens
            Vectors.
        element_bytes
            Of the model's dtype.
        """
        if not self.is_packed:
            return tokens * head_size * element_bytes
        groups = (
            tokens // self.token_group * head_size
            if self.per_channel
            else tokens * head_size // self._elements(head_size)
        )
        return tokens * self.width(head_size) + groups * self.numbers_of_group * SCALE_BYTES

    def refused(self, head_size: int) -> str | None:
        """Why vectors of ``head_size`` cannot be stored so, ``None`` if they can."""
        if not self.is_packed:
            return None
        if self.number == "int4" and head_size % 2:
            return f"int4 stores two numbers a byte, and the head size {head_size} is odd"
        if not self.per_channel and head_size % self._elements(head_size):
            return f"group={self.group} does not divide the head size {head_size}"
        if self.hadamard and head_size & (head_size - 1):
            return f"hadamard needs a head size that is a power of two, and the model's is {head_size}"
        return None

    def _elements(self, head_size: int) -> int:
        return self.group or head_size

    def __str__(self) -> str:
        return _with(self, [])


@dataclass(frozen=True)
class CacheFormat:
    """How a cache stores keys and values.

    Parameters
    ----------
    keys, values
        The formats of both.
    residual
        Tokens of the residual window: a query sees so many tokens up to its own in the model's dtype.
    """

    keys: SideFormat
    values: SideFormat
    residual: int = 0

    @property
    def token_group(self) -> int:
        """Tokens that are packed together, 1 where each is on its own."""
        return max(self.keys.token_group, self.values.token_group)

    @property
    def is_mixed(self) -> bool:
        """Whether a query sees some tokens in the model's dtype."""
        return self.residual > 0 or self.token_group > 1

    def boundary(self, seen: int) -> int:
        """Tokens, from the first, that the query sees packed which is the last of ``seen`` tokens: whole groups alone."""
        return max(0, (seen - self.residual) // self.token_group) * self.token_group

    def layer_bytes(
        self, stored: int, seen: int, *, kv_heads: int, key_dim: int, value_dim: int, element_bytes: int
    ) -> int:
        """Bytes of a layer's keys and values of one sequence.

        Where every token is packed on its own, all stored tokens are, and the residual window holds copies in the model's
        dtype beside them; where groups of tokens are packed, those behind the last whole group are in the model's dtype.

        Parameters
        ----------
        stored
            Tokens that the layer holds.
        seen
            Tokens of the sequence; ``stored`` where nothing was removed.
        kv_heads, key_dim, value_dim
            Shape of the layer.
        element_bytes
            Of the model's dtype.
        """
        packed, plain = stored, min(self.residual, seen)
        if self.token_group > 1:
            packed = self.boundary(stored)
            plain = stored - packed
        sides = ((self.keys, key_dim), (self.values, value_dim))
        one = sum(side.bytes(width, packed, element_bytes) + plain * width * element_bytes for side, width in sides)
        return kv_heads * one

    def kv_bytes(self, of: ModelLayers, tokens_per_layer: Sequence[int], seen: int, element_bytes: int) -> int:
        """Bytes of the keys and values of one sequence of ``seen`` tokens where each layer holds so many of them.

        The counterpart of `ModelLayers.kv_bytes`: the one formula for what is stored, planned and predicted.
        """
        return sum(
            self.layer_bytes(
                tokens, seen, kv_heads=layer.kv_heads, key_dim=layer.key_dim, value_dim=layer.value_dim,
                element_bytes=element_bytes,
            )
            for layer, tokens in zip(of.layers, tokens_per_layer, strict=True)
            if layer.attention
        )  # fmt: skip

    def refused(self, key_dim: int, value_dim: int) -> str | None:
        """Why a layer of such head sizes cannot be stored so, ``None`` if it can."""
        return self.keys.refused(key_dim) or self.values.refused(value_dim)

    def __str__(self) -> str:
        """The name, the same for every way to write the format."""
        keys, values = self.keys, self.values
        if (keys.per_channel, values.per_channel) == (True, False) and replace(keys, per_channel=False) == values:
            return f"{_KIVI}{_with(values, [f'residual={self.residual}'])}"
        last = _with(values, [f"residual={self.residual}"] * (self.residual > 0))
        return last if keys == values else f"{keys}:{last}"

    @classmethod
    def parse(cls, typed: str) -> CacheFormat | None:
        """Read a format's name; ``None`` for ``auto``.

        Raises
        ------
        UserError
            For a number format, parameter or combination that there is not.
        """
        parts = typed.strip().split(":")
        if len(parts) > 2:
            raise _wrong(typed, "has more than keys and values")
        read = [_Side.read(typed, part.strip()) for part in parts]
        if len(read) == 2 and any(side.is_kivi for side in read):
            raise _wrong(typed, f"{_KIVI}... says both, keys per channel and values per token; leave the colon out")
        residuals = {side.residual for side in read if side.residual is not None}
        if len(residuals) > 1:
            raise _wrong(typed, "keys and values have one residual window; give residual once")
        keys, values = read[0].side, read[-1].side
        if read[0].is_kivi:
            keys = replace(keys, per_channel=True)
        found = cls(keys, values, max(residuals, default=0))
        groups = {side.token_group for side in (keys, values) if side.per_channel}
        if len(groups) > 1:
            raise _wrong(typed, "keys and values are packed together, so groups per channel must be equal")
        if not (keys.is_packed or values.is_packed):
            if found.residual:
                raise _wrong(typed, "auto has no residual window")
            return None
        return found


def _with(side: SideFormat, more: list[str]) -> str:
    given = [f"group={side.group}"] * (side.group is not None) + more
    inside = f"({','.join(given)})" if given else ""
    return f"{side.number}{_CHANNEL * side.per_channel}{inside}{_HADAMARD * side.hadamard}"


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

    def __str__(self) -> str:
        return f"{_HQQ}{self.bits}(group={self.group},residual={self.residual})"


@dataclass(frozen=True)
class EngineFormat:
    """A format that one engine alone has, by the name that it has there.

    Parameters
    ----------
    name
        One of `ENGINE_FORMATS`.
    """

    name: str

    @property
    def engine(self) -> str:
        """Which engine."""
        return ENGINE_FORMATS[self.name]

    def __str__(self) -> str:
        return self.name


#: what a case may ask for beside the model's own numbers
StoredFormat = CacheFormat | HqqFormat | EngineFormat


def parse_format(typed: str) -> StoredFormat | None:
    """Read a format's name, a foreign one included; ``None`` for ``auto``.

    Raises
    ------
    UserError
        For a number format, parameter or combination that there is not.
    """
    if typed.strip() in ENGINE_FORMATS:
        return EngineFormat(typed.strip())
    if not typed.strip().startswith(_HQQ):
        return CacheFormat.parse(_ALIASES.get(typed.strip(), typed))
    found = _SIDE.fullmatch(typed.strip())
    if found is None or found[1] not in (f"{_HQQ}4", f"{_HQQ}8") or found[3]:
        raise _wrong(
            typed, f"transformers' cache with hqq is {_HQQ}4 or {_HQQ}8, for keys and values alike, without rotation"
        )
    return HqqFormat(int(found[1].removeprefix(_HQQ)), **_parameters(typed, found[1], found[2]))


@dataclass(frozen=True)
class _Side:
    side: SideFormat
    residual: int | None = None
    is_kivi: bool = False

    @classmethod
    def read(cls, typed: str, part: str) -> _Side:
        found = _SIDE.fullmatch(part)
        if found is None:
            raise _wrong(typed, f"{visible(part, VALUE_LIMIT) or 'nothing'} is no format")
        word, inside, suffix = found[1], found[2], found[3]
        is_kivi, number = word.startswith(_KIVI), word.removeprefix(_KIVI)
        per_channel, number = (
            number.endswith(_CHANNEL) and not is_kivi,
            number.removesuffix("" if is_kivi else _CHANNEL),
        )
        if number not in NUMBERS and (word != AUTO):
            known = ", ".join((AUTO, *NUMBERS, f"int4{_CHANNEL}", f"{_KIVI}int4", *ENGINE_FORMATS))
            raise _wrong(typed, f"unknown format {word}; use {known}")
        if suffix not in (None, _HADAMARD):
            raise _wrong(typed, f"{suffix} is nothing that a format can have; use {_HADAMARD}, or leave it out")
        given = _parameters(typed, word, inside)
        if word == AUTO and (given.keys() - {"residual"} or suffix):
            raise _wrong(typed, "auto stores the model's own numbers, without groups and rotation")
        group = given.get("group")
        if group is None and (per_channel or is_kivi):
            group = _KIVI_GROUP
        if per_channel and group == 1:
            raise _wrong(typed, "a group per channel of one token is no group; use 2 or more")
        residual = given.get("residual", _KIVI_RESIDUAL if is_kivi else None)
        return cls(SideFormat(number, per_channel, group, suffix is not None), residual, is_kivi)


def _parameters(typed: str, word: str, inside: str | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in outside_brackets(inside or ""):
        if not part.strip():
            continue
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in ("group", "residual"):
            raise _wrong(typed, f"{word} has no parameter {name}; it has group, residual")
        if name in found:
            raise _wrong(typed, f"{name} is given twice")
        try:
            found[name] = whole(text, 1 if name == "group" else 0, MOST_TOKENS)
        except ValueError as error:
            raise _wrong(typed, f"{name}={text}: {error}") from None
    return found


def _wrong(typed: str, what: str) -> UserError:
    shown = visible(typed, VALUE_LIMIT)
    return UserError(f"--kv-cache-dtype={shown}: {what}; for example --kv-cache-dtype=auto,int8,'int8:int4(group=32)'")


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
        return name if self.format is None else f"{name}{between}{self.format}"


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
    if isinstance(chosen.format, CacheFormat) and chosen.format.residual >= tokens:
        raise UserError(
            f"--kv-cache-dtype={chosen.format}: the residual window of {chosen.format.residual} tokens is no shorter than "
            f"the text of {tokens} ({option}), of which nothing would be packed; lower residual or give a longer text"
        )
