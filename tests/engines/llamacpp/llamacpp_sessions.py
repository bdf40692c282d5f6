"""Sessions of engine llamacpp for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_sessions import session as hf_session

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.llamacpp.engine import LlamacppEngine
from kvsuite.engines.llamacpp.library import missing_library
from kvsuite.engines.llamacpp.session import LlamacppSession
from kvsuite.options.resolve import default_options

needs_library = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))


def case_of(model: str = "dummy:tiny", **given: Any) -> Case:
    """A case of the compression suite, with more or other fields."""
    workload = {"protocol": "streaming-decode", "max_tokens": 48, "prompt_tokens": 24, "max_new_tokens": 8, "batch": 1}
    fields: dict[str, Any] = {
        "suite": "compression", "engine": "llamacpp", "model": model, "name": "one", "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return Case(**(fields | {"workload": workload | given.pop("workload", {})} | given))


def session_of(model: str = "dummy:tiny", cache_dir: Path | None = None, **options: str) -> LlamacppSession:
    """A loaded session with one thread; a dummy's weights are written in f32 unless options say otherwise."""
    engine = LlamacppEngine(default_options(**({"gguf_type": "f32"} | options)))
    return engine.load(case_of(model), EngineSettings(threads=1, cache_dir=cache_dir))


def widened_session(folder: Path) -> LlamacppSession:
    """The checkpoint of the other engine's tests, whose attention is not flat, written to ``folder``."""
    hf_session().decoder.model.save_pretrained(folder / "model")
    return session_of(str(folder / "model"), cache_dir=folder, flash_attention="off")
