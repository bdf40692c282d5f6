"""``python -m kvsuite.meters.nvml_sampler UUID HZ``: print used bytes at the start and their peak when stdin closes."""

from __future__ import annotations

import select
import sys


def main(uuid: str, hz: int) -> None:
    """Sample until standard input closes."""
    try:
        import pynvml
    except ImportError:
        print("nvidia-ml-py is missing: pip install nvidia-ml-py", flush=True)
        return
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        peak = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError as error:
        print(f"{error} (device {uuid})", flush=True)
        return
    print(peak, flush=True)
    while not select.select([sys.stdin], [], [], 1 / hz)[0]:
        peak = max(peak, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))
    print(max(peak, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
