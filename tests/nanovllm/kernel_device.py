"""Where tests of Triton kernels run: on CUDA, or on the CPU by its interpreter. Elsewhere whatever imports this is skipped.

Import it before anything that needs triton.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("the kernels need a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
