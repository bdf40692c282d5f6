"""Times of the compression stage on CUDA: the device's, on whatever stream, and nobody waits for them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("events need a CUDA device", allow_module_level=True)

from kvsuite.nanovllm.request import Request  # noqa: E402
from kvsuite.nanovllm.stage_times import StageTimes  # noqa: E402

pytestmark = pytest.mark.gpu


def test_on_cuda_the_time_is_the_devices_and_nobody_waits_for_it() -> None:
    device = torch.device("cuda")
    side = torch.cuda.Stream(device)
    times, request = StageTimes(device), Request([5, 6], 2)
    matrix = torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()

    def work() -> None:
        for _ in range(20):
            matrix @ matrix

    end = torch.cuda.Event()
    with torch.cuda.stream(side):
        times(request, work)()
        end.record(side)
    # twenty products of 137 GFLOP: the host is far ahead
    assert not end.query()
    assert times.seconds()[request] > 20 * 2 * 4096**3 / 2e15
    end.synchronize()
