"""A small model with trained-looking weights and a tokenizer, and how it is asked."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tiny_checkpoint import save_checkpoint

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.suites.retrieval.published.published_task import Asking

LONGEST = 700
DATA = Path(__file__).parents[3] / "data" / "published"


@functools.cache
def small_model() -> HfSession:
    """Tokens are bytes; prompts may have 700 of them."""
    folder = Path(tempfile.mkdtemp())
    try:
        checkpoint = save_checkpoint(folder / "tiny-llama")
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONGEST}))
        return HfSession(case(model=str(checkpoint)), EngineSettings(threads=1))
    finally:
        shutil.rmtree(folder)


def case(**changes: Any) -> Case:
    fields: dict[str, Any] = {
        "suite": "retrieval", "engine": "hf", "model": "small", "name": "case", "device": "cpu", "dtype": "float32",
        "workload": {"task": "a_task"},
    }  # fmt: skip
    return Case(**(fields | changes))


RECENT = {"policy": "recent_only", "policy_params": {"window": 40}}


def asking(*, full: bool = False, question_seen: bool = False, **changes: Any) -> Asking:
    return Asking(small_model(), case(**changes), full=full, question_seen=question_seen)
