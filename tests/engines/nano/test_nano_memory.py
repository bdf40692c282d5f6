"""Memory of the `nano` engine: the formulas against a real runtime, and pools in which nobody is preempted."""

from __future__ import annotations

import functools
from dataclasses import replace

import decoders
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.engines.nano.memory import stored_bytes, stored_tokens
from kvsuite.engines.nano.memory_model import (
    _FLASHINFER_HEAD_DIMS,
    ATTENTION_WORKSPACE,
    BLOCK_TOKENS,
    LIBRARY_WORKSPACE,
    MOST_KEYS_A_QUERY,
    NanoMemory,
    PromptKernel,
    pool_blocks,
    prompt_blocks,
    prompt_kernel,
    unpacked_bytes,
)
from kvsuite.engines.nano.runtime import pool_bytes, workspace_bytes
from kvsuite.errors import UserError
from kvsuite.memory_model.cache_room import cache_rooms, kv_bytes
from kvsuite.memory_model.config import architecture_of
from kvsuite.memory_model.design_point import OFF, DesignPoint
from kvsuite.memory_model.prediction import Prediction, Term
from kvsuite.models.layers import layers_of
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.batch import StepBatch
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters

DTYPES = ["float32", "bfloat16"]


@functools.cache
def tiny(dtype: str) -> LoadedModel:
    return load_model(resolve_model("dummy:tiny"), device="cpu", dtype=dtype)


def memory(dtype: str = "float32", device: str = "cpu", preset: str = "tiny") -> NanoMemory:
    return NanoMemory(architecture_of(f"dummy:{preset}"), dtype, device)


def point(context: int, chunk: int, batch: int, window: int = OFF, sinks: int = 0, name: str = "none") -> DesignPoint:
    return DesignPoint(name, context, chunk, batch, window, sinks)


def term(prediction: Prediction, name: str) -> Term:
    (found,) = [term for term in prediction.terms if term.name == name]
    return found


def limits_of(where: DesignPoint, predicted: Prediction) -> Limits:
    """What the point means for a runtime."""
    assert predicted.allocation is not None
    return Limits(
        max_model_len=where.context_window_size,
        max_num_seqs=where.max_batch_size,
        max_num_batched_tokens=max(where.prefill_chunk_size, where.max_batch_size),
        block_size=BLOCK_TOKENS,
        num_blocks=predicted.allocation.blocks,
        prefix_caching=False,
        sliding_window=where.sliding_window_size if where.has_window else None,
        attention_sinks=where.attention_sink_size,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "where",
    [point(100, 32, 1), point(2048, 512, 4), point(64, 1024, 2), point(1000, 16, 32), point(512, 64, 3, 128, 16)],
    ids=lambda where: where.id,
)
def test_a_real_runtime_agrees(where: DesignPoint, dtype: str) -> None:
    loaded = tiny(dtype)
    predicted = memory(dtype).predict(where)
    runtime = Runtime(loaded, limits_of(where, predicted))
    try:
        pool = predicted.part("kv_cache")
        assert pool == runtime.pool_bytes == pool_bytes(runtime, loaded.dtype.itemsize)
        assert predicted.part("temporary") == workspace_bytes(loaded, runtime.limits, runtime.groups, "fa3")
    finally:
        runtime.close()
    rotation = sum(buffer.nbytes for buffer in loaded.model.buffers())
    assert predicted.part("parameters") == loaded.weights_bytes - rotation
    assert predicted.needed == predicted.total


