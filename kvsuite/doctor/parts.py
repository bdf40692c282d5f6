"""Which engines and optional parts work here, and the line that would install what is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvsuite.entry_points import ENGINES, OURS, find, package
from kvsuite.errors import CaseSkipped, UserError
from kvsuite.kernel_builds import prepare_line
from kvsuite.options.devices import resolve_device

from .findings import Finding
from .packages import import_error, installed

if TYPE_CHECKING:
    from kvsuite.engines.engine import Engine

_NO_MLC = "not installed, and not on PyPI (packages of that name there are by strangers)"


def part_findings() -> list[Finding]:
    """A line for each engine and device, then for each optional part."""
    devices = here()
    return [
        Finding("Device", "ok", f"--kv-device=auto is {resolve_device('auto')}; here are {', '.join(devices)}"),
        *_engines(devices),
        _default_model(),
        _presses(),
        *_weight_formats(devices),
        _paged_attention(devices),
        *_partitions(devices),
        _mlc(),
        _tool("pytest-benchmark", "--benchmark-* options and its storage"),
        _tool("pytest-xdist", "several workers (-n)"),
    ]


def here() -> list[str]:
    """Devices that the installed torch can use."""
    import torch

    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _engines(devices: list[str]) -> Iterator[Finding]:
    from kvsuite.engines.registry import engine_names, get_engine

    kinds = dict.fromkeys(device.partition(":")[0] for device in devices)
    for name in engine_names():
        # what is ours and cannot even be asked is broken
        is_optional = package(find(ENGINES)[name]) != OURS
        try:
            engine = get_engine(name)
            is_optional = engine.is_optional
            reasons = {kind: engine.unavailable(kind if kind != "cuda" else "cuda:0") for kind in kinds}
        except Exception as error:  # the engine may be somebody else's
            shown = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            yield Finding(f"engine {name}", "attention" if is_optional else "broken", shown)
            continue
        works = [kind for kind, reason in reasons.items() if reason is None]
        if works:
            yield Finding(f"engine {name}", "ok", f"works on {', '.join(works)}{_versions(engine)}")
        else:
            reason = "; ".join(str(reason) for reason in reasons.values())
            yield Finding(f"engine {name}", "missing" if is_optional else "broken", *_split(reason))


def _versions(engine: Engine) -> str:
    try:
        found = ", ".join(f"{name} {version}" for name, version in engine.version().items())
    except Exception as error:  # the engine may be somebody else's
        found = f"its version is not known: {type(error).__name__}: {error}"
    return f": {found}" if found else ""


def _default_model() -> Finding:
    from kvsuite.models.smollm2 import NAME, converted_path, find_gguf

    try:
        find_gguf()
    except UserError as error:
        _, _, mend = str(error).partition("run: ")
        return Finding("default model", "missing", f"{NAME} is not installed; name another one with --kv-model", mend)
    if converted_path().is_dir():
        return Finding("default model", "ok", f"{NAME}, converted in {converted_path()}")
    return Finding(
        "default model", "ok", f"{NAME}; the first use converts it (about 20 s, 540 MB) into {converted_path()}"
    )


def _presses() -> Finding:
    from kvsuite.compression.kvpress.compat import load_kvpress

    return _tried("presses of kvpress", lambda: f"kvpress {load_kvpress() and installed('kvpress')}")


def _weight_formats(devices: list[str]) -> Iterator[Finding]:
    from kvsuite.quantization.registry import QUANTIZATIONS, unavailable

    # bitsandbytes is looked for there, not imported
    broken = import_error("bitsandbytes") if importlib.util.find_spec("bitsandbytes") else None
    for device in dict.fromkeys(device.partition(":")[0] for device in devices):
        reasons = {name: unavailable(name, device) for name in QUANTIZATIONS}
        if broken:
            reasons |= dict.fromkeys(("4bit", "8bit"), f"bitsandbytes cannot be imported: {broken}")
        works = [name for name, reason in reasons.items() if reason is None]
        yield Finding(f"weight formats, {device}", "ok", ", ".join(works))
        without: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            if reason is not None:
                without.setdefault(reason.removeprefix(name).strip(), []).append(name)
        for reason, names in without.items():
            shown, mend = _split(reason)
            yield Finding(
                ", ".join(names) if len(names) < 4 else f"{len(names)} formats, {device}", "missing", shown, mend
            )


def _paged_attention(devices: list[str]) -> Finding:
    part = "paged attention on CUDA"
    if not any(device.startswith("cuda") for device in devices):
        return Finding(part, "ok", "not needed: no CUDA device")

    if importlib.util.find_spec("triton") is None:
        return Finding(
            part, "attention", "triton is not installed: the exact reference attends, slowly", "pip install triton"
        )
    from kvsuite.nanovllm.flashinfer_libraries import flashinfer_module

    try:
        module, built = flashinfer_module(), _built_widths()
    except CaseSkipped as error:
        found, mend = _split(str(error))
        return Finding(part, "attention", f"by torch and Triton; faster with FlashInfer: {found}", mend)
    except Exception as error:  # a broken optional package may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Finding(part, "attention", f"by torch and Triton; FlashInfer does not work: {reason}")
    version = f"FlashInfer {getattr(module, '__version__', installed('flashinfer-python'))}"
    if not built:
        mend = prepare_line("MODEL", "auto", "bfloat16")
        return Finding(
            part, "attention", f"{version}, not built here: torch's kernels, which are slower, attend to prompts", mend
        )
    return Finding(part, "ok", f"{version}, built for bfloat16 heads of {', '.join(map(str, built))}")


def _built_widths() -> list[int]:
    """Widths of heads for which FlashInfer is built."""
    import torch

    from kvsuite.nanovllm.flashinfer_libraries import built_widths

    return built_widths(torch.cuda.get_device_capability())


def _partitions(devices: list[str]) -> Iterator[Finding]:
    """Whether lanes can own SMs, tried with the smallest pair, and who gives them."""
    import torch

    cuda = [device for device in devices if device.startswith("cuda")]
    if not cuda:
        yield Finding("SM partitions", "ok", "not needed: no CUDA device")
    for device in cuda:

        def load(device: str = device) -> str:
            from kvsuite.nanovllm.green_contexts import partition_available

            provider, passed_over = partition_available(torch.device(device))
            reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
            return f"by {provider}" + (f" (not by {reasons})" if reasons else "")

        yield _tried(f"SM partitions, {device}", load)


def _mlc() -> Finding:
    if importlib.util.find_spec("mlc_llm") is None:
        return Finding("MLC-LLM", "missing", _NO_MLC, "a wheel from https://mlc.ai/wheels for your device")
    error = import_error("mlc_llm")
    return Finding("MLC-LLM", "attention" if error else "ok", error or f"mlc_llm {installed('mlc-llm') or ''}".strip())


def _tool(name: str, use: str) -> Finding:
    version = installed(name)
    return Finding(name, "ok", version) if version else Finding(name, "missing", f"for {use}", f"pip install {name}")


def _tried(part: str, load: Callable[[], str]) -> Finding:
    try:
        return Finding(part, "ok", load())
    except CaseSkipped as error:
        return Finding(part, "missing", *_split(str(error)))
    except Exception as error:  # a broken optional package may raise anything
        return Finding(
            part, "attention", f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )


def _split(reason: str) -> tuple[str, str | None]:
    """A reason and the line in it that mends it."""
    place = reason.find("pip install")
    if place < 0:
        return reason, None
    return reason[:place].rstrip(" :;(").removesuffix("run").rstrip(" :;("), reason[place:].rstrip(") ")
