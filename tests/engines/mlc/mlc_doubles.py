"""The stand-in for mlc_llm (`mlc_double`) as an installation, and small models for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvsuite.options.resolve import Options, default_options

DOUBLE = Path(__file__).with_name("mlc_double")


@contextmanager
def mlc_double(log: Path | None = None) -> Iterator[pytest.MonkeyPatch]:
    """Let processes that are started from here find the stand-in; ``MLC_DOUBLE`` of the patch chooses a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(DOUBLE), prepend=":")
        if log is not None:
            patch.setenv("MLC_DOUBLE_LOG", str(log))
        yield patch


def options(**given: str) -> Options:
    """Options with engine `mlc` on the stand-in."""
    return default_options(**({"mlc_python": sys.executable, "mlc_timeout": "60", "mlc_compile_timeout": "60"} | given))


def commands(log: Path, name: str = "") -> list[list[str]]:
    """Command lines of the stand-in, without the process id; of one command where it is named."""
    lines = [json.loads(line)[1:] for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if not name or line[0] == name]


def mistral(folder: Path, **fields: Any) -> Path:
    """A folder with the configuration of a small Mistral; the stand-in reads no weights."""
    config = {
        "model_type": "mistral", "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "sliding_window": None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder
