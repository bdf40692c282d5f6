"""The default model's own file: every cache type that the build has, its bytes, and perplexity beside transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

import pytest
from llamacpp_sessions import case_of, needs_library, session_of

from kvsuite.cache_formats.ggml_format import GGML_TYPES
from kvsuite.case import Case
from kvsuite.engines.llamacpp.session import LlamacppSession
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid

pytestmark = needs_library
PROMPT = list(range(300, 312))


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LlamacppSession]:
    found = session_of("smollm2")
    yield found
    found.close()


def in_format(name: str) -> Case:
    return case_of("smollm2", params={"kv_cache_dtype": name})


@pytest.mark.parametrize("name", [*GGML_TYPES, "q8_0:q4_0", "q4_0:q8_0", "f16:mxfp4"])
def test_every_type_is_taken_and_stores_what_the_formula_says(smollm2: LlamacppSession, name: str) -> None:
    smollm2.prepare(in_format(name))
    assert smollm2.effective["kv_cache_dtype"] == name
    found = smollm2.memory([ServeRequest(PROMPT, 3)])
    keys, _, values = name.partition(":")
    sides = [GGML_TYPES[side] for side in (keys, values or keys)]
    # 30 layers, 3 heads of 64 numbers
    token = sum(30 * 3 * 64 // block * size for block, size in sides)
    assert found.kv_bytes_prefill == 12 * token
    assert found.kv_bytes_decode == smollm2.planned_kv_bytes(12, 3) == 14 * token
    assert found.kv_bytes_allocated == 256 * token
    assert abs(found.reported["kv_bytes"] - 256 * token) <= 0.0051 * 2**20


def test_fewer_bits_move_the_logits_further(smollm2: LlamacppSession) -> None:
    losses = {}
    for name in ("f32", "f16", "q8_0", "q4_0", "q2_0"):
        smollm2.prepare(in_format(name))
        losses[name] = smollm2.score(PROMPT, "streaming-decode", 0).nll
    distance = [
        fmean(abs(a - b) for a, b in zip(losses[name], losses["f32"], strict=True))
        for name in ("f16", "q8_0", "q4_0", "q2_0")
    ]
    # flash attention reads f32 in f16
    assert 0 <= distance[0] < distance[1] < distance[2] < distance[3]


def test_values_in_few_bits_need_flash_attention() -> None:
    session = session_of("smollm2", flash_attention="off")
    try:
        with pytest.raises(CaseInvalid, match=r"makes no such cache: .*flash_attn.*--kv-flash-attention=on$"):
            session.prepare(in_format("q8_0"))
        session.prepare(in_format("q8_0:f16"))
        assert session.effective["flash_attention"] == "disabled"
    finally:
        session.close()


@pytest.mark.slow  # both models and 256 tokens: about ten seconds
def test_perplexity_is_that_of_transformers_on_the_same_weights(smollm2: LlamacppSession) -> None:
    from kvsuite.engines.engine import EngineSettings
    from kvsuite.engines.hf.engine import HfEngine
    from kvsuite.workloads.corpus import load_corpus

    case = case_of("smollm2", engine="hf")
    reference = HfEngine().load(case, EngineSettings(threads=1))
    reference.prepare(case)
    [text] = load_corpus("default", num_texts=1).texts
    tokens = list(smollm2.tokenizer(text)["input_ids"][:257])
    assert tokens == list(reference.tokenizer(text)["input_ids"][:257])
    smollm2.prepare(case_of("smollm2"))
    ours, theirs = (math.exp(fmean(one.score(tokens, "streaming-decode", 0).nll)) for one in (smollm2, reference))
    assert ours == pytest.approx(theirs, rel=3e-3)
    reference.close()
