from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny_models import ids, tiny_llama, tiny_neox

from kvsuite.errors import CaseSkipped
from kvsuite.quantization.apply import apply_quantization
from kvsuite.quantization.bitsandbytes import linear_bytes
from kvsuite.quantization.bytes import predicted_weight_bytes
from kvsuite.quantization.registry import QUANTIZATIONS, unavailable

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_it = pytest.mark.skipif(
    not INSTALLED, reason='bitsandbytes is not installed: pip install "kvsuite[quantization]"'
)


@pytest.mark.parametrize("name", ["4bit", "8bit"])
@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_missing_package_skips_with_the_install_line(name: str) -> None:
    with pytest.raises(CaseSkipped, match=rf'{name} needs bitsandbytes, .*pip install "kvsuite\[quantization\]"'):
        apply_quantization(tiny_llama(), name)


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_a_device_that_lacks_it_is_named(name: str) -> None:
    assert unavailable(name, "mps") == f"{name} by bitsandbytes runs on cpu and cuda, not on mps"


def test_group_formats_need_a_device_with_a_kernel():
    assert unavailable("q4f16_1", "mps") == "q4f16_1 runs on cpu and cuda, not on mps; use none or q0f16"
    assert [name for name in QUANTIZATIONS if name not in ("4bit", "8bit") and unavailable(name, "cpu")] == []


def test_bytes_of_a_matrix():
    # 64 x 64 values: 2048 bytes, 64 block maxima, one float32 for them, 16 levels, 256 levels of maxima, an offset
    assert linear_bytes("4bit", 64, 64) == 2048 + 64 + 4 + 64 + 1024 + 4
    assert linear_bytes("8bit", 64, 100) == 6400 + 256


def test_prediction_leaves_the_final_layer_dense():
    model = tiny_llama().model
    rest = 2 * model.lm_head.weight.nbytes + 5 * 72 * 4 + sum(b.nbytes for b in model.buffers())
    linear = sum(m.weight.numel() + 4 * m.out_features for n, m in model.named_modules() if n.endswith("_proj"))
    assert predicted_weight_bytes(model, "8bit") == rest + linear


@needs_it
@pytest.mark.parametrize("name", ["4bit", "8bit"])
@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_llama(tied=True), tiny_neox])
def test_conversion(build, name: str) -> None:
    model, reference = build(), build()
    facts = apply_quantization(model, name)
    assert facts.weight_bytes == facts.predicted_weight_bytes
    assert type(model.model.get_output_embeddings()) is torch.nn.Linear
    with torch.inference_mode():
        found, expected = model.model(ids()).logits, reference.model(ids()).logits
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < (0.3 if name == "4bit" else 0.05)