@settings(max_examples=15)
@given(
    window=st.none() | st.integers(1, 40),
    sinks=st.integers(0, 9),
    chunk=st.integers(4, 40),
    sequences=st.integers(1, 4),
    share=st.sampled_from([0.3, 0.7, 0.95]),
)
def test_with_such_a_pool_nobody_is_preempted(
    window: int | None, sinks: int, chunk: int, sequences: int, share: float
) -> None:
    context, block = 96, 4
    sinks = 0 if window is None else sinks
    blocks = pool_blocks(
        context=context, sequences=sequences, chunk=chunk, window=window, sinks=sinks, block_tokens=block
    )
    runtime = Runtime(
        tiny("float32"),
        Limits(
            max_model_len=context, max_num_seqs=sequences, max_num_batched_tokens=chunk, block_size=block,
            num_blocks=blocks, prefix_caching=False, sliding_window=window, attention_sinks=sinks,
        ),
    )  # fmt: skip
    length = int(context * share)
    chosen = SamplingParameters(max_new_tokens=context - length, ignore_eos=True)
    try:
        requests = [
            runtime.add(Request([3 + (5 * at + number) % 200 for at in range(length)], chosen))
            for number in range(sequences)
        ]
        together = 0
        while runtime.unfinished:
            runtime.step()
            together = max(together, len(runtime.scheduler.running))
        assert [request.output_length for request in requests] == [context - length] * sequences
        assert runtime.scheduler.preemptions == 0
        # the first still decodes when the last is fed
        assert share > 0.3 or together == sequences
    finally:
        runtime.close()


def test_without_a_window_the_pool_is_what_all_sequences_hold() -> None:
    assert pool_blocks(context=100, sequences=3, chunk=64, window=None, sinks=0) == 3 * 7


def test_one_block_less_and_somebody_is_preempted() -> None:
    # the pool without a window has no slack
    loaded, sequences = tiny("float32"), 2
    blocks = pool_blocks(context=96, sequences=sequences, chunk=32, window=None, sinks=0) - 1
    sizes = {"max_model_len": 96, "max_num_seqs": sequences, "max_num_batched_tokens": 32, "block_size": BLOCK_TOKENS}
    runtime = Runtime(loaded, Limits(**sizes, num_blocks=blocks, prefix_caching=False, admission="optimistic"))
    chosen = SamplingParameters(max_new_tokens=76, ignore_eos=True)
    try:
        runtime.run([Request(range(3, 23), chosen) for _ in range(sequences)])
        assert runtime.scheduler.preemptions > 0
    finally:
        runtime.close()


def test_every_axis_moves_the_term_it_should() -> None:
    base = point(4096, 1024, 4, 1024, 16)
    before = memory().predict(base)
    moved = {
        "context": (replace(base, context_window_size=8192), set()),
        "short context": (replace(base, context_window_size=1024), {"keys and values"}),
        "batch": (replace(base, max_batch_size=8), {"keys and values", "logits"}),
        "chunk": (replace(base, prefill_chunk_size=512), {"keys and values", "activations"}),
        "window": (replace(base, sliding_window_size=2048), {"keys and values"}),
        "sinks": (replace(base, attention_sink_size=64), {"keys and values"}),
        "format": (replace(base, quantization="q4f16_1"), {"weights", "keys and values", "activations", "logits"}),
    }
    for axis, (where, names) in moved.items():
        after = memory().predict(where)
        changed = {one.name for one, other in zip(before.terms, after.terms, strict=True) if one.bytes != other.bytes}
        assert changed == names, axis


def test_the_cache_stays_flat_past_the_window() -> None:
    def pool(context: int, *window: int) -> float | None:
        return memory().predict(point(context, 512, 4, *window)).part("kv_cache")

    assert pool(4096, 1024, 4) == pool(8192, 1024, 4) == pool(16384, 1024, 4)
    assert pool(8192, 1024, 4) < pool(4096) < pool(8192)  # type: ignore[operator]
    # a window that nothing reaches saves nothing
    assert pool(4096, 8192) == pool(4096)


def test_llama_3_8b_in_numbers() -> None:
    predicted = memory("bfloat16", "cuda", "Llama-3-8B").predict(point(8192, 2048, 8))
    assert predicted.part("parameters") == 2 * 8_030_261_248
    assert predicted.part("kv_cache") == (8 * 512 + 1) * 2 << 20
    assert term(predicted, "activations").bytes == 2048 * 3 * (4096 + 14336) * 2
    assert term(predicted, "logits").bytes == 8 * 128_256 * 6
    assert predicted.notes
    # a matrix is dequantised beside the states where a step has few tokens, and disappears in them where it has many
    packed = [
        memory("float16", "cuda", "Llama-3-8B").predict(point(8192, chunk, 8, name="q4f16_1")) for chunk in (512, 8192)
    ]
    few, many = (term(found, "activations").bytes for found in packed)
    assert few == (512 * (3 * 4096 + 2 * 14336) + 4096 * 14336) * 2
    assert many == 8192 * 3 * (4096 + 14336) * 2


def test_a_step_feeds_no_more_than_the_prompts_have() -> None:
    model = architecture_of("dummy:Llama-3-8B")
    whole, short = (
        NanoMemory(model, "bfloat16", "cuda", prompt).predict(point(8192, 2048, 2)) for prompt in (None, 300)
    )
    assert term(short, "activations").bytes * 2048 == term(whole, "activations").bytes * 600


def test_flashinfers_workspace_is_counted_where_it_attends() -> None:
    from kvsuite.nanovllm import flashinfer_libraries, kernel_attention

    assert kernel_attention._WORKSPACE_BYTES == ATTENTION_WORKSPACE
    assert flashinfer_libraries.HEAD_DIMS == _FLASHINFER_HEAD_DIMS
    wide, narrow = architecture_of("dummy:Llama-3-8B"), architecture_of("dummy:tiny")
    there, here, exact, odd = (
        NanoMemory(of, dtype, device).predict(point(512, 64, 1))
        for of, dtype, device in (
            (wide, "bfloat16", "cuda"), (wide, "bfloat16", "cpu"), (wide, "float32", "cuda"), (narrow, "bfloat16", "cuda"),
        )
    )  # fmt: skip
    assert term(there, "attention workspace").bytes == ATTENTION_WORKSPACE
    gathered = term(there, "gathered prompts").bytes
    assert gathered is not None
    assert there.total == (here.total or 0) + ATTENTION_WORKSPACE + LIBRARY_WORKSPACE + gathered
    for other in (here, exact, odd):
        assert all(found.name != "attention workspace" for found in other.terms)


def test_without_flashinfer_the_keys_that_prompts_see_are_gathered() -> None:
    model, where = architecture_of("dummy:Llama-3-8B"), point(1024, 512, 4)
    found = NanoMemory(model, "bfloat16", "cuda", 600, prompts="torch").predict(where)
    # as what is unpacked: the end of a prompt, and much of the next
    assert term(found, "gathered prompts").bytes == 2 * (38 + 32) * 16 * 8 * 128 * 2
    assert all(one.name not in ("attention workspace", "unpacked prompts") for one in found.terms)
    packed = NanoMemory(model, "bfloat16", "cuda", 600, cache_format=CacheFormat.parse("int8"), prompts="torch")
    assert term(packed.predict(where), "unpacked prompts").bytes == term(found, "gathered prompts").bytes


def test_flashinfer_gathers_as_many_keys_as_are_worth_it() -> None:
    from kvsuite.nanovllm import prompt_attention

    assert prompt_attention._MOST_KEYS_A_QUERY == MOST_KEYS_A_QUERY
    model = architecture_of("dummy:Llama-3-8B")
    long, short = (NanoMemory(model, "bfloat16", "cuda").predict(point(size, 8192, 1)) for size in (65536, 8192))
    # 32,768 of 65,536 tokens, and all that there are
    assert term(long, "gathered prompts").bytes == 32768 * 8 * 128 * 2 * 2
    assert term(short, "gathered prompts").bytes == 8192 * 8 * 128 * 2 * 2
    paged = NanoMemory(model, "bfloat16", "cuda", prompts="fa2").predict(point(8192, 8192, 1))
    assert all(found.name != "gathered prompts" for found in paged.terms)


