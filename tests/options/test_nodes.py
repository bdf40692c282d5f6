from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.options.nodes import MOST_WORKERS, NodesText
from kvsuite.options.resolve import default_options
from kvsuite.options.sweep import SweepOptions


def test_workers_and_their_cards() -> None:
    assert NodesText.parse_all("8xH200, 2xL40S") == (NodesText(8, "H200"), NodesText(2, "L40S"))
    (own,) = NodesText.parse_all("3xA100-X:40GB:1.5TB/s")
    assert own == NodesText(3, "A100-X", 40 * 10**9, 1.5e12)


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("H200", "no list of workers; use workers and their card"),
        ("8xH200,", "no list of workers; use workers and their card"),
        ("8 H200", "no list of workers; use workers and their card"),
        ("0xH200", "every card needs a worker"),
        ("1xN:24GiB:0GB/s", "every card needs a worker and a bandwidth above 0"),
        ("2xFOO:0GiB:300GB/s", "0GiB is no size of a card; use workers and their card"),
        ("1xN:24GiB", "no list of workers; use workers and their card"),
        ("8xH200,2xh200", "names a card twice"),
        (f"{MOST_WORKERS}xH200,1xL4", f"no more than {MOST_WORKERS} workers"),
    ],
)
def test_what_is_no_list_of_workers_is_one_line(text: str, mend: str) -> None:
    with pytest.raises(UserError, match=mend) as refusal:
        default_options(nodes=text, plan="true")
    assert str(refusal.value).startswith(f"--kv-nodes={text}: ")
    assert "\n" not in str(refusal.value)


@given(st.text(alphabet="0123456789xHL.:,GiBT/s -é\n", max_size=24))
def test_any_text_is_workers_or_a_message(text: str) -> None:
    try:
        found = NodesText.parse_all(text)
    except UserError as error:
        message = str(error)
    else:
        assert all(one.count >= 1 for one in found)
        return
    assert message.startswith("--kv-nodes=")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ({"nodes": "8xH200"}, "--kv-nodes=8xH200: only plans; add --kv-plan"),
        (
            {"nodes": "8xH200", "plan": "true", "plan_card": "24GiB"},
            "--kv-plan-card=24GiB: --kv-nodes=8xH200 names the",
        ),
        ({"cluster_cores": "8"}, "--kv-cluster-cores=8: cores of the workers of a cluster; add --kv-cluster"),
        ({"node_hours": "4"}, "--kv-node-hours: says how often"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, str], mend: str) -> None:
    resolved = default_options(**options)
    with pytest.raises(UserError, match=mend):
        resolved.of(SweepOptions).check(resolved.given)


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "soon"])
def test_hours_between_losses(hours: str) -> None:
    assert default_options(node_hours="none").of(SweepOptions).node_hours is None
    with pytest.raises(UserError, match=f"--kv-node-hours={hours}: "):
        default_options(node_hours=hours)
