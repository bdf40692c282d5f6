"""Which streaming multiprocessors (SMs) of a GPU the decode lane and the prompt lane get: arithmetic alone.

A case asks for counts or for shares (`PartitionRequest`); on a device that becomes counts that its driver can really give
(`SmSplit`). Hardware partitions SMs in multiples that depend on the compute capability: the table is that of SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvsuite.errors import CaseInvalid, CaseSkipped

#: share of the prompt lane (the original's compression stream) where none is named
DEFAULT_PROMPT_RATIO = 0.25
#: the least share of the decode lane (the original's main stream) that is taken for what is left
LEAST_DECODE_RATIO = 0.05
#: major compute capability to the least SMs of a part and the multiple that it has to be of
_GRANULARITY = {6: (1, 1), 7: (2, 2), 8: (4, 2), 9: (8, 8)}


@dataclass(frozen=True, kw_only=True)
class PartitionRequest:
    """What a case asks for: counts of SMs, or shares of whatever device it runs on.

    Parameters
    ----------
    decode, prompt
        SMs of the two lanes as counts (``int``), or as shares in (0, 1] (``float``): both of one kind.
    decode_bound
        Whether the decode lane is held to its part. Off, as in the original's documented commands, it may use all SMs,
        those of the prompt lane included, and its own part decides nothing.
    """

    decode: int | float
    prompt: int | float
    decode_bound: bool = True

    def __post_init__(self) -> None:
        for value in (self.decode, self.prompt):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise CaseInvalid(f"partition {self.decode!r}:{self.prompt!r}: counts and shares of SMs are positive")
        if self.is_ratio and max(self.decode, self.prompt) > 1:
            raise CaseInvalid(f"partition {self.decode:g}:{self.prompt:g}: a share is at most 1")
        if self.is_ratio == isinstance(self.prompt, int):
            raise CaseInvalid(f"partition {self.decode!r}:{self.prompt!r}: give two counts or two shares of SMs")

    @property
    def is_ratio(self) -> bool:
        """Whether it names shares of the device."""
        return not isinstance(self.decode, int)

    @property
    def id(self) -> str:
        """A piece of a case id: ``sm64_64``, ``sm0.75_0.25``; ``sm96_32_free`` where the decode lane is not bound."""
        return f"sm{self.decode}_{self.prompt}" + ("" if self.decode_bound else "_free")

    def to_dict(self) -> dict[str, Any]:
        """`Case.partition`: JSON types; ``decode_bound`` stands in it only where it is off."""
        kind = "ratio" if self.is_ratio else "sms"
        found: dict[str, Any] = {f"decode_{kind}": self.decode, f"prompt_{kind}": self.prompt}
        return found if self.decode_bound else found | {"decode_bound": False}

    @classmethod
    def of(cls, partition: Mapping[str, Any]) -> PartitionRequest:
        """The request in `Case.partition`.

        Raises
        ------
        CaseInvalid
            If it names neither two counts nor two shares, or something else beside them.
        """
        bound = partition.get("decode_bound", True)
        for kind, number in (("sms", int), ("ratio", float)):
            names = (f"decode_{kind}", f"prompt_{kind}")
            if set(partition) - {"decode_bound"} == set(names):
                decode, prompt = (number(partition[name]) for name in names)
                return cls(decode=decode, prompt=prompt, decode_bound=bool(bound))
        raise CaseInvalid(
            f"partition {dict(partition)}: give decode_sms and prompt_sms, or decode_ratio and prompt_ratio"
        )


def requests(
    pairs: Iterable[tuple[int, int]] | None,
    prompt_ratios: Iterable[float] | None,
    decode_ratios: Iterable[float] | None,
    *,
    decode_bound: bool = True,
) -> list[PartitionRequest]:
    """The partitions that the options of the command line name, in their order, none twice.

    Parameters
    ----------
    pairs
        ``--kv-greenctx-sms``: decode and prompt SMs; wins over the shares.
    prompt_ratios, decode_ratios
        ``--kv-greenctx-compress-ratio`` and ``--kv-greenctx-main-ratio``. Left out, prompts get a quarter, and decoding
        what each of them leaves, 0.05 at least; given, the two lists are crossed.
    decode_bound
        ``--kv-greenctx-main-stream``.
    """
    if pairs:
        return [PartitionRequest(decode=d, prompt=p, decode_bound=decode_bound) for d, p in dict.fromkeys(pairs)]
    found = [
        PartitionRequest(decode=float(decode), prompt=float(prompt), decode_bound=decode_bound)
        for prompt in prompt_ratios or (DEFAULT_PROMPT_RATIO,)
        for decode in decode_ratios or (left_by(prompt),)
    ]
    return list(dict.fromkeys(found))


def left_by(prompt_ratio: float) -> float:
    """The decode lane's share beside a share of the prompt lane: what is left, 0.05 at least."""
    return max(LEAST_DECODE_RATIO, round(1 - prompt_ratio, 10))