def test_layers_with_windows_take_nothing_of_flashinfer() -> None:
    model = architecture_of("dummy:Llama-3-8B")
    assert not isinstance(model.cache, str)
    layers = [replace(layer, attention="sliding", window=256) for layer in model.cache.layers]
    mixed = [*layers[1:], model.cache.layers[0]]
    own, some = (
        NanoMemory(replace(model, cache=replace(model.cache, layers=tuple(of))), "bfloat16", "cuda")
        for of in (layers, mixed)
    )
    names = {"attention workspace", "gathered prompts"}
    for memory_of, where, found in (
        (own, point(1024, 512, 4), set()), (NanoMemory(model), point(1024, 512, 4, 256), set()),
        # a window that shows everything is none
        (own, point(256, 128, 4), names), (some, point(1024, 512, 4), names),
    ):  # fmt: skip
        assert {one.name for one in memory_of.predict(where).terms} & names == found


@pytest.mark.parametrize("attention", ["fa2", "fa3", "torch"])
@pytest.mark.parametrize("window", [None, 64])
def test_the_engine_counts_as_it_predicts(attention: PromptKernel, window: int | None) -> None:
    """Of a runtime on CUDA, whose groups are known without one."""
    made = tiny("bfloat16")
    config = made.text_config.__class__(**made.text_config.to_dict() | {"head_dim": 64})
    loaded = replace(made, device=torch.device("cuda"), text_config=config)
    model = replace(architecture_of("dummy:tiny"), cache=layers_of(config.to_dict()))
    where = point(512, 64, 4) if window is None else point(512, 64, 4, window)
    predicted = NanoMemory(model, "bfloat16", "cuda", prompts=attention).predict(where)
    groups = [LayerGroup(tuple(range(model.layers)), config.num_key_value_heads, 64, window=window)]
    found = workspace_bytes(loaded, limits_of(where, predicted), groups, attention)
    assert found == predicted.part("temporary")
    assert (term(predicted, "matrix products").bytes or 0) == LIBRARY_WORKSPACE


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ("paged: flashinfer fa3, single tokens split, reference, single tokens split", "fa3"),
        ("paged: flashinfer fa2, single tokens split in int8", "fa2"),
        ("paged: torch flash, single tokens split", "torch"),
        ("paged: reference (single tokens need triton, which is not installed)", "torch"),
    ],
)
def test_what_attends_to_prompts_is_read_from_the_record(words: str, kernel: PromptKernel) -> None:
    assert prompt_kernel(words) == kernel


