"""Counts of SMs: what is asked for, and what a device can give."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.case import id_token
from kvsuite.errors import CaseInvalid, CaseSkipped
from kvsuite.options.option import list_of
from kvsuite.options.sm_pairs import sm_pair
from kvsuite.sm_split import PartitionRequest, granularity, left_by, nearest, requests, split

# prompt share, decode share, total, capability: asked and given, as (prompt, decode)
PUBLISHED = [
    (0.2, 0.8, 108, (8, 0), (21, 86), (20, 86)),
    (0.25, 0.75, 108, (8, 0), (27, 81), (26, 80)),
    (0.5, 0.5, 108, (8, 0), (54, 54), (54, 54)),
    (0.2, 0.8, 128, (8, 9), (25, 102), (24, 102)),
    (0.25, 0.75, 128, (8, 9), (32, 96), (32, 96)),
    (0.5, 0.5, 128, (8, 9), (64, 64), (64, 64)),
    (0.1, 0.9, 132, (9, 0), (13, 118), (8, 112)),
    (0.2, 0.8, 132, (9, 0), (26, 105), (24, 104)),
    (0.25, 0.75, 132, (9, 0), (33, 99), (32, 96)),
    (0.3, 0.7, 132, (9, 0), (39, 92), (32, 88)),
    (0.4, 0.6, 132, (9, 0), (52, 79), (48, 72)),
    (0.5, 0.5, 132, (9, 0), (66, 66), (64, 64)),
]
CAPABILITIES = st.sampled_from([(6, 1), (7, 0), (8, 0), (8, 9), (9, 0)])
SHARES = st.floats(0.01, 1.0)


@pytest.mark.parametrize(("prompt", "decode", "total", "capability", "asked", "given"), PUBLISHED)
def test_shares_are_rounded_down_to_what_the_hardware_parts_by(prompt, decode, total, capability, asked, given):
    found = split(PartitionRequest(decode=decode, prompt=prompt), total=total, capability=capability)
    assert found.requested == asked[::-1]
    assert (found.prompt_sms, found.decode_sms) == given


@pytest.mark.parametrize("pair", [(32, 96), (24, 104), (16, 112), (40, 88), (64, 64), (8, 124 - 4)])
def test_legal_counts_of_a_hopper_are_taken_as_they_are(pair):
    found = split(PartitionRequest(decode=pair[0], prompt=pair[1]), total=132, capability=(9, 0))
    assert (found.decode_sms, found.prompt_sms, found.requested) == (*pair, pair)


def test_illegal_counts_are_refused_and_the_nearest_legal_ones_named():
    with pytest.raises(CaseInvalid, match=r"66:66: .*multiples of 8.*nearest: 64:64 or 56:64"):
        split(PartitionRequest(decode=66, prompt=66), total=132, capability=(9, 0))
    with pytest.raises(CaseInvalid, match=r"13:119: .*nearest: 8:120 or 16:112"):
        split(PartitionRequest(decode=13, prompt=119), total=132, capability=(9, 0))
    with pytest.raises(CaseInvalid, match=r"104:104: .*132 together at most"):
        split(PartitionRequest(decode=104, prompt=104), total=132, capability=(9, 0))


def test_a_share_that_rounds_to_nothing_is_refused():
    with pytest.raises(CaseInvalid, match=r"0.95:0.05 \(125:6 SMs\).*8 at least"):
        split(PartitionRequest(decode=0.95, prompt=0.05), total=132, capability=(9, 0))


def test_the_decode_lane_gives_way_first():
    found = split(PartitionRequest(decode=0.9, prompt=0.5), total=132, capability=(9, 0))
    assert found.requested == (66, 66)


def test_an_unbound_decode_lane_has_the_whole_device():
    found = split(PartitionRequest(decode=99, prompt=32, decode_bound=False), total=132, capability=(9, 0))
    assert (found.decode_sms, found.prompt_sms) == (132, 32)


def test_the_granularity_of_a_new_architecture_is_not_guessed():
    assert granularity((8, 9)) == (4, 2)
    with pytest.raises(CaseSkipped, match=r"compute capability 10\.0"):
        granularity((10, 0))


@given(SHARES, SHARES, st.integers(1, 200), CAPABILITIES)
def test_what_is_given_is_legal_and_no_more_than_asked(decode, prompt, total, capability):
    least, multiple = granularity(capability)
    try:
        found = split(PartitionRequest(decode=decode, prompt=prompt), total=total, capability=capability)
    except CaseInvalid:
        return
    for count, asked in zip((found.decode_sms, found.prompt_sms), found.requested, strict=True):
        assert count >= least
        assert count % multiple == 0
        assert count <= asked
    assert found.decode_sms + found.prompt_sms <= total


@given(SHARES, SHARES, CAPABILITIES)
def test_swapped_shares_that_fit_swap_the_counts(decode, prompt, capability):
    if decode + prompt > 1:
        return
    try:
        one = split(PartitionRequest(decode=decode, prompt=prompt), total=132, capability=capability)
    except CaseInvalid:
        with pytest.raises(CaseInvalid):
            split(PartitionRequest(decode=prompt, prompt=decode), total=132, capability=capability)
        return
    other = split(PartitionRequest(decode=prompt, prompt=decode), total=132, capability=capability)
    assert (one.decode_sms, one.prompt_sms) == (other.prompt_sms, other.decode_sms)


@given(st.integers(1, 200), st.integers(1, 200), CAPABILITIES)
def test_pairs_named_as_nearest_are_legal_themselves(decode, prompt, capability):
    for pair in nearest((decode, prompt), total=132, capability=capability):
        split(PartitionRequest(decode=pair[0], prompt=pair[1]), total=132, capability=capability)


@given(
    st.one_of(
        st.builds(PartitionRequest, decode=st.integers(1, 200), prompt=st.integers(1, 200), decode_bound=st.booleans()),
        st.builds(PartitionRequest, decode=SHARES, prompt=SHARES, decode_bound=st.booleans()),
    )
)
def test_a_request_survives_json_and_its_id_is_a_piece_of_a_pytest_id(request_):
    assert PartitionRequest.of(json.loads(json.dumps(request_.to_dict()))) == request_
    assert id_token(request_.id) == request_.id


def test_ids_and_json_of_a_case():
    assert PartitionRequest(decode=64, prompt=64).id == "sm64_64"
    assert PartitionRequest(decode=24, prompt=104).to_dict() == {"decode_sms": 24, "prompt_sms": 104}
    free = PartitionRequest(decode=0.75, prompt=0.25, decode_bound=False)
    assert free.id == "sm0.75_0.25_free"
    assert free.to_dict() == {"decode_ratio": 0.75, "prompt_ratio": 0.25, "decode_bound": False}


@pytest.mark.parametrize(
    "partition",
    [{}, {"decode_sms": 64}, {"decode_sms": 64, "prompt_ratio": 0.5}, {"decode_sms": 8, "prompt_sms": 8, "more": 1}],
)
def test_a_partition_that_says_something_else_is_refused(partition):
    with pytest.raises(CaseInvalid, match="give decode_sms and prompt_sms, or"):
        PartitionRequest.of(partition)


@pytest.mark.parametrize(("decode", "prompt"), [(0, 8), (8, -8), (64, 0.5), (0.5, 8), (1.5, 0.5), (True, 8)])
def test_counts_and_shares_that_cannot_be_are_refused(decode, prompt):
    with pytest.raises(CaseInvalid, match=r"^partition"):
        PartitionRequest(decode=decode, prompt=prompt)


def test_what_the_command_line_names():
    assert [one.id for one in requests(((64, 64), (32, 96)), (0.2,), None)] == ["sm64_64", "sm32_96"]
    assert [one.id for one in requests(None, None, None)] == ["sm0.75_0.25"]
    assert [one.id for one in requests(None, (0.2, 0.3), None)] == ["sm0.8_0.2", "sm0.7_0.3"]
    assert [one.id for one in requests(None, (0.2,), (0.8, 0.5))] == ["sm0.8_0.2", "sm0.5_0.2"]
    assert left_by(0.99) == 0.05


def test_pairs_are_typed_with_a_colon():
    assert list_of(sm_pair)("64:64, 32:96") == ((64, 64), (32, 96))
    for typed, wrong in (("64", "not a pair"), ("64:64:4", "not a pair"), ("0:64", "at least 1"), ("a:64", "whole")):
        with pytest.raises(ValueError, match=wrong):
            sm_pair(typed)
