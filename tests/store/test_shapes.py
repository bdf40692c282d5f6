"""The fast check of a record accepts nothing that the schema refuses, and all that a run writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from record_rows import build_row

from kvsuite.errors import UserError
from kvsuite.record import schema
from kvsuite.store.shapes import is_record
from kvsuite.store.validate import validate

VALIDATOR = Draft202012Validator(schema("record"))
SEEDS = [
    build_row("baseline"),
    build_row("dummy", kind="dummy"),
    build_row("one", throughput=90.0, case_index=3, sidecar="tokens/a.parquet", duration_s=1.5, warnings=["w"]),
    build_row("failed", status="error", error={"type": "E", "message": "m", "traceback": None}),
    build_row("skipped", status="skipped", reason="no GPU"),
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3), st.sampled_from(["ok", "invalid", "skipped", "lower", "timed", ""]),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=2), SCALARS, max_size=2))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place below a value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in children for found in ((*path, key), *places(child, (*path, key)))]


@pytest.mark.parametrize("row", SEEDS, ids=lambda row: row["case"]["name"])
def test_what_a_run_writes_needs_no_second_look(row: dict[str, Any]) -> None:
    assert is_record(row)
    assert is_record(row | {"unknown": [1, {"x": None}]})


@given(st.sampled_from(SEEDS), st.data())
def test_what_is_accepted_is_valid(row: dict[str, Any], data: st.DataObject) -> None:
    changed = copy.deepcopy(row)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(changed)))
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()) and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = data.draw(VALUES)
    errors = list(VALIDATOR.iter_errors(changed))
    if is_record(changed):
        assert errors == []
    try:
        validate("record", changed, "here")
    except UserError:
        assert errors
    else:
        assert not errors


@pytest.mark.parametrize("row", [*SEEDS, None, [], "record", 3, {}])
@pytest.mark.parametrize("place", ["case_index", "order_index", "rounds"])
def test_mixed_types_of_a_number_are_told(row: Any, place: str) -> None:
    rows = [SEEDS[0], row | {place: "1"} if isinstance(row, dict) else row]
    report = {"schema": "kvsuite.report/1", "run": {}, "environment": {}, "counts": {}, "records": rows}
    with pytest.raises(UserError, match=r"not a valid report, at (run|counts|top level)"):
        validate("report", report, "here")
    with pytest.raises(UserError, match="not a valid record, at "):
        validate("record", rows[1], "here")
