from __future__ import annotations

import subprocess
import sys

import pytest

from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.quantization.registry import QUANTIZATIONS, label, quantization, selected_formats, unavailable


def test_names():
    expected = "none fake_q3 4bit 8bit q0f16 q0f32 q3f16_1 q4f16_0 q4f16_1 q4f16_2 q4f32_1"
    assert list(QUANTIZATIONS) == expected.split()
    assert [name for name, item in QUANTIZATIONS.items() if item.quality_only] == ["fake_q3"]
    assert QUANTIZATIONS["q4f32_1"].compute_dtype == "float32"
    assert QUANTIZATIONS["q3f16_1"].compute_dtype == "float16"


@pytest.mark.parametrize(
    "ask", [quantization, lambda name: label(name, "float32"), lambda name: unavailable(name, "cpu")]
)
def test_unknown_name(ask) -> None:
    with pytest.raises(UserError, match="--kv-quantization=int4: unknown weight format; choose from none, fake_q3, "):
        ask("int4")


def test_labels():
    assert [label("none", dtype) for dtype in ("float32", "float16", "bfloat16")] == ["fp32", "fp16", "bf16"]
    assert label("q4f16_1", "float16") == "q4f16_1"


def test_asking_imports_no_torch():
    code = (
        "import sys; from kvsuite.quantization.registry import quantization, unavailable; "
        "quantization('q4f16_1'); unavailable('q4f16_1', 'cuda:0'); unavailable('none', 'cpu'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_formats_of_the_options_are_known_or_refused() -> None:
    assert selected_formats(default_options()) is None
    assert selected_formats(default_options(quantization="none,4bit")) == ("none", "4bit")
    assert selected_formats(default_options(fake_q3bit="true")) == ("fake_q3",)
    with pytest.raises(UserError) as caught:
        selected_formats(default_options(quantization="none,nonsense"))
    assert str(caught.value) == (
        f"--kv-quantization=none,nonsense: unknown weight format nonsense; use {', '.join(QUANTIZATIONS)}; for example "
        "--kv-quantization=none,q4f16_1"
    )
