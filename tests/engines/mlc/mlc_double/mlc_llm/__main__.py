"""``python -m mlc_llm gen_config | convert_weight | compile | serve``."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from mlc_llm import serving

FAULT = os.environ.get("MLC_DOUBLE", "")
# families whose configuration has a window
WINDOWED = ("mistral",)


def gen_config(given: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    for name in ("--quantization", "--conv-template", "--output"):
        parser.add_argument(name, required=True)
    for name in ("context-window", "prefill-chunk", "sliding-window", "attention-sink"):
        parser.add_argument(f"--{name}-size", type=int)
    parser.add_argument("--max-batch-size", type=int)
    asked = parser.parse_args(given)
    source = json.loads((asked.config / "config.json").read_text())
    context = asked.context_window_size or source["max_position_embeddings"]
    chunk = min(asked.prefill_chunk_size or 8192, context)
    windowed = source["model_type"] in WINDOWED
    window = (asked.sliding_window_size or -1) if windowed else -1
    top = {
        "context_window_size": context,
        "prefill_chunk_size": chunk,
        "sliding_window_size": window,
        "attention_sink_size": asked.attention_sink_size if windowed else -1,
    }
    inner = source | {
        "context_window_size": context,
        "prefill_chunk_size": chunk,
        "max_batch_size": asked.max_batch_size,
    }
    # as the real one: what is not under this name is the default
    inner["position_embedding_base"] = source.get("rope_theta", 10000)
    if windowed:
        inner |= {"sliding_window_size": window, "attention_sink_size": asked.attention_sink_size}
    config = {"model_type": source["model_type"], "quantization": asked.quantization, "model_config": inner, **top}
    output = Path(asked.output)
    (output / "mlc-chat-config.json").write_text(json.dumps(config))
    (output / "tokenizer.json").write_text("{}")


def convert_weight(given: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    for name in ("--quantization", "--device", "--output"):
        parser.add_argument(name, required=True)
    asked = parser.parse_args(given)
    output = Path(asked.output)
    (output / "params_shard_0.bin").write_bytes(bytes(1000))
    (output / "tensor-cache.json").write_text(
        json.dumps({"records": [{"nbytes": 1000, "dataPath": "params_shard_0.bin"}]})
    )


def compile_library(given: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    for name in ("--device", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--opt", default="O2")
    asked = parser.parse_args(given)
    if FAULT == "hang_compile":
        time.sleep(600)
    if FAULT == "fail_compile":
        sys.exit("ValueError: Cannot find target for device")
    Path(asked.output).write_text(asked.config.read_text())


COMMANDS = {
    "gen_config": gen_config,
    "convert_weight": convert_weight,
    "compile": compile_library,
    "serve": serving.serve,
}

if __name__ == "__main__":
    if "MLC_DOUBLE_LOG" in os.environ:
        with open(os.environ["MLC_DOUBLE_LOG"], "a") as log:
            log.write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\n")
    COMMANDS[sys.argv[1]](sys.argv[2:])
