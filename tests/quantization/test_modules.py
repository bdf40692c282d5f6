from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvsuite.quantization.formats import GROUP_FORMATS, GroupFormat
from kvsuite.quantization.modules import GroupEmbedding, GroupLinear
from kvsuite.quantization.packed import PackedWeight

FORMATS = [pytest.param(spec, id=name) for name, spec in GROUP_FORMATS.items()]
ROWS, COLUMNS = 50, 90


def weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


def tokens(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)


def packed(spec: GroupFormat) -> PackedWeight:
    return PackedWeight.pack(weight(), spec, transposed=spec.transposed)


@pytest.mark.parametrize("block", [100, 1 << 20])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("spec", FORMATS)
def test_linear_equals_the_product_with_the_dequantised_weight(
    spec: GroupFormat, with_bias: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvsuite.quantization.modules._BLOCK", block)
    dtype = getattr(torch, spec.dtype)
    bias = nn.Parameter(torch.linspace(-1, 1, ROWS).to(dtype), requires_grad=False) if with_bias else None
    layer = GroupLinear(packed(spec), bias)
    for shape in ((1,), (3,), (2, 5)):
        x = tokens(*shape, dtype=dtype)
        exact = F.linear(x.double(), layer.packed.dense().double(), None if bias is None else bias.double())
        out = layer(x)
        assert out.shape == (*shape, ROWS)
        assert out.dtype == dtype
        # one rounding to the model dtype behind float32 sums
        torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("spec", FORMATS)
def test_embedding_gathers_dequantised_rows(spec: GroupFormat) -> None:
    table = PackedWeight.pack(weight(), spec, transposed=False)
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    assert torch.equal(GroupEmbedding(table)(ids), table.dense()[ids])


@pytest.mark.parametrize("spec", FORMATS)
def test_a_part_of_the_rows_is_that_part(spec: GroupFormat) -> None:
    whole = packed(spec)
    assert torch.equal(whole.dense(11, 23), whole.dense()[11:23])


def test_gradients_flow_to_the_input():
    layer = GroupLinear(packed(GROUP_FORMATS["q4f32_1"]))
    x = tokens(3, dtype=torch.float32).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.packed.dense().sum(0).expand(3, -1))


def test_no_dense_copy_is_kept():
    layer = GroupLinear(packed(GROUP_FORMATS["q4f16_1"]))
    layer(tokens(4, dtype=torch.float16))
    held = sum(t.untyped_storage().nbytes() for t in layer.state_dict().values())
    assert held == GROUP_FORMATS["q4f16_1"].bytes(ROWS, COLUMNS, 2)
    assert held < 0.4 * ROWS * COLUMNS * 2
    assert not list(layer.parameters())


def test_state_dict_round_trip():
    source, target = GroupLinear(packed(GROUP_FORMATS["q3f16_1"])), GroupLinear(packed(GROUP_FORMATS["q3f16_1"]))
    target.packed.words.zero_()
    target.load_state_dict(source.state_dict())
    x = tokens(2, dtype=torch.float16)
    assert torch.equal(source(x), target(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [1, 2, 17, 64, 65])
@pytest.mark.parametrize("spec", FORMATS)
def test_cuda_equals_the_product_with_the_dequantised_weight(spec: GroupFormat, count: int) -> None:
    from kvsuite.quantization.triton_kernels import dequantize

    dtype = getattr(torch, spec.dtype)
    bias = nn.Parameter(torch.linspace(-1, 1, ROWS).to(dtype), requires_grad=False)
    layer = GroupLinear(packed(spec), bias).cuda()
    dense = layer.packed.dense()
    assert torch.equal(dequantize(layer.packed), dense)
    assert torch.equal(dequantize(layer.packed, 11, 23), dense[11:23])
    x = tokens(count, dtype=dtype).cuda()
    exact = F.linear(x.double(), dense.double(), bias.double())
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(layer(x).double(), exact, **tolerance)
