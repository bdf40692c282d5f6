"""Architectures from presets, folders and published models: weights in closed form against transformers' own modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvsuite.errors import UserError
from kvsuite.memory_model.config import Architecture, architecture_of, read_fields
from kvsuite.memory_model.formats import NANO_FORMATS, nano_format
from kvsuite.memory_model.weights import WeightShapes, weight_shapes
from kvsuite.models.presets import PRESETS, build_config

QWEN2: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 320, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
BIASED = QWEN2 | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 24}


def transformers_bytes(config: Any, name: str) -> int:
    """What the `hf` engine predicts from real modules without storage, the tables of the rotation left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from kvsuite.quantization.bytes import predicted_weight_bytes

    multimodal = getattr(config, "vision_config", None) is not None
    kind: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    return predicted_weight_bytes(model, name) - sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_of_every_preset_are_those_of_transformers(preset: str) -> None:
    found = architecture_of(f"dummy:{preset}")
    assert isinstance(found.weights, WeightShapes)
    # every format where building the modules takes no time
    names = NANO_FORMATS if preset in ("tiny", "Llama-3.2-1B", "Pythia-2.8B", "LLaVA-1.5-7B") else ("none", "q3f16_1")
    for name in names:
        expected = transformers_bytes(build_config(preset), name)
        assert found.weights.bytes(nano_format(name, "bfloat16")) == expected, name


@pytest.mark.parametrize(
    "fields", [QWEN2, BIASED, QWEN2 | {"tie_word_embeddings": False}], ids=["tied", "biased", "untied"]
)
@pytest.mark.parametrize("name", ["none", "q4f16_1", "q4f16_2", "q4f32_1"])
def test_biases_and_tied_ends(fields: dict[str, Any], name: str) -> None:
    from transformers import AutoConfig

    rest = {key: value for key, value in fields.items() if key != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **rest)
    shapes = weight_shapes(fields)
    assert isinstance(shapes, WeightShapes)
    assert shapes.bytes(nano_format(name, "bfloat16")) == transformers_bytes(config, name)


def test_the_default_model_needs_no_conversion(tmp_path: Path) -> None:
    found = architecture_of("smollm2", cache_dir=tmp_path)
    assert found.shape is not None
    assert (found.layers, found.shape.kv_heads, found.shape.key_dim, found.trained_length) == (30, 3, 64, 8192)
    assert isinstance(found.weights, WeightShapes)
    # the file's own number, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    assert found.weights.elements == 134_515_008
    from kvsuite.models.smollm2 import converted_path

    if not (converted_path() / "config.json").is_file():
        pytest.skip("the default model is not converted here, so there is nothing to compare with")
    assert architecture_of("smollm2") == found


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_architecture(preset: str) -> None:
    config = build_config(preset).get_text_config()
    found = architecture_of(f"dummy:{preset}")
    assert found.is_dummy
    assert (found.layers, found.hidden, found.vocabulary) == (
        config.num_hidden_layers, config.hidden_size, config.vocab_size,
    )  # fmt: skip
    assert found.trained_length == config.max_position_embeddings
    assert found.reads_images == (preset in ("LLaVA-1.5-7B", "tiny-llava"))
    assert found.window is None


def test_bytes_of_a_token() -> None:
    llama = architecture_of("dummy:Llama-3-8B")
    assert (llama.kv_bytes_per_token(2), llama.kv_bytes_per_token(4)) == (131_072, 262_144)


# folders


