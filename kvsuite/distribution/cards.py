"""Cards that workers may have: their memory, their bandwidth, and what the driver calls them."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.errors import UserError
from kvsuite.meters.environment import host_facts
from kvsuite.options.nodes import NodesText

_MIB, _TB = 1 << 20, 1e12
#: the card that the model's speed of ``cuda`` is of
REFERENCE = "H100"
#: this machine's CPU, for sweeps without GPUs
CPU = "cpu"


@dataclass(frozen=True)
class GpuCard:
    """A device that a worker has for itself.

    Parameters
    ----------
    name
        As it is typed.
    memory_bytes
        Of it, ``None`` where that is not known.
    bandwidth
        Bytes a second that its memory is specified with; ``None`` for the CPU, which only its own records tell of.
    devices
        Names by which the driver knows it.
    """

    name: str
    memory_bytes: int | None
    bandwidth: float | None
    devices: tuple[str, ...] = ()


def _card(name: str, memory_mib: int, tb_s: float, *devices: str) -> GpuCard:
    return GpuCard(name, memory_mib * _MIB, tb_s * _TB, tuple(f"NVIDIA {device}" for device in devices))


# memory as the driver reports it, bandwidth as the data sheets have it
KNOWN_CARDS = (
    _card("B200", 183359, 8.0, "B200"),
    _card("GH200", 97871, 4.0, "GH200 480GB"),
    _card("H200", 143771, 4.8, "H200"),
    _card("H100", 81559, 3.35, "H100 80GB HBM3"),
    _card("H100-NVL", 95830, 3.9, "H100 NVL"),
    _card("H100-PCIe", 81559, 2.0, "H100 PCIe"),
    _card("A100", 81920, 2.039, "A100-SXM4-80GB"),
    _card("A100-PCIe", 81920, 1.935, "A100 80GB PCIe"),
    _card("A100-40GB", 40960, 1.555, "A100-SXM4-40GB", "A100-PCIE-40GB"),
    _card("L40S", 46068, 0.864, "L40S"),
    _card("L40", 46068, 0.864, "L40"),
    _card("L4", 23034, 0.3, "L4"),
    _card("A40", 46068, 0.696, "A40"),
    _card("A10", 23028, 0.6, "A10"),
    _card("A10G", 23028, 0.6, "A10G"),
    _card("T4", 15360, 0.32, "Tesla T4", "T4"),
    _card("RTX5090", 32607, 1.792, "GeForce RTX 5090"),
    _card("RTX4090", 24564, 1.008, "GeForce RTX 4090"),
    _card("RTX3090", 24576, 0.936, "GeForce RTX 3090"),
    _card("RTX6000Ada", 49140, 0.96, "RTX 6000 Ada Generation"),
    _card("A6000", 49140, 0.768, "RTX A6000"),
)
_BY_NAME = {card.name.lower(): card for card in KNOWN_CARDS}


@dataclass(frozen=True)
class Workers:
    """Some workers that have such a card each."""

    count: int
    card: GpuCard


def workers_of(text: str, device_kind: str) -> tuple[Workers, ...]:
    """The workers that ``--kv-nodes`` names.

    Parameters
    ----------
    text
        As typed.
    device_kind
        Of the cases: ``cpu`` or ``cuda``.

    Raises
    ------
    UserError
        If a card is not known, or is no device of that kind.
    """
    found = tuple(Workers(one.count, _known(one, text)) for one in NodesText.parse_all(text))
    for each in found:
        if (each.card.name == CPU) != (device_kind == "cpu"):
            needed = "--kv-device=cpu" if each.card.name == CPU else "--kv-device=cuda"
            raise UserError(
                f"--kv-nodes={text}: {each.card.name} is no {device_kind}, which the cases ask for; give {needed}"
            )
    return found


def _known(one: NodesText, text: str) -> GpuCard:
    if one.card.lower() == CPU:
        if one.bandwidth is not None:
            raise UserError(
                f"--kv-nodes={text}: {one.card} is this machine's, with its memory and the times of its own records; give "
                f"{one.count}x{CPU}"
            )
        return this_cpu()
    if one.bandwidth is not None:
        return GpuCard(one.card, one.memory_bytes, one.bandwidth, (one.card, f"NVIDIA {one.card}"))
    card = _BY_NAME.get(one.card.lower())
    if card is None:
        raise UserError(
            f"--kv-nodes={text}: {one.card} is not known; give its memory and bandwidth, such as "
            f"{one.count}x{one.card}:24GiB:300GB/s, or one of {', '.join(each.name for each in KNOWN_CARDS)}, {CPU}"
        )
    return card


def this_cpu() -> GpuCard:
    """This machine's CPU."""
    return GpuCard(CPU, host_facts()["host"]["ram_bytes"], None)
