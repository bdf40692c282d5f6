"""Bytes of a cache over the zoo: what an engine plans is what it stores, and what is predicted from the configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from zoo import ZOO, Architecture

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings, Session
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.results import ServeRequest
from kvsuite.memory_model.config import read_fields

SESSIONS: dict[str, type[Any]] = {"hf": HfSession, "nano": NanoSession}
#: of each kind of cache one, prompts past every window
NAMES = (
    "Llama", "Mistral, window", "Gemma 3", "Gemma 3n", "Llama 4", "DeepSeek V3", "Falcon, multi-query", "Falcon, new",
    "GPT-BigCode, multi-query", "GPT-Neo, local attention", "Qwen3-Next", "LFM2", "Jamba", "MiniMax",
)  # fmt: skip
PROMPT, NEW = list(b"a fleet of thirty ships lay before the town and waited for the tide"), 6


def rows() -> list[Any]:
    found = [each for each in ZOO if each.name in NAMES]
    return [
        pytest.param(engine, each, id=f"{engine}-{each.name}")
        for each in found
        for engine in SESSIONS
        if getattr(each, engine) is None
    ]


@pytest.mark.parametrize(("engine", "architecture"), rows())
def test_planned_predicted_and_stored_are_one_number(engine: str, architecture: Architecture, tmp_path: Path) -> None:
    folder = architecture.save(tmp_path)
    case = Case(
        suite="compression", engine=engine, model=str(folder), name="baseline", device="cpu", dtype="float32",
        workload={"prompt_tokens": len(PROMPT), "max_new_tokens": NEW},
    )  # fmt: skip
    session: Session = SESSIONS[engine](case, EngineSettings(threads=1))
    try:
        session.prepare(case)
        found = session.memory([ServeRequest(PROMPT, NEW)])
        # the last token is chosen and never fed
        held = len(PROMPT) + NEW - 1
        assert found.kv_bytes_decode == session.planned_kv_bytes(len(PROMPT), NEW) == session.full_kv_bytes(held)
        assert not [warning for warning in found.warnings if "kept alive" in warning or "were predicted" in warning]
        if engine == "hf":
            fields = json.loads((folder / "config.json").read_text())
            assert read_fields(fields, label="x", origin="x").kv_bytes(held, 4) == found.kv_bytes_decode
            # what layers without keys and values carry is told beside them
            states = {"Qwen3-Next", "LFM2", "Jamba", "MiniMax"}
            assert (found.reported.get("state_bytes", 0) > 0) == (architecture.name in states)
            assert bool([warning for warning in found.warnings if "carry states" in warning]) == bool(found.reported)
    finally:
        session.close()
