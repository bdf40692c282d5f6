"""Fused decoders against the transformers models they are made from. On CUDA, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_device import DEVICE, INTERPRETED
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kvsuite.nanovllm import fused_layers, gated_linear
from kvsuite.nanovllm.batch import BatchBuilder, GroupInputs
from kvsuite.nanovllm.captured_attention import CapturedAttention
from kvsuite.nanovllm.fused_layers import PRODUCTS, FusedDecoder, not_fusable
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.reference_attention import ReferenceAttention
from kvsuite.nanovllm.row_linear import Tiling
from kvsuite.nanovllm.static_batch import static_batch
from kvsuite.nanovllm.whole_rows import PROJECTED, SUMMED, WholeRows

pytestmark = pytest.mark.gpu
BLOCK, LENGTHS = 16, [33, 5, 18]
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
}


def _model(name, dtype):
    torch.manual_seed(1)
    model = MODELS[name]().eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        # norms that do something, and logits that differ
        weight.data = weight.data + 0.1 * torch.randn_like(weight) if "norm" in key else 4 * weight.data
    return model.to(DEVICE, dtype)


def _pool(model, dtype):
    group = LayerGroup((0, 1), 2, 64)
    return KVPool(group, num_blocks=20, block_size=BLOCK, device=DEVICE, dtype=dtype)


def _batch(tokens, lengths, counts, drawn=(0, 1, 2)):
    """The last ``counts`` of ``lengths`` tokens of each sequence; the last ones of ``drawn`` are wanted."""
    tables = np.array([[7, 2, 19], [4, 0, 0], [11, 3, 0]], dtype=np.int32)
    places = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    rows = np.repeat(np.arange(len(lengths)), counts)
    group = GroupInputs(
        slots=tables[rows, places // BLOCK].astype(np.int64) * BLOCK + places % BLOCK,
        kv_lengths=np.array(lengths),
        block_tables=tables[: len(lengths)],
        dropped=np.zeros(len(lengths), dtype=np.int64),
    )
    return BatchBuilder(DEVICE).build(
        ids=np.array([tokens[row][place] for row, place in zip(rows, places, strict=True)]),
        positions=places.astype(np.int64),
        counts=np.array(counts),
        sample_rows=(np.cumsum(counts) - 1)[list(drawn)],
        groups=[group],
    )


def _tokens():
    generator = np.random.default_rng(0)
    return [generator.integers(0, SHAPE["vocab_size"], n + 1).tolist() for n in LENGTHS]


def _expected(model, tokens, extra):
    with torch.inference_mode():
        rows = [
            model(torch.tensor([own[: n + extra]], device=DEVICE), use_cache=False).logits[0, -1]
            for own, n in zip(tokens, LENGTHS, strict=True)
        ]
    return torch.stack(rows)


def _error(found, expected):
    assert torch.isfinite(found).all()
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _computed_prompts(model):
    """A decoder, a pool that holds the prompts of `LENGTHS`, and their tokens."""
    tokens = _tokens()
    decoder = FusedDecoder(model, model.config, 64)
    pool = _pool(model, torch.float32)
    reference = ReferenceAttention([pool])
    first = _batch(tokens, LENGTHS, LENGTHS)
    reference.begin(first)
    decoder.logits(first, reference)
    return decoder, pool, tokens


def _unset(found):
    """What nobody writes must not pass for a result of before."""
    return found.fill_(3) if found.is_floating_point() else found


TILINGS = [
    None,
    Tiling(block_n=32, block_k=32, splits=2, prefetch=1),
    Tiling(block_n=32, parts=2, block_k=64, prefetch=2),
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_fused_float32_equals_transformers(name, tiling):
    model = _model(name, torch.float32)
    tokens = _tokens()
    prompts, following = _expected(model, tokens, 0), _expected(model, tokens, 1)
    assert not_fusable(model, model.config) is None
    decoder = FusedDecoder(model, model.config, 64)
    attention = ReferenceAttention([_pool(model, torch.float32)])
    first = _batch(tokens, LENGTHS, LENGTHS)
    attention.begin(first)
    assert _error(decoder.logits(first, attention), prompts) < 1e-5
    if tiling is not None:
        for product in PRODUCTS:
            features, width = decoder.weights(product)[0].shape
            gated = product == "gate_up"
            if tiling.fits(features // 2 if gated else features, width, gated):
                decoder.tilings[product, 16] = tiling
        assert decoder.tilings
        assert "torch" not in str(decoder.effective["products"])
    second = _batch(tokens, [n + 1 for n in LENGTHS], [1, 1, 1])
    attention.begin(second)
    assert _error(decoder.logits(second, attention), following) < 1e-5
    # the model shares the merged weights and still works
    assert torch.equal(_expected(model, tokens, 0), prompts)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", list(MODELS))
def test_short_steps_equal_transformers(name, splits, monkeypatch):
    """Steps whose attention takes products: residuals, norms, rotation and storing are inside the kernels around them."""
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (0, 0))
    model = _model(name, torch.float32)
    decoder, pool, tokens = _computed_prompts(model)
    following = _expected(model, tokens, 1)
    whole = Tiling(block_n=32, block_k=32, prefetch=1)
    decoder.tilings = {(product, 16): whole for product in PRODUCTS}
    for product in ("qkv", "output", "down"):
        decoder.tilings[product, 16] = replace(whole, splits=splits)
    second = _batch(tokens, [n + 1 for n in LENGTHS], [1, 1, 1])
    # every processor of four is a reason to cut keys
    owner = SimpleNamespace(pools=[pool], processors=4 * splits)
    captured = CapturedAttention(owner, second)
    captured.begin(second)
    ran = []
    monkeypatch.setattr(decoder, "_short_step", lambda *given, run=decoder._short_step: ran.append(1) or run(*given))
    # twice: what is stored is the same, and counters are where they were
    for _ in range(2):
        assert _error(decoder.logits(second, captured), following) < 1e-5
    assert len(ran) == 2
    assert decoder.effective["short_steps"] == [3]
    # a product that is torch's has the other step
    decoder.tilings["down", 16] = None
    assert _error(decoder.logits(second, captured), following) < 1e-5
    assert len(ran) == 2


@pytest.mark.parametrize("short", [False, True])
def test_a_step_begins_with_the_longest_sequence_that_stands_in_its_tensors_now(short, monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (0, 0))
    model = _model("qwen3", torch.float32)
    decoder, pool, tokens = _computed_prompts(model)
    following = _expected(model, tokens, 1)
    if short:
        decoder.tilings = {(product, 16): Tiling(block_n=32, block_k=32, prefetch=1) for product in PRODUCTS}
    second = _batch(tokens, [n + 1 for n in LENGTHS], [1, 1, 1])
    # the fourth row is padding of one token
    static = static_batch(4, 1, 3, DEVICE)
    owner = SimpleNamespace(pools=[pool], processors=4)
    captured = CapturedAttention(owner, static)
    [order] = captured._orders
    for rows, expected in (([0, 1, 2], [0, 2, 1, 3]), ([1, 0, 2], [1, 2, 0, 3]), ([1, 2, 0], [2, 1, 0, 3])):
        own, given = static.groups[0], second.groups[0]
        for stands, comes in (
            (static.ids, second.ids), (static.positions, second.positions), (own.slots, given.slots),
            (own.kv_lengths, given.kv_lengths), (own.block_tables, given.block_tables),
        ):  # fmt: skip
            stands[:3].copy_(comes[rows])
        captured.begin(static)
        # a graph finds it where it was
        assert captured._orders[0] is order
        assert order.tolist() == expected
        assert _error(decoder.logits(static, captured)[:3], following[rows]) < 1e-5
    assert decoder.effective["short_steps"] == [4] * short
    # attention is given the order, and takes the sequences that it names: nobody attends for the others. One part each, for
    # parts are counted
    owner.processors = 1
    captured = CapturedAttention(owner, static)
    captured._orders[0].zero_()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **of: _unset(empty(*shape, **of)))
    monkeypatch.setattr(
        torch, "empty_like", lambda like: _unset(empty(like.shape, dtype=like.dtype, device=like.device))
    )
    found = decoder.logits(static, captured)
    assert _error(found[:1], following[rows][:1]) < 1e-5
    assert _error(found[1:3], following[rows][1:]) > 1e-2


@pytest.mark.parametrize("name", list(MODELS))
def test_a_short_step_of_one_sequence_by_whole_rows(name, monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (0, 0))
    model = _model(name, torch.float32)
    tokens, length = _tokens(), LENGTHS[0]
    decoder = FusedDecoder(model, model.config, 64)
    pool = _pool(model, torch.float32)
    reference = ReferenceAttention([pool])
    first = _batch(tokens, [length], [length], drawn=(0,))
    reference.begin(first)
    decoder.logits(first, reference)
    whole = Tiling(block_n=32, block_k=32, prefetch=1)
    decoder.tilings = {(product, 16): whole for product in PRODUCTS}
    second = _batch(tokens, [length + 1], [1], drawn=(0,))
    owner = SimpleNamespace(pools=[pool], processors=4)
    captured = CapturedAttention(owner, second)
    captured.begin(second)
    found = {"qkv": PROJECTED, "output": SUMMED, "down": SUMMED}
    monkeypatch.setattr(decoder, "_whole_rows", lambda rows, backend: found)
    for _ in range(2):
        assert _error(decoder.logits(second, captured), _expected(model, tokens, 1)[:1]) < 1e-5
    assert decoder.effective["short_steps"] == [1]
    assert decoder.effective["products"]["qkv, output, down, 1 row"] == "whole rows"


def test_whole_rows_are_read_for_one_sequence_whose_parts_of_keys_are_one_step(monkeypatch):
    decoder = FusedDecoder(model := _model("llama3", torch.float32), model.config, 64)
    monkeypatch.setattr(decoder, "pdl", True)
    near, far = (SimpleNamespace(loads_at_once=once, processors=4) for once in (True, False))
    # programs of 512 rows of a weight overflow four SMs
    assert decoder._whole_rows(1, near) == {}
    monkeypatch.setattr(WholeRows, "fills", lambda tiling, features, processors: True)
    assert set(decoder._whole_rows(1, near)) == {"qkv", "output", "down"}
    assert decoder._whole_rows(2, near) == decoder._whole_rows(1, far) == {}


@pytest.mark.parametrize(("blocks", "once"), [(3, True), (16, True), (17, False)])
def test_keys_are_loaded_at_once_where_the_longest_sequence_has_a_step_a_part(blocks, once, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (0, 0))
    pool = SimpleNamespace(
        device=DEVICE,
        block_size=BLOCK,
        group=SimpleNamespace(kv_heads=2, layers=(0,), window=3),
        is_packed=False,
    )
    # four parts fill four SMs twice
    owner = SimpleNamespace(pools=[pool], processors=4)
    batch = SimpleNamespace(sequences=1, groups=[SimpleNamespace(block_tables=torch.zeros(1, blocks))])
    assert CapturedAttention(owner, batch).loads_at_once == once


@pytest.mark.parametrize("tiling", TILINGS[:2], ids=str)
def test_chunks_of_which_nothing_or_a_part_is_wanted(tiling):
    model = _model("qwen3", torch.float32)
    tokens = _tokens()
    expected = _expected(model, tokens, 0)
    decoder = FusedDecoder(model, model.config, 64)
    if tiling is not None:
        decoder.tilings = {(product, 16): tiling for product in ("output", "down")}
    attention = ReferenceAttention([_pool(model, torch.float32)])
    first = _batch(tokens, [n - 3 for n in LENGTHS], [n - 3 for n in LENGTHS], drawn=())
    attention.begin(first)
    assert decoder.hidden(first, attention).shape == (0, SHAPE["hidden_size"])
    assert decoder.logits(first, attention).shape == (0, SHAPE["vocab_size"])
    second = _batch(tokens, LENGTHS, [3, 3, 3], drawn=(2, 0))
    attention.begin(second)
    assert _error(decoder.logits(second, attention), expected[[2, 0]]) < 1e-5


@pytest.mark.parametrize("tiling", TILINGS[:2], ids=str)
def test_torchs_products_add_to_the_residual_themselves(tiling):
    model = _model("qwen3", torch.float32)
    decoder = FusedDecoder(model, model.config, 64)
    if tiling is not None:
        decoder.tilings = {(product, 16): tiling for product in ("output", "down")}
    layer = model.model.layers[1]
    generator = torch.Generator().manual_seed(0)
    width = layer.self_attn.o_proj.in_features
    mixed, residual = (torch.randn(5, n, generator=generator).to(DEVICE) for n in (width, SHAPE["hidden_size"]))
    with torch.inference_mode():
        between = residual + layer.self_attn.o_proj(mixed)
        expected = between + layer.mlp(layer.post_attention_layernorm(between))
        delta = decoder.feed_forward(1, mixed, residual)
    # with our own products the next norm adds
    assert (delta is None) == (tiling is None)
    found = residual if delta is None else residual + delta.sum(0)
    assert _error(found, expected) < 1e-5


def test_gate_and_up_have_their_activation_inside_where_that_is_faster(monkeypatch):
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    model = _model("llama3", dtype)
    decoder = FusedDecoder(model, model.config, 64)
    layer, rows = model.model.layers[0], []
    monkeypatch.setattr(fused_layers, "processors", lambda device: 3)
    monkeypatch.setattr(gated_linear, "is_faster", lambda rows, features, processors: rows > 4)

    def counted(x, weight, processors, run=gated_linear.gated_linear):
        rows.append(x.shape[0])
        return run(x, weight, processors)

    monkeypatch.setattr(gated_linear, "gated_linear", counted)
    decoder.gates = True
    assert decoder.effective["products"] == "torch"
    generator = torch.Generator().manual_seed(0)
    width = layer.self_attn.o_proj.in_features
    for count in (4, 5):
        mixed, residual = (
            torch.randn(count, n, generator=generator).to(DEVICE, dtype) for n in (width, SHAPE["hidden_size"])
        )
        with torch.inference_mode():
            between = residual + layer.self_attn.o_proj(mixed)
            expected = between + layer.mlp(layer.post_attention_layernorm(between))
            assert decoder.feed_forward(0, mixed, residual) is None
        assert _error(residual, expected) < (1e-5 if INTERPRETED else 1e-2)
    assert decoder.effective["products"] == {"gate_up, many rows": "with its activation"}
    assert rows == [5]


@pytest.mark.parametrize("name", list(MODELS))
def test_merging_holds_no_weight_twice(name):
    model = _model(name, torch.float32)
    before = sum(p.numel() for p in model.parameters())
    decoder = FusedDecoder(model, model.config, 64)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 4 * before
    held = {t.untyped_storage().data_ptr() for product in PRODUCTS for t in decoder.weights(product)}
    assert held <= set(storages)


def test_what_cannot_be_fused_says_why():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    small = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                             intermediate_size=64))  # fmt: skip
    assert "not of the Llama kind" in (not_fusable(small, small.config) or "")
    biased = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    assert "q_proj is not a plain linear layer" in (not_fusable(biased, biased.config) or "")
    odd = LlamaForCausalLM(LlamaConfig(**SHAPE | {"head_dim": 48}))
    assert "head_dim 48" in (not_fusable(odd, odd.config) or "")
    packed = _model("llama3", torch.float32)
    packed.model.layers[1].mlp.up_proj = torch.nn.Identity()
    assert "layer 1 up_proj" in (not_fusable(packed, packed.config) or "")
    moving = LlamaForCausalLM(
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    )
    assert "dynamic" in (not_fusable(moving, moving.config) or "")