@pytest.mark.parametrize(
    ("prompt", "sequences", "chunk", "most"),
    # the end of one prompt and much of the next; all at once; one after the other
    [(37, 2, 35, 6), (37, 3, 111, 9), (37, 1, 20, 3)],
)
def test_the_prompts_of_a_step_see_as_many_blocks_as_predicted(
    prompt: int, sequences: int, chunk: int, most: int
) -> None:
    limits = Limits(
        max_model_len=64, max_num_seqs=sequences, max_num_batched_tokens=chunk, block_size=BLOCK_TOKENS, prefix_caching=False,
        num_blocks=32, cache_format=CacheFormat.parse("int8:int4"),
    )  # fmt: skip
    runtime = Runtime(tiny("bfloat16"), limits)
    backend, seen = runtime.runner.backend, []  # type: ignore[attr-defined]
    begin = backend.begin

    def noting(batch: StepBatch) -> None:
        counts = batch.query_start_host.diff()
        seen.append(int((-(-batch.groups[0].kv_lengths_host[counts > 1] // BLOCK_TOKENS)).sum()))
        begin(batch)

    backend.begin = noting
    chosen = SamplingParameters(max_new_tokens=2, ignore_eos=True)
    try:
        for number in range(sequences):
            runtime.add(Request([3 + (5 * at + number) % 200 for at in range(prompt)], chosen))
        while runtime.unfinished:
            runtime.step()
        assert max(seen) == most == prompt_blocks(prompt=prompt, sequences=sequences, chunk=chunk)
        # FlashInfer is given tensors of this form, for keys and for values
        [group], [pool] = runtime.groups, runtime.pools
        given = 2 * torch.empty(pool.unpacked_shape(most), dtype=torch.bfloat16).nbytes
        assert given == unpacked_bytes(most, kv_heads=group.kv_heads, head_dim=group.head_dim, element_bytes=2)
    finally:
        runtime.close()


def test_prompts_that_are_unpacked_for_flashinfer_are_counted() -> None:
    model, where = architecture_of("dummy:Llama-3-8B"), point(1024, 512, 4)
    packed = NanoMemory(model, "bfloat16", "cuda", 600, cache_format=CacheFormat.parse("int8"))
    # the end of a prompt of 600 tokens, and 510 of the next: 38 + 32 blocks
    assert term(packed.predict(where), "unpacked prompts").bytes == 2 * (38 + 32) * 16 * 8 * 128 * 2
    for other in (
        replace(packed, cache_format=None), replace(packed, dtype="float32"), replace(packed, device="cpu"),
    ):  # fmt: skip
        assert all(found.name != "unpacked prompts" for found in other.predict(where).terms)


def test_a_models_own_window_takes_no_other() -> None:
    tiny = architecture_of("dummy:tiny")
    assert not isinstance(tiny.cache, str)
    sliding = [replace(layer, attention="sliding", window=256) for layer in tiny.cache.layers]
    own = NanoMemory(replace(tiny, cache=replace(tiny.cache, layers=tuple(sliding))), "float32", "cpu")
    refused = own.predict(point(1024, 64, 1, 512))
    assert (refused.part("kv_cache"), refused.allocation, refused.total) == (None, None, None)
    assert refused.reasons == (
        "the model has its own sliding window of 256, and nano takes no other on top; leave the window off",
    )
    assert own.predict(point(1024, 64, 1)).total is not None
    assert own.predict(point(256, 64, 1, 128)).total is not None


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("4bit", "float32", "--kv-quantization=4bit: not predicted for nano"),
        ("none", "int8", "--kv-dtype=int8: unknown"),
    ],
)
def test_what_is_not_predicted(name: str, dtype: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        memory(dtype).predict(point(512, 64, 1, name=name))


@pytest.mark.parametrize("name", ["auto", "int8", "int8:int4"])
def test_layers_with_a_window_take_what_is_predicted(name: str) -> None:
    """Stored bytes of a text after every token, of a model whose second layer has a window of its own."""
    of = decoders.loaded("qwen3-mixed")
    known = layers_of(of.text_config.to_dict())
    model = replace(architecture_of("dummy:tiny"), cache=known, layers=len(known.layers))
    chosen = None if name == "auto" else CacheFormat.parse(name)
    on_nano = NanoMemory(model, "float32", "cpu", cache_format=chosen)
    limits = Limits(max_model_len=84, max_num_seqs=1, block_size=BLOCK_TOKENS, num_blocks=8, cache_format=chosen)
    runtime = Runtime(of, limits, eos_token_ids=())
    try:
        request = runtime.add(Request(range(3, 10), SamplingParameters(max_new_tokens=76, ignore_eos=True)))
        seen, most = [], 0
        while not request.status.over:
            runtime.step()
            if request.status.over:
                break
            for table in runtime.tables:
                table.expire(request.row, request.computed - 1)
            text = int(request.computed)
            stored = stored_bytes(runtime, stored_tokens(runtime, request), 4)
            assert stored == kv_bytes(model, text, 4, chosen, on_nano), text
            most = max(most, stored)
            assert most <= kv_bytes(model, text, 4, chosen, on_nano, on_the_way=True)
            seen.append(text)
        assert len(seen) > 70
    finally:
        runtime.close()
    [room] = cache_rooms(model, 4, [chosen], 1e6, on_nano)
    assert room.reason is None
    # transformers' cache packs none of them
    [other] = cache_rooms(model, 4, [chosen], 1e6)
    assert (other.reason is None) is (chosen is None)
