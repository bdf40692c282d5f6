"""All checks, in the order in which one explains the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .findings import Diagnosis, Finding
from .gpus import gpu_facts, gpu_findings
from .machine import machine_findings
from .noise import Noise, self_test
from .packages import package_findings


def diagnose(
    report_dir: Path, *, seconds: float | None = 5.0, say: Callable[[str], None] = lambda line: None
) -> Diagnosis:
    """Look at everything.

    Parameters
    ----------
    report_dir
        Where runs would go.
    seconds
        Length of the self-test of each device, ``None`` to leave it out.
    say
        Told what is going on.
    """
    say("looking at the machine")
    gpus, why = gpu_facts()
    sections: dict[str, list[Finding]] = {"Machine": machine_findings(report_dir)}
    sections["GPUs"] = gpu_findings(gpus) + ([why] if why else [])
    say("importing packages")
    sections["Packages"] = package_findings()
    noise: dict[str, Noise] = {}
    if any(finding.part == "torch" and finding.state == "broken" for finding in sections["Packages"]):
        return Diagnosis(sections, gpus)
    from .parts import here, part_findings

    say("trying engines and optional parts")
    sections["Engines and parts"] = part_findings()
    if seconds is not None:
        for device in here():
            if device == "mps":
                continue
            say(f"self-test of {device}, {seconds:g} s")
            try:
                noise[device] = self_test(device, seconds)
            except Exception as error:  # of a device that is full, or broken
                sections.setdefault("Self-test", []).append(_failed(device, error))
        loaded, why = gpu_facts()
        if len(loaded) == len(gpus):
            # clocks and throttling show under load; whoever computes there now may be the self-test
            gpus = [now | {"processes": before["processes"]} for before, now in zip(gpus, loaded, strict=True)]
        sections["GPUs"] = gpu_findings(gpus) + ([why] if why else [])
    return Diagnosis(sections, gpus, noise)


def _failed(device: str, error: Exception) -> Finding:
    return Finding(
        device,
        "attention",
        f"its noise is not known: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
        "free the device, or leave the self-test out with --no-self-test",
    )
