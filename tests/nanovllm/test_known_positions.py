"""The oldest token that goes, found in a ring and by looking: the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.nanovllm.known_positions import KnownPositions


@given(
    older=st.integers(0, 4),
    ring=st.integers(1, 6),
    begins=st.lists(st.integers(0, 50), min_size=1, max_size=3),
    turned=st.integers(0, 5),
    steps=st.integers(1, 20),
)
def test_a_ring_goes_on_as_one_looks(older: int, ring: int, begins: list[int], turned: int, steps: int) -> None:
    length, rows = older + ring, np.arange(len(begins))[::-1].copy()
    known, plain = (KnownPositions(len(begins), length + 1) for _ in range(2))
    for row, begin in zip(rows.tolist(), begins, strict=True):
        window = np.roll(np.arange(ring), turned) + older + begin
        for each in (known, plain):
            each.write(np.full(length, row), np.arange(length), np.concatenate([np.arange(older), window]))
    newest = np.array(begins) + length
    assert known.in_ring(older, rows, length).all()
    for step in range(steps):
        plain.write(rows, np.full(len(rows), length), newest + step)
        wanted = plain.behind(older, rows, length + 1)
        plain.move(rows, np.full(len(rows), length), wanted)
        assert known.turn(older, rows, length, newest + step).tolist() == wanted.tolist()
        assert known.read(rows, length).tolist() == plain.read(rows, length).tolist()
        assert plain.in_ring(older, rows, length).all()


@given(older=st.integers(0, 3), positions=st.permutations(range(6)), left_out=st.integers(0, 6), data=st.data())
def test_what_is_no_ring_is_not_taken_for_one(
    older: int, positions: list[int], left_out: int, data: st.DataObject
) -> None:
    # a ring with a gap, or out of turn, would go on at another place than the oldest
    found = np.array([each + (each >= left_out) for each in positions])
    known = KnownPositions(1, 7)
    row = np.array([0])
    known.write(np.zeros(6, dtype=np.int64), np.arange(6), found)
    if not known.in_ring(older, row, 6)[0]:
        return
    newest = int(found.max()) + 1
    for step in range(8):
        known.write(row, np.array([6]), np.array([newest + step]))
        wanted = known.behind(older, row, 7)
        assert known.turn(older, row, 6, np.array([newest + step])).tolist() == wanted.tolist()


def test_a_ring_is_seen_where_it_is_one_and_only_there() -> None:
    known = KnownPositions(4, 5)
    # a ring, one out of turn, one with a gap, one with a younger token in front
    for row, positions in enumerate(([0, 1, 7, 5, 6], [0, 1, 7, 6, 5], [0, 1, 5, 6, 10], [0, 9, 7, 5, 6])):
        known.write(np.full(5, row), np.arange(5), np.array(positions))
    assert known.in_ring(2, np.arange(4), 5).tolist() == [True, False, False, False]
