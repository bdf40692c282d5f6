"""The driver's energy counter: joules over a block on CUDA, and the reason why there are none elsewhere."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvsuite.meters import energy
from kvsuite.meters.energy import Energy, EnergyMeter


class Driver:
    """NVML whose counter goes up by 250 W, by a clock that the test moves."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self) -> None:
        self.now, self.asked = 0.0, []
        self.refuses = False

    def nvmlInit(self) -> None:
        pass

    nvmlShutdown = nvmlInit

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.refuses:
            raise self.NVMLError("Not Supported")
        return 7_000_000 + round(250_000 * self.now)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr(energy, "device_uuid", lambda device: f"GPU-of-{device}")
    monkeypatch.setattr(energy, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def over(meter: EnergyMeter, driver: Driver, seconds: float) -> Energy:
    meter.start()
    driver.now += seconds
    return meter.stop()


def test_joules_over_a_block(driver: Driver) -> None:
    found = over(EnergyMeter("cuda:1"), driver, 4.0)
    assert (found.joules, found.seconds, found.reason) == (pytest.approx(1000.0), 4.0, None)
    assert set(driver.asked) == {"GPU-of-cuda:1"}


def test_a_block_that_the_counter_does_not_resolve_has_no_number(driver: Driver) -> None:
    found = over(EnergyMeter("cuda"), driver, 0.25)
    assert found.joules is None
    assert found.reason is not None
    assert "0.25 s were measured" in found.reason
    assert "--kv-rounds" in found.reason


def test_a_device_that_does_not_count_says_so(driver: Driver) -> None:
    driver.refuses = True
    found = over(EnergyMeter("cuda"), driver, 4.0)
    assert (found.joules, found.reason) == (None, "NVML: Not Supported")


def test_no_library_no_number(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = over(EnergyMeter("cuda"), driver, 4.0)
    assert (found.joules, found.reason) == (None, "nvidia-ml-py is missing: pip install nvidia-ml-py")


@pytest.mark.parametrize("device", ["cpu", "mps", "metal"])
def test_other_devices_are_not_asked(device: str, driver: Driver) -> None:
    found = over(EnergyMeter(device), driver, 4.0)
    assert (found.joules, found.reason) == (None, f"NVML knows no {device} device")
    assert not driver.asked


def test_a_device_that_is_not_there_is_a_reason(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: str) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr("torch.cuda.synchronize", refuse)
    found = over(EnergyMeter("cuda"), driver, 4.0)
    assert (found.joules, found.reason) == (None, "Torch not compiled with CUDA enabled")


@pytest.mark.gpu
def test_the_counter_of_a_real_device_goes_up() -> None:
    torch: Any = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("pynvml")
    meter = EnergyMeter("cuda:0")
    meter.start()
    one = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    begin = time.perf_counter()
    while time.perf_counter() - begin < 1.5:
        for _ in range(20):
            one @ one
        torch.cuda.synchronize()
    found = meter.stop()
    assert found.reason is None
    assert found.joules is not None
    # more than an idle card takes, and less than any takes
    assert 30 < found.joules / found.seconds < 2000
