"""NVIDIA devices as the driver reports them: clocks, power, temperature, why a clock is held down, who else is there."""

from __future__ import annotations

from typing import Any

from .findings import Finding

GIB = 2**30
# nvmlClocksEventReasons; idle and a clock set by its user slow nothing down that is measured
_REASONS = {
    0x1: "idle",
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
_HARMLESS = 0x1 | 0x2 | 0x100


def gpu_facts() -> tuple[list[dict[str, Any]], Finding | None]:
    """Facts of every device, and why there are none: no driver, or no library to ask it with."""
    try:
        import pynvml
    except ImportError:
        return [], Finding("NVML", "missing", "the driver cannot be asked about GPUs", 'pip install "kvsuite[gpu]"')
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], Finding("NVML", "ok", f"no NVIDIA driver here ({error})")
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return [_device(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())], None
    except pynvml.NVMLError as error:
        return [], Finding("NVML", "attention", f"the driver does not answer: {error}")
    finally:
        pynvml.nvmlShutdown()


def gpu_findings(gpus: list[dict[str, Any]]) -> list[Finding]:
    """A line for each device; it asks for attention where a clock is held down or someone else computes on it."""
    found = []
    for gpu in gpus:
        held, others = gpu["held_down_by"], gpu["processes"]
        clock = _of(gpu["sm_clock_mhz"], gpu["sm_clock_max_mhz"], "MHz")
        memory = _of(_gib(gpu["memory_used_bytes"]), _gib(gpu["memory_bytes"]), "GiB")
        state = (
            f"{gpu['name']}, driver {gpu['driver']}, {memory} used, "
            f"SM clock {clock}, {_of(gpu['power_w'], gpu['power_limit_w'], 'W')}, {gpu['temperature_c']} °C"
        )
        if held:
            state += f"; clocks held down: {', '.join(held)}"
        if others:
            state += f"; {others} other {'process computes' if others == 1 else 'processes compute'} here"
        mend = "times measured now say little; wait, cool it or free it" if held or others else None
        found.append(Finding(f"GPU {gpu['index']}", "attention" if mend else "ok", state, mend))
    return found


def held_down(reasons: int) -> list[str]:
    """Names of the bits of NVML's clock event reasons that slow a measurement down."""
    known = [name for bit, name in _REASONS.items() if reasons & bit & ~_HARMLESS]
    unknown = reasons & ~sum(_REASONS)
    return known + ([f"unknown reason {unknown:#x}"] if unknown else [])


def _device(pynvml: Any, index: int, driver: str) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = _asked(pynvml, lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    reasons = _asked(pynvml, lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    return {
        "index": index,
        "name": _text(pynvml.nvmlDeviceGetName(handle)),
        "driver": driver,
        "memory_bytes": None if memory is None else int(memory.total),
        "memory_used_bytes": None if memory is None else int(memory.used),
        "sm_clock_mhz": _asked(pynvml, lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "sm_clock_max_mhz": _asked(pynvml, lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "memory_clock_mhz": _asked(pynvml, lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        "power_w": _asked(pynvml, lambda: round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)),
        "power_limit_w": _asked(pynvml, lambda: round(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)),
        "temperature_c": _asked(
            pynvml, lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        ),
        "held_down_by": None if reasons is None else held_down(int(reasons)),
        "processes": _asked(pynvml, lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))),
    }  # fmt: skip


def _asked(pynvml: Any, query: Any) -> Any:
    # not every card and container answers every question; "?" says so
    try:
        return query()
    except (pynvml.NVMLError, AttributeError):
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _gib(size: int | None) -> str | None:
    return None if size is None else f"{size / GIB:.1f}"


def _of(part: Any, whole: Any, unit: str) -> str:
    return f"{'?' if part is None else part} of {'?' if whole is None else whole} {unit}"
