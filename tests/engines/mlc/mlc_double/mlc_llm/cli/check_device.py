"""``python -m mlc_llm.cli.check_device KIND``: a machine with one CPU and one Vulkan device."""

import os
import sys
import time

if os.environ.get("MLC_DOUBLE") == "hang_device":
    time.sleep(600)
print("check_device:" + {"cpu": "0,1", "vulkan": "0"}.get(sys.argv[1], ""))
