"""Every press of kvpress, one line each: what it declares is what it does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from kvsuite.compression.kvpress.adapter import KvpressMethod
from kvsuite.compression.kvpress.compat import load_kvpress
from kvsuite.compression.kvpress.table import PRESSES
from kvsuite.errors import CaseInvalid, CaseSkipped

try:
    kvpress = load_kvpress()
except CaseSkipped as reason:
    pytest.skip(str(reason), allow_module_level=True)

from kvpress_cases import (
    FULL_BYTES,
    LAYERS,
    PROMPT,
    STEPS,
    VOCAB,
    full_logits,
    model,
    plain_forward,
    run,
    seen_cache,
    tokens,
)


class Row(NamedTuple):
    """At keep ratio 0.5: tokens stored per layer after the prompt, fraction masked, tokens stored 8 steps later."""

    name: str
    stored: int | list[int] = 256
    masked: float = 0.0
    after: int | list[int] | None = None
    params: Mapping[str, Any] = MappingProxyType({})
    # where scores nearly tie between layers or chunks, another CPU may place some tokens elsewhere
    slack: int = 0


EVERY_4 = {"compression_interval": 4}
ROWS = [
    Row("CUR"),
    Row("Cap"),
    Row("Compactor"),
    Row("ExpectedAttention"),
    Row("KeyDiff"),
    Row("Knorm"),
    Row("LagKV"),
    Row("LeverageScore"),
    Row("NonCausalAttn"),
    Row("ObservedAttention"),
    Row("PyramidKV", [448, 320, 192, 64]),
    Row("Random"),
    Row("SnapKV"),
    Row("StreamingLLM"),
    Row("TOVA"),
    Row("Block"),
    Row("Chunk"),
    # 13 of 26 chunks of 20 tokens, one of which may be the last with 12
    Row("ChunkKV", 252, slack=8),
    Row("EntropyGatedChunkKV"),
    Row("CriticalKV"),
    Row("KeyRerotation"),
    Row("Merging"),
    Row("PerLayerCompression", [384, 298, 213, 128]),
    Row("Composed"),
    Row("AdaKV", PROMPT, 0.5),
    Row("CriticalAdaKV", PROMPT, 0.5),
    Row("DMS", PROMPT, 0.05, params={"threshold": -0.5}),
    Row("KVzip", PROMPT, 0.5),
    Row("KVgrad", PROMPT, 0.5),
    Row("ThinK", PROMPT),
    Row("KVCompose", [274, 274, 262, 214], slack=4),
    # 4 initial tokens and one less than n_recent
    Row("SimLayerKV", 131, params={"lazy_threshold": 0.0, "n_recent": 128}),
    Row("Decoding", PROMPT, after=256, params=EVERY_4),
    Row("CompressionRatioDecoding", PROMPT, after=260, params=EVERY_4),
    Row("CAM", PROMPT, after=256, params=EVERY_4),
    Row("PrefillDecoding", 256, after=256, params={"decoding_press": {"name": "Decoding"} | EVERY_4}),
]
BY_NAME = {row.name: row for row in ROWS}
every_press = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def per_layer(tokens: int | list[int]) -> list[int]:
    return tokens if isinstance(tokens, list) else [tokens] * LAYERS


def with_ratio(rows: list[Row]) -> list[Row]:
    return [row for row in rows if PRESSES[row.name].takes_ratio]


def test_the_table_knows_every_press_and_the_matrix_runs_all_that_can() -> None:
    exported = {name for name in kvpress.__all__ if name.endswith("Press")} - {"BasePress", "ScorerPress"}
    assert {info.class_name for info in PRESSES.values()} == exported
    assert len(exported) == 44
    assert {row.name for row in ROWS} == {name for name, info in PRESSES.items() if not info.unavailable}


@every_press
def test_a_press_does_what_it_declares(row: Row) -> None:
    before = plain_forward(), set(dict(model().named_modules())), dict(model().model.__dict__)
    plain, seen = run(row.name, **row.params), run(row.name, new_cache=seen_cache, **row.params)

    # lengths, with a cache that counts what it stores and with one that counts what it has seen
    after = per_layer(row.after) if row.after else [n + STEPS for n in per_layer(row.stored)]
    for outcome in (plain, seen):
        assert outcome.prefilled["stored_tokens"] == pytest.approx(per_layer(row.stored), abs=row.slack)
        assert outcome.decoded["stored_tokens"] == pytest.approx(after, abs=row.slack)
        assert outcome.prefilled["masked_ratio"] == pytest.approx(row.masked, abs=0.01)
        assert outcome.logits.shape == (STEPS, 1, VOCAB)
        assert outcome.logits.isfinite().all()
    assert torch.equal(plain.logits, seen.logits)

    # memory, at the time the press says it compresses
    info = plain.info
    if "decode" in info.compresses:
        assert plain.decoded_bytes == FULL_BYTES // PROMPT * row.after
    else:
        removed = plain.prefilled["removed_ratio"]
        assert (plain.prefilled_bytes < FULL_BYTES) == info.frees_memory == (removed > 0)
        if info.frees_memory:
            assert plain.prefilled_bytes == FULL_BYTES * (1 - removed)
            assert len(set(plain.prefilled["stored_tokens"])) == 1 or info.uneven_layers

    # nothing lingers
    assert torch.equal(plain_forward(), before[0])
    assert set(dict(model().named_modules())) == before[1]
    assert dict(model().model.__dict__) == before[2]


@pytest.mark.parametrize("row", with_ratio(ROWS), ids=lambda row: row.name)
def test_keeping_everything_is_the_full_cache_and_a_tenth_is_not(row: Row) -> None:
    everything = run(row.name, keep=1.0, **row.params)
    reference = full_logits("eager" if everything.info.attention == "eager" else "sdpa")
    assert torch.allclose(everything.logits, reference, atol=1e-5)
    assert everything.prefilled["removed_ratio"] == everything.prefilled["masked_ratio"] == 0

    tenth = run(row.name, keep=0.1, **row.params)
    assert (tenth.logits - everything.logits).abs().max() > 1e-3


@every_press
def test_a_declared_attention_implementation_is_needed_and_no_other(row: Row) -> None:
    declared = PRESSES[row.name].attention
    if declared == "any":
        eager, sdpa = (run(row.name, attention=one, **row.params).logits for one in ("eager", "sdpa"))
        assert torch.allclose(eager, sdpa, atol=1e-4)
    elif PRESSES[row.name].uneven_layers and row.name in ("ChunkKV", "SimLayerKV"):
        pytest.skip("its layers happen to be of one length here")
    else:
        other = "sdpa" if declared == "eager" else "eager"
        # kvpress refuses it, misses an attribute of its patch, or the one mask does not fit every layer
        refusal = (CaseInvalid, AttributeError, RuntimeError)
        with pytest.raises(refusal, match=r"eager|attentions|masked_key_indices|must match the size"):
            run(row.name, attention=other, **row.params)


@every_press
def test_a_batch_is_compressed_as_its_sequences_are_unless_declared_otherwise(row: Row) -> None:
    info = PRESSES[row.name]
    if info.random:
        pytest.skip("draws other numbers for a batch")
    both = tokens(batch=2, seed=3)
    if info.batch_one:
        try:
            together = run(row.name, ids=both, **row.params).logits
        except RuntimeError:
            return
        alone = run(row.name, ids=both[1:], **row.params).logits
        assert (together[:, 1:] - alone).abs().max() > 1e-3
    else:
        together = run(row.name, ids=both, **row.params).logits
        alone = [run(row.name, ids=ids, **row.params).logits for ids in both.split(1)]
        assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-5)


@pytest.mark.parametrize("name", [name for name, info in PRESSES.items() if info.unavailable])
def test_an_unavailable_press_is_skipped_with_its_reason(name: str) -> None:
    with pytest.raises(CaseSkipped, match=f"^kvpress:{name} needs "):
        KvpressMethod.create(name, keep_ratio=0.5)


@torch.no_grad()
def test_knorm_at_a_removal_of_nine_tenths_keeps_25_of_256() -> None:
    method = KvpressMethod.create("kvpress:Knorm", keep_ratio=0.1)
    cache = seen_cache()
    with method.session(model()) as session:
        with session.prefill():
            model()(input_ids=tokens()[:, :256], past_key_values=cache)
        effective = session.measure_effective(cache, 256)
    assert effective["stored_tokens"] == [25] * LAYERS
    assert effective["removed_ratio"] == 1 - 25 / 256


@pytest.mark.slow
@torch.inference_mode()
def test_perplexity_on_smollm2_is_in_the_order_of_the_papers() -> None:
    from contextlib import nullcontext
    from pydoc_data import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from kvsuite.errors import UserError
    from kvsuite.models.smollm2 import smollm2_folder

    try:
        folder = smollm2_folder()
    except UserError as error:
        pytest.skip(str(error))
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    text = AutoTokenizer.from_pretrained(folder)("\n\n".join(topics.topics.values()), return_tensors="pt").input_ids
    prompt, length = 768, 896

    def perplexity(name: str | None) -> float:
        losses = []
        method = KvpressMethod.create(name, keep_ratio=0.5) if name else None
        for start in (20_000, 60_000):
            ids, cache = text[:, start : start + length], DynamicCache()
            with method.session(llm) if method else nullcontext() as session:
                with session.prefill() if session else nullcontext():
                    llm(input_ids=ids[:, :prompt], past_key_values=cache)
                positions = torch.arange(prompt, length)[None]
                logits = llm(input_ids=ids[:, prompt:], past_key_values=cache, position_ids=positions).logits
            # the first continuation token would be scored by the uncompressed prefill
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, prompt + 1 :], reduction="none"))
        return math.exp(torch.cat(losses).mean())

    full, knorm, random = perplexity(None), perplexity("Knorm"), perplexity("Random")
    good = [perplexity(name) for name in ("SnapKV", "TOVA", "ExpectedAttention")]
    assert full * 0.999 <= min(good)
    assert max(good) < knorm < random
