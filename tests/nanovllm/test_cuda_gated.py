"""The product of gate and up with its activation inside. On Hopper, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and (not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9):
    pytest.skip("the kernel needs Hopper", allow_module_level=True)

from torch.nn import functional  # noqa: E402

from kvsuite.nanovllm.gated_linear import gated_linear, is_faster, takes  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter multiplies bfloat16 as the integers that hold it
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
# one tile and less, tiles that are not whole, more tiles of rows than share weights
SHAPES = [(1, 128, 64), (64, 256, 192), (130, 328, 200), (2300, 264, 328), (5000, 128, 64)]


def _random(*shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "width"), SHAPES)
@pytest.mark.parametrize("processors", [1, 132])
def test_gated_linear(rows, features, width, dtype, processors):
    x, weight = _random(rows, width, dtype=dtype), _random(2 * features, width, dtype=dtype) / width**0.5
    assert takes(weight)
    gate, other = (x.double() @ weight.double().T).chunk(2, dim=-1)
    expected = functional.silu(gate) * other
    found = gated_linear(x, weight, processors)
    assert found.shape == (rows, features)
    error = (found.double() - expected).norm() / expected.norm()
    # rounded once
    assert error < {torch.bfloat16: 2.2e-3, torch.float16: 3e-4}[dtype]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_activations_have_both_ends():
    """Gates so large that an exponential overflows are open or shut."""
    x = torch.zeros(4, 64, dtype=DTYPES[0], device=DEVICE)
    x[:, 0] = torch.tensor([300.0, -300.0, 40.0, -40.0])
    weight = torch.zeros(256, 64, dtype=DTYPES[0], device=DEVICE)
    weight[:128, 0], weight[128:, 0] = 1.0, 1 / 64
    found = gated_linear(x, weight, 2)[:, 0].tolist()
    assert found[0] == pytest.approx(300 * 300 / 64, rel=4e-3)
    assert found[1] == 0
    assert found[2] == pytest.approx(40 * 40 / 64, rel=4e-3)
    assert abs(found[3]) < 1e-14


def test_what_the_kernel_takes():
    def weight(rows, width, dtype=torch.bfloat16):
        return torch.empty(rows, width, dtype=dtype)

    assert takes(weight(256, 64))
    assert takes(weight(2 * 1000, 72, torch.float16))
    assert not takes(weight(2 * 1001, 64))
    assert not takes(weight(256, 60))
    assert not takes(weight(256, 64, torch.float32))


def test_a_last_turn_of_few_tiles_is_left_to_torch():
    """12,288 outputs are 96 tiles for every 128 rows, of which 132 SMs make as many at a time."""
    taken = [rows for rows in range(128, 1281, 128) if is_faster(rows, 12288, 132)]
    assert taken == [512, 640, 1024, 1152, 1280]
    assert not is_faster(511, 12288, 132)
    assert all(is_faster(rows, 12288, 132) for rows in range(1000, 17000, 37))
    # a part of the SMs has turns of its own
    assert is_faster(768, 12288, 96)
