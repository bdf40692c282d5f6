from __future__ import annotations

import pytest
import torch
from tiny_models import ids, llama_config, loaded, tiny_llama, tiny_neox
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from kvsuite.errors import UserError
from kvsuite.models import resolve_model
from kvsuite.models.load import load_model
from kvsuite.quantization.apply import apply_quantization
from kvsuite.quantization.bytes import predicted_weight_bytes, step_weight_bytes, weight_bytes
from kvsuite.quantization.formats import CAST_FORMATS, GROUP_FORMATS
from kvsuite.quantization.modules import GroupEmbedding, GroupLinear

DENSE = ["none", "fake_q3", *CAST_FORMATS]
MODELS = {"llama": tiny_llama, "tied": lambda: tiny_llama(tied=True), "neox": tiny_neox}


@pytest.mark.parametrize("name", [*DENSE, *GROUP_FORMATS])
@pytest.mark.parametrize("kind", MODELS)
def test_measured_bytes_equal_the_formula(kind: str, name: str) -> None:
    model = MODELS[kind]()
    from_config = predicted_weight_bytes(model.model.config, name)
    facts = apply_quantization(model, name)
    assert facts.weight_bytes == facts.predicted_weight_bytes == from_config
    assert model.weights_bytes == weight_bytes(model.model) == facts.weight_bytes


