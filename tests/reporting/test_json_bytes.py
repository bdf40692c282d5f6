"""Documents are indented as Python indents them, only faster."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.reporting.aggregate import json_bytes

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


# drawing nested values takes most of the time
@settings(max_examples=40)
@given(st.dictionaries(st.text(), VALUES))
def test_the_text_is_that_of_the_standard_library(document: dict[str, object]) -> None:
    assert json_bytes(document, "here").decode() == json.dumps(document, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="here: holds NaN or an infinity"):
        json_bytes({"a": [value]}, "here")


def test_a_name_that_is_not_utf8_is_escaped() -> None:
    assert json.loads(json_bytes({"path": "a\udcffb"}, "here")) == {"path": "a\udcffb"}
