"""MLC's memory line: every published row, the golden table, and what the original read into these numbers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvsuite.engines.mlc.memory_model import MlcMemory, default_json_chunk
from kvsuite.engines.mlc.temporaries import temporary_bytes
from kvsuite.errors import UserError
from kvsuite.memory_model.config import architecture_of, read_fields
from kvsuite.memory_model.design_point import AXES, DesignPoint
from kvsuite.memory_model.design_space import named_space
from kvsuite.memory_model.formats import MLC_FORMATS, mlc_format
from kvsuite.memory_model.prediction import JSON_CHUNK, MIB, PARTS, Part, Prediction
from kvsuite.memory_model.published import PUBLISHED, find_published
from kvsuite.models.presets import PRESETS

SAMPLE = Path(__file__).parents[2] / "data" / "mlc_dse_results_sample.csv"
PUBLISHED_DATA = Path(__file__).parents[4] / "shared" / "data" / "mlc_dse"
FORMATS = ("q0f16", "q3f16_1", "q4f16_1", "q4f32_1")
COLUMNS: dict[Part, str] = {
    "parameters": "gpu_mem_params_mb", "kv_cache": "gpu_mem_kvcache_mb", "temporary": "gpu_mem_temp_mb",
}  # fmt: skip


def memory(preset: str = "Llama-3-8B", json_chunk: int | None = None) -> MlcMemory:
    return MlcMemory.of(architecture_of(f"dummy:{preset}"), json_chunk)


def point(context: int, chunk: int, batch: int, *more: int, quantization: str = "q4f16_1") -> DesignPoint:
    return DesignPoint(quantization, context, chunk, batch, *more)


def mib(prediction: Prediction, part: Part) -> float:
    size = prediction.part(part)
    assert size is not None
    return size / MIB


def rows(path: Path) -> Iterator[tuple[dict[str, str], Prediction]]:
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            published = find_published(row["model"])
            assert published is not None
            where = DesignPoint(published.quantization, *(int(row[axis.name]) for axis in AXES))
            yield row, MlcMemory.of(architecture_of(row["model"])).predict(where)


def compare(path: Path) -> int:
    """Compare every row of a published CSV; return how many there were."""
    found = list(rows(path))
    for row, predicted in found:
        for part, column in COLUMNS.items():
            assert mib(predicted, part) == pytest.approx(float(row[column]), abs=0.001), (row, part)
        assert predicted.total is not None
        assert predicted.total / MIB == pytest.approx(float(row["gpu_mem_total_mb"]), abs=0.001), row
    return len(found)


# published numbers


def test_the_committed_sample() -> None:
    assert compare(SAMPLE) == 24


@pytest.mark.parametrize("name", FORMATS)
def test_every_published_row(name: str) -> None:
    path = PUBLISHED_DATA / f"kv_cache_dse_results_Llama-3-8B-Instruct-{name}-MLC.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here; the committed sample was compared")
    assert compare(path) == {"q0f16": 1518, "q4f16_1": 2190}.get(name, 1188)


@pytest.mark.parametrize(
    ("tag", "megabytes"),
    [
        ("Llama-3-8B-Instruct-q0f16-MLC", 15316.508), ("Llama-3-8B-Instruct-q3f16_1-MLC", 3463.425),
        ("Llama-3-8B-Instruct-q4f16_1-MLC", 4308.133), ("Llama-3-8B-Instruct-q4f32_1-MLC", 4787.266),
        ("Llama-3.2-1B-Instruct-q0f16-MLC", 2357.129), ("Llama-3.2-1B-Instruct-q0f32-MLC", 4714.258),
        ("Llama-3.2-1B-Instruct-q4f16_0-MLC", 663.035), ("Llama-3.2-1B-Instruct-q4f16_1-MLC", 663.035),
        ("Llama-3.2-1B-Instruct-q4f32_1-MLC", 736.820), ("Mistral-7B-Instruct-v0.3-q0f16-MLC", 13824.508),
    ],
)  # fmt: skip
def test_parameters_of_the_published_models(tag: str, megabytes: float) -> None:
    architecture = architecture_of(f"HF://mlc-ai/{tag}")
    assert architecture.quantization == PUBLISHED[tag].quantization
    predicted = MlcMemory.of(architecture).predict(point(4096, 1024, 1, quantization=PUBLISHED[tag].quantization))
    assert mib(predicted, "parameters") == pytest.approx(megabytes, abs=0.0005)


@pytest.mark.parametrize(
    ("preset", "json_chunk", "megabytes"),
    [
        ("Llama-3-8B", 8192, (722.068, 1234.072, 2258.082)),
        ("Llama-3-8B", 2048, (600.521, 1112.526, 2136.535)),
        ("Llama-3.2-1B", 8192, (258.068, 386.072, 642.082)),
    ],
)
def test_the_golden_caches(preset: str, json_chunk: int, megabytes: tuple[float, ...]) -> None:
    predicted = [memory(preset, json_chunk).predict(point(tokens, 1024, 1)) for tokens in (4096, 8192, 16384)]
    assert [mib(one, "kv_cache") for one in predicted] == pytest.approx(megabytes, abs=0.001)


@pytest.mark.parametrize(
    ("batch", "temporary", "total"),
    [(1, 442.011, 5472.212), (2, 443.992, 5474.192), (4, 447.952, 5478.152), (8, 455.872, 5486.073)],
)
def test_the_golden_temporary_buffers(batch: int, temporary: float, total: float) -> None:
    predicted = memory().predict(point(4096, 1024, batch))
    assert mib(predicted, "temporary") == pytest.approx(temporary, abs=0.001)
    assert predicted.total == pytest.approx(total * MIB, abs=0.001 * MIB)


def test_the_default_point_of_the_originals_command_line() -> None:
    predicted = memory().predict(point(8192, 8192, 4))
    assert [mib(predicted, part) for part in PARTS] == pytest.approx([4308.133, 1234.073, 2631.952], abs=0.001)
    assert predicted.total == pytest.approx(8174.158 * MIB, abs=0.001 * MIB)
    # beyond the chunks that were published
    assert "extrapolated" in {term.basis for term in predicted.terms}


def test_every_term_to_the_byte() -> None:
    # 88 bytes a sequence are less than the published digits show
    assert {term.name: term.bytes for term in memory().predict(point(4096, 1024, 2)).terms[1:]} == {
        "keys and values": 4 * 128 * 8 * 32 * 4096,
        "bookkeeping of tokens": 5120,
        "bookkeeping of sequences": 264,
        "attention buffers": 2_162_688 + 167_772_160,
        "attention workspace": 50_331_648,
        "hidden states": 32_776 + 8192 * 16_386,
        "logits and sampling": 40 + 4_136_256,
        "functions of the library": 312 * MIB,
    }


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk", [1024, 2048, 4096])
def test_mistrals_temporary_buffer_has_a_row_of_each_sequence(chunk: int, batch: int) -> None:
    # published: 0.2890625 MiB of each token of the chunk, and 16 KiB of each sequence, beside the engine's own buffers
    predicted = memory("Mistral-7B", 2048).predict(point(4096, chunk, batch, quantization="q0f16"))
    states = 4 * 2048 + 4 * batch + 2 * 4096 * (2 * 2048 + batch)
    logits = 20 * batch + 16.125 * batch * 32768
    library = 0.2890625 * MIB * chunk + 16 * 1024 * batch
    assert predicted.part("temporary") == states + logits + library
    assert {term.basis for term in predicted.terms if term.part == "temporary"} == {"exact", "fitted"}
    report = memory("Mistral-7B", 2048).compile_report(point(4096, chunk, batch, quantization="q0f16"))
    assert report.temporary == library / 2
    assert mib(predicted, "parameters") == pytest.approx(13824.508, abs=0.0005)


def test_published_libraries_hold_whole_rows() -> None:
    # MiB of each token of the chunk, as fitted to the published rows, the engine's factor 2 in
    published = {
        ("Llama-3-8B", "float16"): 0.3046875, ("Llama-3-8B", "float32"): 0.46875,
        ("Llama-3.2-1B", "float16"): 0.171875, ("Llama-3.2-1B", "float32"): 0.265625,
        ("Mistral-7B", "float16"): 0.2890625,
    }  # fmt: skip
    for (preset, dtype), mib_per_token in published.items():
        chosen = mlc_format({"float16": "q0f16", "float32": "q0f32"}[dtype])
        found = temporary_bytes(architecture_of(f"dummy:{preset}"), chosen, 1024, 4)
        assert found.by_chunk == mib_per_token * MIB * 1024
        assert found.by_batch == (4 * 16 * 1024 if preset == "Mistral-7B" else 0)


# what the original got wrong


@pytest.mark.parametrize(
    ("scheme", "printed", "real", "kv_cache", "total", "printed_total"),
    [
        (0, 442.011, 471.714, 722.069, 5501.916, 5472.212),
        (1, 754.011, 815.396, 722.070, 5845.599, 5784.212),
        (2, 1378.011, 1502.761, 1234.078, 7044.972, 6920.217),
    ],
)
def test_the_schemes_with_their_real_batch(
    scheme: int, printed: float, real: float, kv_cache: float, total: float, printed_total: float
) -> None:
    # the original printed them from a chat, whose interactive mode forces a batch of 1
    where = named_space("schemes", ["q4f16_1"]).points[scheme]
    predicted, of_chat = memory().predict(where), memory().predict(replace(where, max_batch_size=1))
    assert mib(of_chat, "temporary") == pytest.approx(printed, abs=0.001)
    assert mib(predicted, "temporary") == pytest.approx(real, abs=0.001)
    assert mib(predicted, "kv_cache") == pytest.approx(kv_cache, abs=0.001)
    # the quoted totals add rounded parts
    assert predicted.total == pytest.approx(total * MIB, abs=0.0015 * MIB)
    assert of_chat.total == pytest.approx(printed_total * MIB, abs=0.0015 * MIB)


def test_quantising_weights_does_not_shrink_the_cache() -> None:
    # the published gap of 121 MB between q0f16 and q4f16_1 is the JSON's prefill chunk, and q4 is the larger one
    same = {mib(memory().predict(point(4096, 1024, 1, quantization=name)), "kv_cache") for name in FORMATS}
    assert len(same) == 1
    published = [
        MlcMemory.of(architecture_of(f"HF://mlc-ai/Llama-3-8B-Instruct-{name}-MLC")) for name in ("q0f16", "q4f16_1")
    ]
    assert [one.json_chunk for one in published] == [2048, 8192]
    gap = [mib(one.predict(point(4096, 1024, 1)), "kv_cache") for one in published]
    assert gap[1] - gap[0] == pytest.approx(121.547, abs=0.001)


@pytest.mark.parametrize(("name", "factor"), [("q4f16_1", 1), ("q4f32_1", 2), ("q0f32", 2), ("q4bf16_1", 1)])
def test_what_is_allocated_is_in_the_models_dtype(name: str, factor: int) -> None:
    # the line that the original took for VRAM counts 16 bits whatever the dtype
    for tokens, pages in ((4096, 257), (8192, 513), (16384, 1025)):
        predicted = memory().predict(point(tokens, 1024, 1, quantization=name))
        assert predicted.allocation is not None
        assert predicted.allocation.blocks + predicted.allocation.extra == pages
        assert predicted.allocation.bytes == factor * pages * 2 * MIB
        assert predicted.total is not None or name == "q4bf16_1"
        if predicted.total is not None:
            assert predicted.needed == predicted.total + predicted.allocation.bytes - tokens * 131_072
    assert ("16 bits" in " ".join(predicted.notes)) == (factor == 2)


def test_the_window_is_inert_where_mlc_has_no_such_field() -> None:
    space = named_space("full", ["q4f16_1"]).points
    llama, mistral = memory(), memory("Mistral-7B")
    assert set(llama.inert()) == {"sliding_window_size", "attention_sink_size"}
    assert "no such field" in llama.inert()["sliding_window_size"]
    assert mistral.inert() == {}
    by_setting: dict[tuple[int, ...], set[tuple[float | None, ...]]] = {}
    for where in space:
        one = llama.predict(where)
        key = (where.context_window_size, where.prefill_chunk_size, where.max_batch_size)
        by_setting.setdefault(key, set()).add((*map(one.part, PARTS), one.needed))
    assert len(by_setting) == 36
    assert all(len(numbers) == 1 for numbers in by_setting.values())
    windowed = mistral.predict(point(4096, 1024, 4, 2048, 4))
    assert windowed.allocation is not None
    # two pages a sequence more
    assert windowed.allocation.blocks + windowed.allocation.extra == 257 + 2 * 4
    assert any("mlc-chat-config.json" in note for note in windowed.notes)


def test_each_term_names_the_setting_that_moves_it() -> None:
    base = point(4096, 1024, 2)
    other = {
        "context_window_size": (memory(), replace(base, context_window_size=8192)),
        "prefill_chunk_size": (memory(), replace(base, prefill_chunk_size=2048)),
        "max_batch_size": (memory(), replace(base, max_batch_size=4)),
        "quantization": (memory(), replace(base, quantization="q3f16_1")),
        JSON_CHUNK: (memory(json_chunk=2048), base),
    }
    before = {term.name: term for term in memory().predict(base).terms}
    for setting, (changed, where) in other.items():
        after = changed.predict(where)
        moved = {term.name for term in after.terms if term.bytes != before[term.name].bytes}
        assert moved == {name for name, term in before.items() if setting in term.settings}, setting
        assert moved


def test_the_compilers_report_is_another_one() -> None:
    f16, f32 = (memory().compile_report(point(4096, 1024, 1, quantization=name)) for name in ("q4f16_1", "q4f32_1"))
    assert (f16.kv_bytes_per_token, f32.kv_bytes_per_token) == (131_072, 262_144)
    # the engine doubles it
    assert f16.temporary == 0.3046875 * MIB * 1024 / 2
    assert f16.parameters == pytest.approx(4308.133 * MIB, abs=0.0005 * MIB)


# what is not known


@pytest.mark.parametrize("preset", ["Qwen3-0.6B", "tiny", "Qwen3-32B"])
def test_an_architecture_without_coefficients_has_no_total(preset: str) -> None:
    predicted = memory(preset).predict(point(2048, 1024, 2))
    assert predicted.part("parameters") is not None
    assert predicted.part("kv_cache") is not None
    assert (predicted.part("temporary"), predicted.total, predicted.needed) == (None, None, None)
    (reason,) = predicted.reasons
    assert reason.startswith(f"temporary buffers of {preset} can only be read from its compiled library")
    assert predicted.needed_at_least > predicted.part("parameters")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("preset", "name", "part", "reason"),
    [
        ("Llama-3-8B", "q4f16_autoawq", "parameters", "q4f16_autoawq has a weight layout that is not modelled"),
        ("Llama-3-8B", "q4bf16_1", "temporary", "no library of these shapes was published in bfloat16"),
        ("Pythia-2.8B", "q4f16_1", "parameters", "how MLC stores the parameters of gpt_neox is not modelled"),
        ("LLaVA-1.5-7B", "q4f16_1", "parameters", "what MLC stores of an image encoder is not modelled"),
        ("Mistral-7B", "q4f32_1", "temporary", "no library of these shapes was published in float32"),
    ],
)
def test_what_is_not_known_is_null_with_the_reason(preset: str, name: str, part: Part, reason: str) -> None:
    predicted = memory(preset).predict(point(2048, 1024, 1, quantization=name))
    assert predicted.part(part) is None
    assert reason in predicted.reasons
    for term in predicted.terms:
        assert (term.bytes is None) == (term.basis == "unknown") == (term.reason is not None)


def test_formats_that_were_not_published_are_extrapolated() -> None:
    def basis(name: str, chunk: int) -> str:
        return memory().predict(point(8192, chunk, 1, quantization=name)).terms[-1].basis

    assert [basis("q4f16_1", chunk) for chunk in (512, 1024, 4096, 8192)] == [
        "extrapolated", "fitted", "fitted", "extrapolated",
    ]  # fmt: skip
    assert basis("q4f16_2", 2048) == "extrapolated"


def test_formats_of_mlc() -> None:
    assert len(set(MLC_FORMATS)) == 18
    assert {mlc_format(name).dtype for name in MLC_FORMATS} == {"float16", "bfloat16", "float32"}
    with pytest.raises(UserError, match="--kv-quantization=q5: no weight format of MLC; choose from q0f16"):
        mlc_format("q5")


def test_the_chunk_of_the_json_is_what_gen_config_would_write() -> None:
    presets = ("Llama-3-8B", "Llama-3.2-1B", "Mistral-7B", "Qwen3-8B", "tiny")
    assert [default_json_chunk(architecture_of(f"dummy:{name}")) for name in presets] == [8192, 8192, 8192, 2048, 2048]
    mistral = architecture_of("dummy:Mistral-7B")
    windowed = read_fields(PRESETS["Mistral-7B"] | {"sliding_window": 4096}, label="x", origin="x")
    assert default_json_chunk(windowed) == 4096
    assert default_json_chunk(replace(mistral, json_chunk=1024)) == 1024
    unknown = replace(mistral, model_type="olmo")
    assert default_json_chunk(unknown) is None
    predicted = MlcMemory.of(unknown).predict(point(4096, 1024, 1))
    assert predicted.part("kv_cache") is None
    assert any("give --json-prefill-chunk" in reason for reason in predicted.reasons)
    assert MlcMemory.of(unknown, 2048).predict(point(4096, 1024, 1)).part("kv_cache") is not None


def test_the_capacity_is_what_the_line_leaves() -> None:
    where = point(4096, 1024, 1)
    total = memory().predict(where).total
    assert total is not None
    assert memory().capacity(where, total) == 4096
    assert memory().capacity(where, total - 1) == 4095
    # "Insufficient GPU memory error"
    assert (memory().capacity(where, 4308 * MIB) or 0) <= 0
    assert memory("Qwen3-8B").capacity(where, total) is None


def test_a_context_for_each_sequence() -> None:
    where = point(4096, 1024, 4)
    shared, own = memory(), MlcMemory.of(architecture_of("dummy:Llama-3-8B"), per_sequence=True)
    assert (shared.total_tokens(where), own.total_tokens(where)) == (4096, 16384)
    assert any("share the pages of one context" in note for note in shared.predict(where).notes)
    assert not own.predict(where).notes
    assert own.predict(where).part("kv_cache") == shared.predict(point(16384, 1024, 4)).part("kv_cache")
    allocation = own.predict(where).allocation
    assert allocation is not None
    assert allocation.bytes == 1025 * 2 * MIB
    # a batch of one is the same either way
    assert own.predict(point(4096, 1024, 1)).total == shared.predict(point(4096, 1024, 1)).total
