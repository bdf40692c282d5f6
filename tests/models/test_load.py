from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from kvsuite.errors import UserError
from kvsuite.models import resolve_model
from kvsuite.models.load import load_model
from kvsuite.options.dtypes import parse_dtype

TINY = resolve_model("dummy:tiny")


def weights(seed: int, dtype: str = "float32") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_model(TINY, device="cpu", dtype=dtype, seed=seed).model.state_dict()
    return state


def test_dummy_is_made_where_and_how_it_was_asked() -> None:
    loaded = load_model(TINY, device="cpu", dtype="bf16")
    assert loaded.dtype == torch.bfloat16
    assert loaded.device == torch.device("cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert (loaded.tokenizer, loaded.tokenizer_hash) == (None, None)
    assert loaded.trained_length == 2048
    assert loaded.parameters == 213_568
    buffers = {b.untyped_storage().data_ptr(): b.nbytes for b in loaded.model.buffers()}
    assert loaded.weights_bytes == 2 * 213_568 + sum(buffers.values())
    assert "random weights" in loaded.notes
    assert loaded.load_s > 0
    # the rotary frequencies are computed, not rounded to the weights' dtype
    assert all(b.dtype == torch.float32 for b in loaded.model.buffers())


def test_default_dtype_on_the_cpu_is_float32() -> None:
    assert load_model(TINY, device="cpu", dtype=None).dtype == torch.float32


def test_attention_implementation_is_passed_on() -> None:
    loaded = load_model(TINY, device="cpu", dtype=None, attention="eager")
    assert loaded.attention == loaded.model.config._attn_implementation == "eager"
    assert load_model(TINY, device="cpu", dtype=None).attention == "sdpa"


def test_a_model_whose_scores_are_capped_is_eager_and_says_so(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).save_pretrained(tmp_path)
    spec = resolve_model(str(tmp_path))
    loaded = load_model(spec, device="cpu", dtype=None, sdpa="not_known_to_transformers")
    assert loaded.attention == loaded.model.config._attn_implementation == "eager"
    assert "computed with eager attention: Gemma2ForCausalLM has no sdpa" in "".join(loaded.notes)
    with pytest.raises(UserError, match=r"--kv-attention=sdpa: Gemma2ForCausalLM has no sdpa .*; use auto or eager$"):
        load_model(spec, device="cpu", dtype=None, attention="sdpa")


def test_a_reason_is_not_cut_within_a_word(tmp_path: Path) -> None:
    load_model(TINY, device="cpu", dtype=None).model.save_pretrained(tmp_path)
    words = "abcdefghij " * 60
    (tmp_path / "config.json").write_text(json.dumps({"model_type": words}))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_model(resolve_model(str(tmp_path)), device="cpu", dtype=None)
    assert "abcdefghij …" in str(caught.value)


def test_seed_decides_the_weights() -> None:
    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["lm_head.weight"].std() == pytest.approx(0.02, rel=0.05)


def test_global_random_state_is_untouched() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    weights(3)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("float32", "float32"),
        ("fp32", "float32"),
        ("FP16", "float16"),
        ("float16", "float16"),
        ("bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_dtype_names(name: str, canonical: str) -> None:
    assert parse_dtype(name) == canonical
    assert str(load_model(TINY, device="cpu", dtype=name).dtype) == f"torch.{canonical}"


@pytest.mark.parametrize("name", ["int8", "fp8", "", "float64"])
def test_unknown_dtype(name: str) -> None:
    with pytest.raises(UserError, match=rf"--kv-dtype={name}: unknown dtype.*bfloat16"):
        load_model(TINY, device="cpu", dtype=name)


@pytest.mark.parametrize("device", ["warp:0", "cuda:99", "vulkan:0"])
def test_unusable_device(device: str) -> None:
    with pytest.raises(UserError, match=rf"--kv-device={device}") as caught:
        load_model(TINY, device=device, dtype=None)
    assert "\n" not in str(caught.value)


def test_mlc_weights_are_left_to_the_mlc_engine() -> None:
    with pytest.raises(UserError, match="--kv-engine=mlc"):
        load_model(resolve_model("HF://mlc-ai/x-MLC"), device="cpu", dtype=None)


def test_local_folder(tiny_folder: Path) -> None:
    loaded = load_model(resolve_model(str(tiny_folder)), device="cpu", dtype=None)
    assert loaded.dtype == torch.float32, "not the checkpoint's bfloat16"
    assert loaded.tokenizer is None
    assert any("no tokenizer" in note for note in loaded.notes)
    expected = weights(0, "bfloat16")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in expected.items())
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_checkpoint_without_some_weights_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """transformers would put random numbers in their place."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "holes")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weight\(s\), model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(resolve_model(str(folder)), device="cpu", dtype=None)


def test_weights_that_are_not_used_are_noted(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "more")
    state = load_file(folder / "model.safetensors") | {"extra.weight": torch.zeros(2)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(resolve_model(str(folder)), device="cpu", dtype=None)
    assert any("extra.weight" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"not safetensors at all, though long enough to hold a header"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "kvsuite-unknown"}'),
        ("config.json", b"{}"),
        ("tokenizer.json", b"{"),
    ],
)
def test_damaged_checkpoint(tiny_folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be loaded") as caught:
        load_model(resolve_model(str(folder)), device="cpu", dtype=None)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_folder_without_weights(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(resolve_model(str(tmp_path)), device="cpu", dtype=None)


def test_llava_dummy_answers_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvsuite.models import presets

    small = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    shrunken = presets.PRESETS["LLaVA-1.5-7B"] | {
        "text_config": presets.PRESETS["LLaVA-1.5-7B"]["text_config"]
        | small
        | {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 256},
        "vision_config": presets.PRESETS["LLaVA-1.5-7B"]["vision_config"] | small,
        "image_token_index": 255,
    }
    monkeypatch.setitem(presets.PRESETS, "LLaVA-1.5-7B", shrunken)
    loaded = load_model(resolve_model("dummy:llava-1.5-7b"), device="cpu", dtype=None)
    assert loaded.text_config.model_type == "llama"
    assert loaded.trained_length == 4096
    logits = loaded.model(input_ids=torch.arange(5, 15)[None]).logits
    assert logits.shape == (1, 10, 256)
    assert torch.isfinite(logits).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dummy_on_a_gpu() -> None:
    state = torch.cuda.get_rng_state(0)
    first = load_model(TINY, device="cuda", dtype=None)
    assert first.device == torch.device("cuda", torch.cuda.current_device())
    assert first.dtype == torch.bfloat16
    assert all(tensor.is_cuda for tensor in [*first.model.parameters(), *first.model.buffers()])
    assert torch.equal(torch.cuda.get_rng_state(0), state)
    again = load_model(TINY, device="cuda:0", dtype=None)
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)


def test_progress_bars_are_put_back() -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    weights(0)
    assert logging.is_progress_bar_enabled()
