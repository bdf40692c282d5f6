"""A number format of the cache by its name: ``int8:int4(group=32,residual=64)+hadamard``. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible
from kvsuite.options.numbers import MOST_TOKENS, whole
from kvsuite.options.option import outside_brackets

from .ggml_format import GGML_TYPES

#: the model's own dtype
AUTO = "auto"
#: bits of an element, and float16 numbers that a group has: its scale, or its scale and its least value
NUMBERS: dict[str, tuple[int, int]] = {"fp8_e4m3": (8, 1), "int8": (8, 1), "int4": (4, 2)}
SCALE_BYTES = 2
# what vLLM calls a format that has a name here
_ALIASES = {"fp8": "fp8_e4m3"}
_CHANNEL, _HADAMARD, _KIVI = "_channel", "+hadamard", "kivi_"
_KIVI_GROUP, _KIVI_RESIDUAL = 32, 128
#: a word, its parameters and what stands behind a plus
SIDE = re.compile(r"([\w.-]+)(?:\(([^()]*)\))?(\+\w+)?")


def undivided(group: int, head_size: int) -> str:
    """Why vectors of ``head_size`` are not cut into groups of ``group`` elements, and which groups they can have."""
    fits = max(size for size in range(1, min(group, head_size) + 1) if head_size % size == 0)
    return f"group={group} does not divide the head size {head_size}; group={fits} does"


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

    def columns(self, head_size: int) -> int:
        """float16 numbers of a head vector that is packed on its own."""
        return head_size // self._elements(head_size) * self.numbers_of_group

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
            return undivided(self._elements(head_size), head_size)
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

    def of_layers(self, layers: int) -> tuple[CacheFormat | None, ...]:
        """The format of each of ``layers`` layers, the same for all."""
        return (self,) * layers

    def refused(self, key_dim: int, value_dim: int) -> str | None:
        """Why a layer of such head sizes cannot be stored so, ``None`` if it can."""
        return self.keys.refused(key_dim) or self.values.refused(value_dim)

    @property
    def label(self) -> str:
        """What stands in names of cases and in tables."""
        return str(self)

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
            raise wrong_format(typed, "has more than keys and values")
        read = [_Side.read(typed, part.strip()) for part in parts]
        if len(read) == 2 and any(side.is_kivi for side in read):
            raise wrong_format(
                typed, f"{_KIVI}... says both, keys per channel and values per token; leave the colon out"
            )
        residuals = {side.residual for side in read if side.residual is not None}
        if len(residuals) > 1:
            raise wrong_format(typed, "keys and values have one residual window; give residual once")
        keys, values = read[0].side, read[-1].side
        if read[0].is_kivi:
            keys = replace(keys, per_channel=True)
        found = cls(keys, values, max(residuals, default=0))
        groups = {side.token_group for side in (keys, values) if side.per_channel}
        if len(groups) > 1:
            raise wrong_format(typed, "keys and values are packed together, so groups per channel must be equal")
        if not (keys.is_packed or values.is_packed):
            if found.residual:
                raise wrong_format(typed, "auto has no residual window")
            return None
        return found


def _with(side: SideFormat, more: list[str]) -> str:
    given = [f"group={side.group}"] * (side.group is not None) + more
    inside = f"({','.join(given)})" if given else ""
    return f"{side.number}{_CHANNEL * side.per_channel}{inside}{_HADAMARD * side.hadamard}"


@dataclass(frozen=True)
class _Side:
    side: SideFormat
    residual: int | None = None
    is_kivi: bool = False

    @classmethod
    def read(cls, typed: str, part: str) -> _Side:
        found = SIDE.fullmatch(part)
        if found is None:
            raise wrong_format(typed, f"{visible(part, VALUE_LIMIT) or 'nothing'} is no format")
        word, inside, suffix = _ALIASES.get(found[1], found[1]), found[2], found[3]
        is_kivi, number = word.startswith(_KIVI), word.removeprefix(_KIVI)
        per_channel, number = (
            number.endswith(_CHANNEL) and not is_kivi,
            number.removesuffix("" if is_kivi else _CHANNEL),
        )
        if number not in NUMBERS and (word != AUTO):
            known = ", ".join((AUTO, *NUMBERS, f"int4{_CHANNEL}", f"{_KIVI}int4"))
            raise wrong_format(
                typed, f"unknown format {word}; use {known}, or types of llama.cpp: {', '.join(GGML_TYPES)}"
            )
        if suffix not in (None, _HADAMARD):
            raise wrong_format(typed, f"{suffix} is nothing that a format can have; use {_HADAMARD}, or leave it out")
        given = parameters_of(typed, word, inside)
        if word == AUTO and (given.keys() - {"residual"} or suffix):
            raise wrong_format(typed, "auto stores the model's own numbers, without groups and rotation")
        group = given.get("group")
        if group is None and (per_channel or is_kivi):
            group = _KIVI_GROUP
        if per_channel and group == 1:
            raise wrong_format(typed, "a group per channel of one token is no group; use 2 or more")
        residual = given.get("residual", _KIVI_RESIDUAL if is_kivi else None)
        return cls(SideFormat(number, per_channel, group, suffix is not None), residual, is_kivi)


def parameters_of(typed: str, word: str, inside: str | None) -> dict[str, int]:
    """``group`` and ``residual`` of the word, as far as they are given in its parentheses.

    Raises
    ------
    UserError
        For another parameter, one that is given twice, or a value that it cannot have.
    """
    found: dict[str, int] = {}
    for part in outside_brackets(inside or ""):
        if not part.strip():
            continue
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in ("group", "residual"):
            raise wrong_format(typed, f"{word} has no parameter {name}; it has group, residual")
        if name in found:
            raise wrong_format(typed, f"{name} is given twice")
        try:
            found[name] = whole(text, 1 if name == "group" else 0, MOST_TOKENS)
        except ValueError as error:
            raise wrong_format(typed, f"{name}={text}: {error}") from None
    return found


def wrong_format(typed: str, what: str) -> UserError:
    """The error of a format's name that cannot be read."""
    shown = visible(typed, VALUE_LIMIT)
    return UserError(f"--kv-cache-dtype={shown}: {what}; for example --kv-cache-dtype=auto,int8,'int8:int4(group=32)'")
