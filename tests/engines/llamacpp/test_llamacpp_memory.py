"""Predicted memory beside what llama.cpp allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
from llamacpp_sessions import case_of, needs_library, session_of
from test_write_gguf import made

from kvsuite.cache_formats.ggml_format import GgmlFormat
from kvsuite.case import Case
from kvsuite.engines.llamacpp.context import BatchToken, Context, ContextSettings
from kvsuite.engines.llamacpp.engine import LlamacppEngine
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.config import architecture_of
from kvsuite.memory_model.design_point import DesignPoint
from kvsuite.memory_model.prediction import Prediction
from kvsuite.options.resolve import default_options


def predicted(engine: LlamacppEngine, case: Case, *, context: int, batch: int) -> Prediction:
    return engine.memory_model(architecture_of(case.model), case).predict(DesignPoint("none", context, 512, batch))


def bytes_of(found: Prediction, name: str) -> float | None:
    return next(one.bytes for one in found.terms if one.name == name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    made("qwen3", tie_word_embeddings=True, head_dim=64).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@needs_library
@pytest.mark.parametrize(("name", "context", "batch"), [("f32", 300, 1), ("bf16:f16", 200, 3), ("q8_0:q4_0", 256, 2)])
def test_predicted_bytes_are_what_full_cells_hold(checkpoint: Path, name: str, context: int, batch: int) -> None:
    case = case_of(str(checkpoint), params={"kv_cache_dtype": name})
    keys, _, values = name.partition(":")
    found = predicted(LlamacppEngine(), case, context=context, batch=batch)
    session = session_of(str(checkpoint), cache_dir=checkpoint.parent)
    settings = ContextSettings(
        tokens=context, sequences=batch, batch=512, micro_batch=512, format=GgmlFormat(keys, values or keys), threads=1
    )
    real = Context(session._model, session._of, settings)
    # llama.cpp refuses the first token for which nothing is allocated, and tells the bytes of all before it
    for sequence in range(batch):
        real.decode([BatchToken(7, at, sequence) for at in range(settings.cells)])
    with pytest.raises(CaseInvalid, match="has no room"):
        real.decode([BatchToken(7, settings.cells, 0)])
    assert found.allocation is not None
    assert found.allocation.bytes == sum(real.stored_bytes(one, settings.cells) for one in range(batch))
    rounding = 0.0051 * 2**20
    assert abs(real.buffers["KV"] - found.allocation.bytes) <= rounding
    assert abs(real.buffers["output"] - (bytes_of(found, "logits") or 0)) <= rounding
    real.close()
    assert (
        session.memory_model(architecture_of(case.model)).predict(found.point).part("parameters")
        == (session.model["weights_bytes"])
    )
    session.close()


@needs_library
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_weights_are_those_of_the_file_that_is_written(checkpoint: Path, kind: str) -> None:
    engine, case = LlamacppEngine(default_options(gguf_type=kind)), case_of(str(checkpoint))
    session = session_of(str(checkpoint), cache_dir=checkpoint.parent, gguf_type=kind)
    assert predicted(engine, case, context=256, batch=1).part("parameters") == session.model["weights_bytes"]
    session.close()


def test_what_is_not_known_has_its_reason() -> None:
    found = predicted(LlamacppEngine(), case_of("smollm2"), context=4096, batch=8)
    assert found.part("parameters") is None
    assert found.needed is None
    # 4096 tokens of 8 sequences, 30 layers of 3 heads of 64 in f16
    assert found.part("kv_cache") == 8 * 4096 * 30 * 3 * 2 * 64 * 2
    assert any("compute_bytes" in reason for reason in found.reasons)
    unpacked = predicted(LlamacppEngine(), case_of(params={"kv_cache_dtype": "q8_0"}), context=256, batch=1)
    assert unpacked.allocation is None
    assert any("head size 16" in reason for reason in unpacked.reasons)
    given = {"model": "HF://mlc-ai/Llama-3-8B-Instruct-q0f16-MLC"}
    with pytest.raises(UserError, match=r"^--model=HF.*: MLC weights, which llamacpp cannot load; use --engine mlc"):
        LlamacppEngine().predictor(architecture_of(given["model"]), given)