@dataclass(frozen=True, kw_only=True)
class SmSplit:
    """Counts that a device can give.

    Parameters
    ----------
    requested
        SMs of decode and prompt lane before rounding.
    decode_sms, prompt_sms
        Rounded to what the hardware partitions by. Without ``decode_bound`` the decode lane has all SMs of the device.
    total
        SMs of the device.
    decode_bound
        See `PartitionRequest`.
    """

    requested: tuple[int, int]
    decode_sms: int
    prompt_sms: int
    total: int
    decode_bound: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON types, for a record."""
        return {
            "requested_sms": list(self.requested),
            "decode_sms": self.decode_sms,
            "prompt_sms": self.prompt_sms,
            "device_sms": self.total,
            "decode_bound": self.decode_bound,
        }


def granularity(capability: tuple[int, int]) -> tuple[int, int]:
    """Least SMs of a part, and the multiple it has to be of, by compute capability.

    Raises
    ------
    CaseSkipped
        If they are not known for it.
    """
    try:
        return _GRANULARITY[capability[0]]
    except KeyError:
        raise CaseSkipped(
            f"SM partition: the multiples of compute capability {capability[0]}.{capability[1]} are not known"
        ) from None


def split(request: PartitionRequest, *, total: int, capability: tuple[int, int]) -> SmSplit:
    """The counts that a device gives for a request.

    Shares become ``max(1, int(total * share))``; where both do not fit, the decode lane gives way first. They are rounded
    down to the hardware's multiple. Counts are taken as they are, and refused if they are no multiples.

    Parameters
    ----------
    request
        What the case asks for.
    total
        SMs of the device.
    capability
        Its compute capability, ``(9, 0)``.

    Raises
    ------
    CaseInvalid
        If the device cannot be parted so; the legal pairs nearest to it are named.
    CaseSkipped
        If the multiples of this compute capability are not known.
    """
    least, multiple = granularity(capability)
    if request.is_ratio:
        wanted = _counts(request, total)
        rounded = (wanted[0] // multiple * multiple, wanted[1] // multiple * multiple)
    else:
        wanted = rounded = (int(request.decode), int(request.prompt))
    own = rounded if request.decode_bound else rounded[1:]
    if not all(_is_legal(count, least, multiple) for count in own) or sum(own) > total:
        raise CaseInvalid(_refusal(request, wanted, total, capability))
    return SmSplit(
        requested=wanted,
        decode_sms=rounded[0] if request.decode_bound else total,
        prompt_sms=rounded[1],
        total=total,
        decode_bound=request.decode_bound,
    )


def nearest(
    wanted: tuple[int, int], *, total: int, capability: tuple[int, int], count: int = 2
) -> list[tuple[int, int]]:
    """Legal pairs of a device by their distance (sum of both differences) from one that may be illegal."""
    least, multiple = granularity(capability)
    first = -(-least // multiple) * multiple
    legal = range(first, total + 1, multiple)
    pairs = [(decode, prompt) for decode in legal for prompt in legal if decode + prompt <= total]
    distance = {pair: abs(pair[0] - wanted[0]) + abs(pair[1] - wanted[1]) for pair in pairs}
    return sorted(pairs, key=lambda pair: (distance[pair], -sum(pair), pair))[:count]


def _counts(request: PartitionRequest, total: int) -> tuple[int, int]:
    """SMs before rounding: the decode lane shrinks first, then the prompt lane."""
    prompt = max(1, int(total * request.prompt))
    decode = max(1, int(total * request.decode))
    if request.decode_bound and decode + prompt > total:
        decode = max(1, total - prompt)
        prompt = min(prompt, total - decode)
    return decode, prompt


def _is_legal(count: int, least: int, multiple: int) -> bool:
    return count >= least and count % multiple == 0


def _refusal(request: PartitionRequest, wanted: tuple[int, int], total: int, capability: tuple[int, int]) -> str:
    least, multiple = granularity(capability)
    near = " or ".join(f"{decode}:{prompt}" for decode, prompt in nearest(wanted, total=total, capability=capability))
    named = f"{request.decode:g}:{request.prompt:g}"
    asked = f"{named} ({wanted[0]}:{wanted[1]} SMs)" if request.is_ratio else named
    return (
        f"SM partition {asked}: parts of this device ({total} SMs, compute capability {capability[0]}.{capability[1]}) "
        f"are multiples of {multiple}, {least} at least, {total} together at most; nearest: {near or 'none'}"
    )