def folder(path: Path, name: str, content: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def mlc_config(**more: Any) -> dict[str, Any]:
    inner = {key: value for key, value in QWEN2.items() if key != "model_type"} | {"prefill_chunk_size": 96}
    return {
        "model_type": "llama", "quantization": "q4f32_1", "context_window_size": 256, "prefill_chunk_size": 96,
        "model_config": inner,
    } | more  # fmt: skip


def test_a_folder_with_a_config(tmp_path: Path) -> None:
    on = QWEN2 | {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1}
    found = architecture_of(folder(tmp_path / "mine", "config.json", on))
    assert (found.label, found.window, found.is_dummy) == ("mine", 128, False)
    assert found.shape is not None
    assert found.shape.key_dim == 16
    off = on | {"use_sliding_window": False}
    assert architecture_of(folder(tmp_path / "mine", "config.json", off)).window is None


def test_a_folder_of_mlc_weights(tmp_path: Path) -> None:
    found = architecture_of(folder(tmp_path / "mine-MLC", "mlc-chat-config.json", mlc_config()))
    assert (found.json_chunk, found.quantization, found.model_type, found.trained_length) == (
        96,
        "q4f32_1",
        "llama",
        512,
    )


def test_a_published_model_is_known_without_a_hub() -> None:
    found = architecture_of("HF://mlc-ai/Llama-3-8B-Instruct-q0f16-MLC")
    assert (found.layers, found.json_chunk, found.quantization, found.is_dummy) == (32, 2048, "q0f16", False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "config.json",
            {"model_type": "llama", "hidden_size": 4},
            "lacks vocab_size, num_hidden_layers, num_attention_heads, intermediate",
        ),
        ("config.json", QWEN2 | {"hidden_size": "wide"}, "cannot be read"),
        ("config.json", QWEN2 | {"num_attention_heads": 0}, "cannot be read"),
        ("config.json", "{", "cannot be read"),
        ("config.json", "[]", "is no JSON object"),
        ("mlc-chat-config.json", {"model_type": "llama"}, "has no model_config"),
        ("mlc-chat-config.json", mlc_config(model_config={"tensor_parallel_shards": 2}), "compiled for 2 GPUs"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        architecture_of(folder(tmp_path / "broken", name, content))


NONSENSE = {
    "negative layers": ({"num_hidden_layers": -4}, "num_hidden_layers=-4 must be a whole number from 1 to 10000"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be"),
    "3 for 4 heads": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "=4 cannot share num_key_value_heads=3"),
    "more keys than queries": ({"num_attention_heads": 4, "num_key_value_heads": 8}, "=4 cannot share num_key_value_heads=8"),
    "part of a size": ({"hidden_size": 64.5}, "hidden_size=64.5 must be a whole number"),
    "part of a head": ({"hidden_size": 65, "num_attention_heads": 4, "num_key_value_heads": 4}, "no multiple of"),
    "text": ({"vocab_size": "100"}, "vocab_size=100 must be a whole number"),
    "truth": ({"intermediate_size": True}, "intermediate_size=true must be"),
    "list": ({"head_dim": [64]}, r"head_dim=\[64\] must be"),
    "26 digits": ({"vocab_size": 10**26}, "vocab_size=1000.* must be a whole number from 1 to"),
    "window": ({"sliding_window": 1.5}, "sliding_window=1.5 must be a whole number"),
    "length": ({"max_position_embeddings": "many\n"}, r"max_position_embeddings=many\\n must be"),
    "part": ({"vision_config": [1]}, r"vision_config=\[1\] must be an object"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), NONSENSE.values(), ids=NONSENSE)
def test_an_architecture_that_no_model_can_have(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_fields(QWEN2 | changes, label="x", origin="x")
    if "vision_config" not in changes:
        inner = QWEN2 | changes
        with pytest.raises(UserError, match=message):
            read_fields({"model_type": "llava", "text_config": inner}, label="x", origin="x")


def test_a_configuration_nested_to_no_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        architecture_of(str(tmp_path))


def test_models_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"config.json is not in the local hub cache; give dummy:<preset>"):
        architecture_of("no-such-org/no-such-model")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"predicted from a config.json"):
        architecture_of(str(tmp_path / "weights.gguf"))
    with pytest.raises(UserError, match="unknown preset"):
        architecture_of("dummy:Llama-9")


@pytest.mark.parametrize(
    "fields",
    [
        QWEN2 | {"model_type": "olmo"},
        {"model_type": "gemma3", "text_config": QWEN2, "vision_config": {"model_type": "siglip"}},
        PRESETS["LLaVA-1.5-7B"] | {"text_config": QWEN2 | {"model_type": "olmo"}},
    ],
)  # fmt: skip
def test_shapes_that_are_not_known_say_so(fields: dict[str, Any]) -> None:
    found: Architecture = read_fields(fields, label="x", origin="x")
    assert isinstance(found.weights, str)
    assert "not known here" in found.weights


def test_predicting_needs_no_torch() -> None:
    code = """
import sys
from kvsuite.memory_model.config import architecture_of
from kvsuite.engines.mlc import memory_model as mlc
from kvsuite.engines.nano import memory_model as nano
from kvsuite.memory_model import fit
from kvsuite.memory_model.design_space import named_space
for request in ("dummy:Llama-3-8B", "smollm2", "HF://mlc-ai/Llama-3-8B-Instruct-q4f16_1-MLC"):
    model = architecture_of(request)
    for predictor in (mlc.MlcMemory.of(model), nano.NanoMemory(model)):
        predictor.predict(named_space("full", ["q4f16_1"]).points[0])
sys.exit(bool({"torch", "transformers", "pytest"} & sys.modules.keys()))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
