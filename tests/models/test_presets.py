from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from kvsuite.errors import UserError
from kvsuite.models.presets import PRESETS, build_config, preset_name

# parameter counts that the hub shows for the published checkpoints
PUBLISHED = {
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B": 7_248_023_552,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Pythia-2.8B": 2_775_208_960,
    "LLaVA-1.5-7B": 7_063_427_072,
}


def model_class(preset: str) -> Any:
    return AutoModelForImageTextToText if "vision_config" in PRESETS[preset] else AutoModelForCausalLM


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_parameter_counts(preset: str) -> None:
    with torch.device("meta"):
        model = model_class(preset).from_config(build_config(preset))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[preset]


def test_every_preset_is_counted_or_ours() -> None:
    assert set(PRESETS) == {*PUBLISHED, "tiny", "tiny-llava"}


def shrunken(preset: str) -> Any:
    small = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    text = small | {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2}
    if "vision_config" in PRESETS[preset]:
        vision = small | {"image_size": 28, "patch_size": 14}
        text |= {"num_key_value_heads": 4, "head_dim": 16}
        return build_config(preset, text_config=text, vision_config=vision, image_token_index=255, image_seq_length=4)
    if preset != "Pythia-2.8B":
        text |= {"num_key_value_heads": 2, "head_dim": 16}
    return build_config(preset, **text)


@pytest.mark.parametrize("preset", PRESETS)
def test_small_variant_runs(preset: str) -> None:
    torch.manual_seed(0)
    model = model_class(preset).from_config(shrunken(preset), dtype=torch.float32).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        full = model(input_ids=ids).logits
        prefill = model(input_ids=ids[:, :-1], use_cache=True)
        step = model(input_ids=ids[:, -1:], past_key_values=prefill.past_key_values).logits
    assert full.shape == (1, 20, 256)
    assert torch.isfinite(full).all()
    torch.testing.assert_close(step[:, -1], full[:, -1], rtol=1e-4, atol=1e-5)


def test_rope_is_understood() -> None:
    """The rotary frequencies of the model itself, since a misspelt rope field would be ignored without a word."""

    def frequencies(preset: str) -> torch.Tensor:
        base = model_class(preset).from_config(shrunken(preset)).base_model
        rotary = next(m for name, m in base.named_modules() if name.endswith("rotary_emb"))
        return torch.as_tensor(rotary.inv_freq)

    dims = torch.arange(0, 16, 2) / 16
    torch.testing.assert_close(frequencies("tiny"), 10_000.0**-dims)
    torch.testing.assert_close(frequencies("Llama-3-8B"), 500_000.0**-dims)
    torch.testing.assert_close(frequencies("Mistral-7B"), 1_000_000.0**-dims)
    torch.testing.assert_close(frequencies("Pythia-2.8B"), torch.tensor([1.0, 0.01]))
    scaled, plain = frequencies("Llama-3.2-1B"), 500_000.0**-dims
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1], plain[-1] / 32)


def test_facts_that_decide_the_cache_size() -> None:
    assert build_config("mistral-7b").sliding_window is None
    assert build_config("pythia-2.8b").max_position_embeddings == 2048
    tiny = build_config("tiny")
    assert (tiny.num_hidden_layers, tiny.num_key_value_heads, tiny.head_dim, tiny.vocab_size) == (4, 2, 16, 512)


def test_overrides() -> None:
    assert build_config("tiny", num_hidden_layers=7).num_hidden_layers == 7
    config = build_config("LLaVA-1.5-7B", text_config={"num_hidden_layers": 1})
    assert (config.text_config.num_hidden_layers, config.text_config.vocab_size) == (1, 32_064)
    assert build_config("LLaVA-1.5-7B").text_config.num_hidden_layers == 32, "the preset itself is not changed"
    with pytest.raises(TypeError, match="num_layers"):
        build_config("tiny", num_layers=2)


def test_preset_names() -> None:
    assert preset_name("llava-1.5-7B") == "LLaVA-1.5-7B"
    with pytest.raises(UserError, match=r"dummy:llama: unknown preset.*Llama-3-8B"):
        preset_name("llama")
