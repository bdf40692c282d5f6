"""Packed head vectors come back within the bound of their format; the bits are the documented ones."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache_formats.cache_format import CacheFormat, SideFormat
from kvsuite.cache_formats.pack import Packed, hadamard, pack, refuse_vectors, refused_vectors, unpack
from kvsuite.errors import CaseInvalid

WIDTH, TOKENS = 16, 8
_STEPS = {"int8": 127, "int4": 15}
quick = settings(max_examples=60)


def _row(kind: str, draw: np.random.Generator) -> np.ndarray:
    """A head vector of the kind."""
    size = 10.0 ** draw.uniform(-3, 4.7)
    if kind == "outlier":
        found = draw.normal(size=WIDTH) * 1e-3
        found[draw.integers(WIDTH)] = size * draw.choice([-1, 1])
        return found
    return {
        "normal": draw.normal(size=WIDTH) * size / 8,
        "shifted": size + draw.normal(size=WIDTH) * 1e-3 * size,
        "equal": np.full(WIDTH, size * draw.choice([-1, 1])),
        "zero": np.zeros(WIDTH),
        "below float16": draw.normal(size=WIDTH) * 2.0**-24,
        "subnormal": draw.normal(size=WIDTH) * 2.0**-130,
    }[kind]


KINDS = ("normal", "shifted", "outlier", "equal", "zero", "below float16", "subnormal")
matrices = st.builds(
    lambda kinds, seed: torch.tensor(
        np.stack([_row(kind, np.random.default_rng((seed, at))) for at, kind in enumerate(kinds)]), dtype=torch.float32
    )[None, None],
    st.lists(st.sampled_from(KINDS), min_size=TOKENS, max_size=TOKENS),
    st.integers(0, 2**32 - 1),
)
sides = st.builds(SideFormat, st.sampled_from(["int8", "int4"]), st.booleans(), st.sampled_from([2, 4, 8])) | st.builds(
    SideFormat, st.sampled_from(["int8", "int4"])
)


def _groups(side: SideFormat, x: torch.Tensor) -> np.ndarray:
    found = x[0, 0].double().numpy()
    if side.per_channel:
        found = found.reshape(TOKENS // side.token_group, side.token_group, WIDTH).transpose(0, 2, 1)
        return found.reshape(-1, side.token_group)
    return found.reshape(-1, side.group or WIDTH)


@quick
@given(sides, matrices)
def test_no_number_is_further_off_than_half_a_step(side: SideFormat, x: torch.Tensor) -> None:
    packed = pack(side, x)
    assert not refused_vectors(side, x, packed)
    back = unpack(side, packed, torch.float32)
    groups, again = _groups(side, x), _groups(side, back)
    count = side.numbers_of_group
    numbers_of = packed.scales[0, 0].double().numpy().reshape(-1, count)
    if side.per_channel:
        numbers_of = packed.scales[0, 0].double().numpy().reshape(TOKENS // side.token_group * WIDTH, count)
    step = numbers_of[:, :1]
    error = np.abs(groups - again)
    # half a step, and the rounding of a division, a product and a sum in float32
    assert (error <= step / 2 * (1 + 1e-5) + 2**-23 * np.abs(groups)).all()
    # and the step is no wider than what the group spans asks for, but for the roundings to float16
    low = groups.min(-1, keepdims=True)
    asked = (groups.max(-1, keepdims=True) - low if count == 2 else np.abs(groups).max(-1, keepdims=True)) / _STEPS[
        side.number
    ]
    lost = 2**-10 * np.abs(low) / 15 if count == 2 else 0.0
    assert (step <= (asked + lost) * (1 + 2**-9) + 2**-23).all()


@quick
@given(matrices, st.sampled_from([None, 4]))
def test_fp8_is_the_nearest_of_its_numbers(x: torch.Tensor, group: int | None) -> None:
    side = SideFormat("fp8_e4m3", group=group)
    packed = pack(side, x)
    assert not refused_vectors(side, x, packed)
    back = unpack(side, packed, torch.float64)
    scale = 1.0
    if group is not None:
        scale = packed.scales.double().unflatten(-1, (-1, 1)).expand(-1, -1, -1, -1, group).flatten(-2)
    limited = x.double().clamp(-448, 448) if group is None else x.double()
    # three bits behind the point, and subnormals of 2^-9
    assert ((limited - back).abs() <= limited.abs() * 2**-4 * (1 + 1e-6) + scale * 2**-10 * (1 + 1e-6)).all()


def test_fp8_holds_its_largest_number_for_larger_ones() -> None:
    side = SideFormat("fp8_e4m3")
    x = torch.tensor([[[[1e4, -1e4, 448.0, 2**-9]]]])
    assert unpack(side, pack(side, x), torch.float32).tolist() == [[[[448.0, -448.0, 448.0, 2**-9]]]]


def test_zeros_come_back_as_zeros() -> None:
    x = torch.zeros(1, 1, TOKENS, WIDTH)
    for name in ("int8", "int4", "int4_channel(group=4)", "fp8_e4m3", "fp8_e4m3(group=4)", "int4+hadamard"):
        chosen = CacheFormat.parse(name)
        assert chosen is not None
        assert torch.equal(unpack(chosen.keys, pack(chosen.keys, x), torch.float32), x)


@pytest.mark.parametrize(
    "name", ["int8", "int4", "int4_channel(group=4)", "fp8_e4m3", "fp8_e4m3(group=4)", "int8+hadamard"]
)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    chosen = CacheFormat.parse(name)
    assert chosen is not None
    x = torch.ones(1, 1, TOKENS, WIDTH)
    x[0, 0, 3, 5] = bad
    found = refused_vectors(chosen.keys, x, pack(chosen.keys, x))
    with pytest.raises(CaseInvalid, match="not finite"):
        refuse_vectors(found, name)


def test_what_is_larger_than_scales_reach_is_refused() -> None:
    x = torch.full((1, 1, 1, WIDTH), 1e8)
    side = SideFormat("int8")
    assert refused_vectors(side, x, pack(side, x))


def test_int4_to_the_bit() -> None:
    # least value -1 and step up16(16 / 15), the least float16 that is no smaller: 1 + 69 / 1024
    x = torch.tensor([[[[-1.0, 0.0, 7.5, 15.0]]]])
    packed = pack(SideFormat("int4"), x)
    assert packed.scales.tolist() == [[[[1 + 69 / 1024, -1.0]]]]
    # levels 0, 0.94, 7.96, 14.99
    assert packed.codes.tolist() == [[[[0 | 1 << 4, 8 | 15 << 4]]]]
    back = unpack(SideFormat("int4"), packed, torch.float32)
    assert back.tolist() == [[[[-1.0, 69 / 1024, -1 + 8 * (1 + 69 / 1024), -1 + 15 * (1 + 69 / 1024)]]]]


def test_int8_to_the_bit_and_halves_go_to_even() -> None:
    x = torch.tensor([[[[127.0, 2.5, -3.5, -127.0]]]])
    packed = pack(SideFormat("int8"), x)
    assert packed.scales.tolist() == [[[[1.0]]]]
    assert packed.codes.tolist() == [[[[127, 2, 256 - 4, 256 - 127]]]]


def test_scales_are_rounded_away_from_zero_at_the_ends_of_float16() -> None:
    for largest in (127 * 2.0**-24, 127 * 2.0**-26, 127 * 1.0004, 127 * 2047.5):
        scale = pack(SideFormat("int8"), torch.full((1, 1, 1, 2), largest)).scales[0, 0, 0, 0].double().item()
        wanted = largest / 127
        below = np.nextafter(np.float16(scale), np.float16(0)).astype(float)
        assert below < np.float32(wanted) <= scale


@quick
@given(st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_the_rotation_is_orthogonal_and_its_own_inverse(power: int, seed: int) -> None:
    n = 2**power
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    turned = hadamard(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hadamard(turned), x, rtol=1e-5, atol=1e-5)
    # the matrix of Sylvester: the sign at (i, j) is the parity of the bits that both have
    matrix = [[(-1) ** bin(i & j).count("1") / n**0.5 for j in range(n)] for i in range(n)]
    torch.testing.assert_close(turned, x @ torch.tensor(matrix), rtol=1e-4, atol=1e-5)


@quick
@given(matrices, sides)
def test_a_token_packs_alike_whatever_stands_beside_it(x: torch.Tensor, side: SideFormat) -> None:
    side = SideFormat(side.number, side.per_channel, side.group, hadamard=True)
    step = side.token_group
    whole = pack(side, x)
    parts = [pack(side, x[:, :, at : at + step]) for at in range(0, TOKENS, step)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts], 2))
    assert (
        torch.equal(
            whole.scales,
            torch.cat([part.scales for part in parts], 2),
        )
        or whole.scales.isnan().any()
    )


@pytest.mark.parametrize(
    "name", ["int8", "int4(group=8)", "fp8_e4m3", "int8_channel(group=4)", "int4_channel(group=2)+hadamard"]
)
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    chosen = CacheFormat.parse(name)
    assert chosen is not None
    packed = pack(chosen.keys, torch.randn(2, 3, TOKENS, WIDTH))
    assert packed.codes.nbytes + packed.scales.nbytes == 6 * chosen.keys.bytes(WIDTH, TOKENS, 4)


def test_unpacking_goes_by_bits_alone() -> None:
    codes = torch.tensor(list(struct.pack("4b", 1, -1, 127, -127)), dtype=torch.uint8).view(1, 1, 1, 4)
    packed = Packed(codes, torch.tensor([0.5], dtype=torch.float16).view(1, 1, 1, 1))
    assert unpack(SideFormat("int8"), packed, torch.float32).tolist() == [[[[0.5, -0.5, 63.5, -63.5]]]]
