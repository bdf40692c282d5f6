"""Plans for workers elsewhere: whose records count, how they are scaled, what fits, and a real run of two workers."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pytest_runs import TINY, run_pytest
from sweep_rows import case, environment, row, store_run
from sweeps import project

from kvsuite.case import Case
from kvsuite.console import console_text
from kvsuite.distribution.cards import KNOWN_CARDS, workers_of
from kvsuite.distribution.node_plan import START_S, nodes_table, plan_on_nodes, simulated
from kvsuite.distribution.recorded import last_runs, recorded_cases
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options

GPU = replace(case("a"), device="cuda:0")
OTHER = replace(case("b"), device="cuda:0")
H200 = {"name": "NVIDIA H200", "memory_bytes": 150_000_000_000}


def recorded_on(base: Path, gpu: dict[str, Any], *rows: tuple[Case, float, float]) -> None:
    """A run on a card: cases, their seconds and the seconds of the load that they were measured after."""
    env = environment(gpu=gpu)
    lines = [
        row(one.name, case=one, env=env, duration_s=took, model={"label": "dummy-tiny", "load_s": load})
        for one, took, load in rows
    ]
    store_run(base, lines, environment=env, options={"rounds": "5", "num_warmup": "2"})


def table(base: Path, cases: list[Case], nodes: str, **more: str) -> str:
    options = default_options(report_dir=str(base), plan="true", nodes=nodes, device="cuda", **more)
    return console_text(nodes_table(cases, options), width=400)


def test_a_record_of_the_card_counts_and_one_of_another_is_scaled_and_marked(tmp_path: Path) -> None:
    recorded_on(tmp_path, H200, (GPU, 110.0, 30.0))
    said = table(tmp_path, [GPU, OTHER], "8xH200,2xL40S")
    (line,) = [line for line in said.splitlines() if line.startswith("hf-a")]
    # without its loading; 4.8 TB/s over 0.864 TB/s
    assert " 80.0 " in line
    assert f" ~{80 * 4.8 / 0.864:.1f} " in line
    assert " on H200" in line
    (line,) = [line for line in said.splitlines() if line.startswith("hf-b")]
    assert line.count("*") == 2
    assert "model, corrected by 1 measured cases" in line
    assert "2 cases on 10 workers (8xH200, 140.4 GiB, 4.8 TB/s, 2xL40S, 45.0 GiB, 0.864 TB/s)" in said
    assert "~: no record on this card; that of another one, by the ratio of their bandwidths" in said
    assert "a worker lost every 100 h of its own (--kv-node-hours), each on a host of its own, which half" in said
    assert "lost every" not in table(tmp_path, [GPU], "1xH200", node_hours="none")


def test_a_card_of_its_own_memory_and_bandwidth(tmp_path: Path) -> None:
    recorded_on(tmp_path, {"name": "NVIDIA X9"}, (GPU, 20.0, 0.0))
    said = table(tmp_path, [GPU], "1xX9:1MiB:2TB/s,1xH200")
    (line,) = [line for line in said.splitlines() if line.startswith("hf-a")]
    assert line.split()[4:8] == ["20.0", "no", f"~{20 * 2 / 4.8:.1f}", "likely"]
    assert "1 do not fit X9 and wait for another card" in said
    assert "1 cases on 2 workers" in said
    nowhere = table(tmp_path, [GPU], "1xX9:1MiB:2TB/s")
    assert "1 fit no card and are left out: hf-a" in nowhere


@pytest.mark.parametrize(
    ("nodes", "kind", "mend"),
    [
        ("1xFOO", "cuda", "FOO is not known; give its memory and bandwidth, such as 1xFOO:24GiB:300GB/s"),
        ("1xcpu", "cuda", "cpu is no cuda, which the cases ask for; give --kv-device=cpu"),
        ("2xcpu:1GiB:3GB/s", "cpu", "cpu is this machine's, with its memory .*; give 2xcpu"),
        ("1xH200", "cpu", "H200 is no cpu, which the cases ask for; give --kv-device=cuda"),
    ],
)
def test_cards_that_cannot_be(nodes: str, kind: str, mend: str) -> None:
    with pytest.raises(UserError, match=mend):
        workers_of(nodes, kind)


def test_no_two_cards_share_a_name_of_the_driver() -> None:
    devices = [device for card in KNOWN_CARDS for device in card.devices]
    assert len(devices) == len(set(devices))
    assert len({card.name.lower() for card in KNOWN_CARDS}) == len(KNOWN_CARDS)


def test_every_load_is_counted_with_the_case_that_did_it(tmp_path: Path) -> None:
    """Two workers load for themselves: no two loads take the same time."""
    third = replace(case("c"), device="cuda:0")
    recorded_on(tmp_path, H200, (GPU, 40.0, 30.25), (OTHER, 45.0, 31.5), (third, 9.0, 31.5))
    found = recorded_cases(last_runs(tmp_path), default_options(report_dir=str(tmp_path)))
    assert [(one.seconds, one.load_s) for one in found] == [(40.0, 30.25), (45.0, 31.5), (9.0, 0.0)]


@pytest.mark.slow  # a run of pytest with two workers
def test_the_simulation_of_a_real_run_of_two_workers_takes_as_long(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    folder = project(tmp_path)
    options = [one for one in TINY if "max-new-tokens" not in one]
    run = run_pytest(
        folder,
        *options,
        "--kv-max-new-tokens=100",
        "--kv-rounds=4",
        "-n2",
        "-p",
        "no:benchmark",
        KVSUITE_SIMULATED_GPUS="2",
    )
    assert run.code == 0, run.out
    rows = run.rows().values()
    begun = [datetime.fromisoformat(each["started_utc"]).timestamp() for each in rows]
    took = max(at + each["duration_s"] for at, each in zip(begun, rows, strict=True)) - min(begun)

    asked = default_options(report_dir=str(folder / "reports"), plan="true", nodes="2xcpu", rounds="4", num_warmup="1")
    workers = workers_of("2xcpu", "cpu")
    recorded = recorded_cases(last_runs(folder / "reports"), asked)
    cases = [one.case for one in recorded]
    planned, records = plan_on_nodes(cases, asked, workers, recorded)
    assert {time.mark for each in planned for time in each.times} == {""}
    found = simulated(planned, records, workers, None, 0)
    by_gpu: dict[str, int] = {}
    for each in rows:
        gpu = each["effective"]["gpu"]["visible"]
        by_gpu[gpu] = by_gpu.get(gpu, 0) + 1
    # the tests begin with what xdist handed out before: a case may have gone to the other worker
    assert abs(max(map(len, found.ran)) - max(by_gpu.values())) <= 1
    assert found.loads == 2
    longest = max(one.seconds for one in recorded)
    # a second is how exact the rows say when they began
    assert abs((found.seconds - START_S) - took) <= longest + 2
