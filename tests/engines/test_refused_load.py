"""What only sessions that serve under load do is refused by others in a line, not ignored."""

from __future__ import annotations

from typing import Any

import pytest
from hf_sessions import case, session

from kvsuite.engines.capabilities import ServesUnderLoad, lacking, refuse_load
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid

LATER: dict[str, Any] = {"arrival_s": 0.5}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (LATER, "engine hf serves all requests at once, not by their arrivals; use --kv-engine=nano"),
        ({"forced": [1, 2]}, "engine hf takes no forced output and returns no losses of it; use --kv-engine=nano"),
        ({"rows": 4}, "engine hf takes no forced output and returns no losses of it; use --kv-engine=nano"),
    ],
)
def test_engine_hf_refuses(asked: dict[str, Any], said: str) -> None:
    session().prepare(case())
    with pytest.raises(CaseInvalid) as refused:
        session().serve([ServeRequest([5, 6, 7], 2, **asked)])
    assert str(refused.value) == said


def test_the_name_of_the_engine_is_in_the_line() -> None:
    refuse_load([ServeRequest([5], 2)], "mlc")
    with pytest.raises(CaseInvalid, match="engine mlc serves all requests at once"):
        refuse_load([ServeRequest([5], 2), ServeRequest([5], 2, **LATER)], "mlc")


def test_what_hf_lacks_is_said() -> None:
    reason = lacking(session(), ServesUnderLoad)
    assert reason == "this engine serves all requests at once, not by their arrivals; use --kv-engine=nano"
