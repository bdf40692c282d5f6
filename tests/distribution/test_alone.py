from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweep_rows import REGISTRY, row, store_run

from kvsuite.distribution.alone import AloneTimes
from kvsuite.distribution.recorded import last_runs


def timed(name: str, seconds: float, workers: int, metric: str = "tpot_s", **fields: Any) -> dict[str, Any]:
    found = row(name, effective={"concurrent_workers": workers}, **fields)
    return found | {"metrics": {metric: REGISTRY.value(metric, seconds)}}


@pytest.fixture
def alone(tmp_path: Path) -> AloneTimes:
    store_run(tmp_path, [timed("a", 0.010, 1), timed("b", 0.010, 2), timed("c", 0.010, 1, status="oom")])
    found = AloneTimes()
    assert len(list(found.seen(last_runs(tmp_path)))) == 1, "runs pass through"
    return found


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0112, "tpot_s is 12.0% above that of "),
        (0.0095, "tpot_s is 5.0% below that of "),
        (0.01019, None),
        (0.00981, None),
    ],
)
def test_a_row_says_by_how_much_neighbours_disturbed_it(alone: AloneTimes, seconds: float, said: str | None) -> None:
    found = alone.warning(timed("a", seconds, 8))
    assert (found is None) == (said is None)
    if said is not None and found is not None:
        assert found.startswith(said)
        assert found.endswith("where the case was measured alone: 7 neighbour(s) may have disturbed it")


def test_what_is_not_known_is_not_said(alone: AloneTimes) -> None:
    assert alone.warning(timed("a", 1.0, 1)) is None, "it has no neighbours"
    assert alone.warning(timed("b", 1.0, 8)) is None, "no record of it alone"
    assert alone.warning(timed("c", 1.0, 8)) is None, "its record has no times"
    assert alone.warning(timed("a", 1.0, 8, settings_hash="sha256:other")) is None, "measured in another way"
    assert alone.warning(timed("a", 1.0, 8, metric="decode_step_s")) is None, "another metric"
    assert alone.warning(timed("a", 1.0, 8, status="crashed")) is None
    elsewhere = timed("a", 1.0, 8)
    elsewhere["effective"]["node"] = {"name": "b", "ip": "10.0.0.2"}
    assert alone.warning(elsewhere) is None, "a node of a cluster is another machine of the same kind"
