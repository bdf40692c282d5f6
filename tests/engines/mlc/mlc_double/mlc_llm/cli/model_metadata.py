"""``python -m mlc_llm.cli.model_metadata LIBRARY``."""

import json
import sys
from pathlib import Path

config = json.loads(Path(sys.argv[1]).read_text())
print("[2026-11-21 20:00:00] INFO of a logger")
usage = {
    "batch_decode": 30 * config["model_config"]["max_batch_size"],
    "batch_prefill": 1000 * config["prefill_chunk_size"],
}
print(json.dumps({"quantization": config["quantization"], "memory_usage": usage, "params": [{"name": "x"}]}, indent=2))