@pytest.mark.parametrize("name", GROUP_FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_a_dense_model_with_the_dequantised_weights(kind: str, name: str) -> None:
    """The same model, loaded again, given the dequantised weights and run in float32."""
    quantised, dense = MODELS[kind](), MODELS[kind]()
    apply_quantization(quantised, name)
    for path, module in quantised.model.named_modules():
        if isinstance(module, (GroupLinear, GroupEmbedding)):
            dense.model.get_submodule(path).weight.data = module.packed.dense().float()
    for path, parameter in quantised.model.named_parameters():
        dense.model.get_parameter(path).data = parameter.float()
    with torch.inference_mode():
        found, expected = quantised.model(ids()).logits, dense.model(ids()).logits
    assert found.dtype == quantised.dtype == getattr(torch, GROUP_FORMATS[name].dtype)
    scale = float(expected.abs().max())
    bound = 1e-5 if found.dtype == torch.float32 else 1e-2
    assert float((found.float() - expected).abs().max()) < bound * scale


def test_layouts_compute_the_same():
    results = []
    for name in ("q4f16_0", "q4f16_1"):
        model = tiny_neox()
        apply_quantization(model, name)
        results.append(model.model(ids()).logits)
    torch.testing.assert_close(*results)


def test_llama_in_q4f16_1():
    model = tiny_llama()
    before = model.weights_bytes = weight_bytes(model.model)
    inverse_frequencies = model.model.model.rotary_emb.inv_freq.clone()
    facts = apply_quantization(model, "q4f16_1")
    assert facts.converted == {"Linear": 2 * 7 + 1, "Embedding": 1}
    assert facts.left_alone == {"LlamaRMSNorm": 5}
    assert facts.format == "q4f16_1"
    assert facts.compute_dtype == "float16"
    assert not facts.quality_only
    assert model.weights_bytes < before / 5
    # rows of 72, 80 and 100 inputs are padded to 96, 96 and 128
    assert 4.5 < facts.bits_per_weight < 6.5
    assert torch.equal(model.model.model.rotary_emb.inv_freq, inverse_frequencies)
    assert {p.dtype for p in model.model.parameters()} == {torch.float16}
    assert model.model.generate(ids(), max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_biases_are_kept():
    model, reference = tiny_neox(), tiny_neox()
    apply_quantization(model, "q4f32_1")
    attention = model.model.gpt_neox.layers[1].attention.query_key_value
    assert isinstance(attention, GroupLinear)
    assert torch.equal(attention.bias, reference.model.gpt_neox.layers[1].attention.query_key_value.bias)


@pytest.mark.parametrize("name", ["q3f16_1", "q4f16_0", "q4f16_1", "q4f32_1"])
def test_a_tied_table_is_packed_once(name: str) -> None:
    model = tiny_llama(tied=True)
    facts = apply_quantization(model, name)
    head, table = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    assert isinstance(head, GroupLinear)
    assert isinstance(table, GroupEmbedding)
    assert head.packed is table.packed
    assert facts.converted == {"Linear": 15, "Embedding": 1}
    assert step_weight_bytes(model.model) == facts.weight_bytes
    # moving a model copies every tensor: a table that were two modules' own would be doubled here
    moved = model.model.to(torch.float64)
    assert moved.get_output_embeddings().packed.scales is moved.get_input_embeddings().packed.scales


def test_an_untied_table_is_not_read_in_a_step():
    model = tiny_llama()
    facts = apply_quantization(model, "q4f16_1")
    assert step_weight_bytes(model.model) == facts.weight_bytes - weight_bytes(model.model.get_input_embeddings())


@pytest.mark.parametrize("tied", [False, True])
def test_q4f16_2_leaves_both_ends_alone(tied: bool) -> None:
    model = tiny_llama(tied=tied)
    facts = apply_quantization(model, "q4f16_2")
    head, table = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    assert type(head) is nn.Linear
    assert type(table) is nn.Embedding
    assert head.weight.dtype == torch.float16
    assert (head.weight is table.weight) == tied
    assert facts.converted == {"Linear": 14}
    assert facts.left_alone == {"Linear": 1, "Embedding": 1, "LlamaRMSNorm": 5}


@pytest.mark.parametrize(("name", "dtype"), CAST_FORMATS.items())
def test_q0_casts(name: str, dtype: str) -> None:
    model = tiny_llama()
    facts = apply_quantization(model, name)
    assert {p.dtype for p in model.model.parameters()} == {getattr(torch, dtype)}
    assert facts.compute_dtype == dtype
    assert facts.converted == {}


def test_none_is_labelled_by_its_dtype():
    model = tiny_llama()
    model.model.to(torch.bfloat16)
    facts = apply_quantization(model, "none")
    assert facts.format == "bf16"
    assert facts.bits_per_weight == pytest.approx(16, rel=0.01)


def test_an_unknown_format_is_one_line_with_the_choices():
    with pytest.raises(UserError) as error:
        apply_quantization(tiny_llama(), "q5f16_1")
    assert str(error.value).startswith(
        "--kv-quantization=q5f16_1: unknown weight format; choose from none, fake_q3, 4bit, 8bit"
    )
    assert all(name in str(error.value) for name in GROUP_FORMATS)


def test_a_model_is_quantised_once():
    model = tiny_llama()
    apply_quantization(model, "q4f16_1")
    with pytest.raises(
        UserError, match="--kv-quantization=q3f16_1: this model has been quantised already; load it again"
    ):
        apply_quantization(model, "q3f16_1")


def test_a_quantised_checkpoint_is_refused():
    model = tiny_llama()
    model.model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match=r"--kv-quantization=q4f16_1: .* quantised already \(gptq\)"):
        apply_quantization(model, "q4f16_1")


def test_a_model_without_linear_layers_is_refused():
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    with pytest.raises(UserError, match=r"--kv-quantization=q4f16_1: .* in Conv1D modules; use none"):
        apply_quantization(loaded(GPT2LMHeadModel(config)), "q4f16_1")


def test_the_peak_is_one_matrix_above_the_model():
    """Dense weights must go as the packed ones come: weak references to all of them, checked while converting."""
    import weakref

    from kvsuite.quantization.packed import PackedWeight

    model = tiny_llama()
    dense = [weakref.ref(m) for m in model.model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    alive: list[int] = []
    pack = PackedWeight.pack.__func__

    def counting(cls, *args, **kwargs):
        alive.append(sum(ref() is not None for ref in dense))
        return pack(cls, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedWeight, "pack", classmethod(counting))
        apply_quantization(model, "q4f16_1")
    assert alive == list(range(len(dense), 0, -1))


def test_smollm2_bytes_from_its_shapes():
    """The default model's published shapes, without its weights."""
    config = llama_config(tied=True)
    config.update(
        {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    )  # fmt: skip
    rows = 49_152 + 30 * (2 * 576 + 2 * 192 + 2 * 1536)
    matrices = rows * (18 * 4 * 4 + 18 * 2) + 30 * 576 * (48 * 4 * 4 + 48 * 2)
    norms = 61 * 576 * 2
    rotary = sum(b.nbytes for b in load_model(resolve_model("dummy:tiny"), device="cpu", dtype=None).model.buffers())
    predicted = predicted_weight_bytes(config, "q4f16_1")
    assert predicted - matrices - norms == pytest.approx(rotary, abs=256)
