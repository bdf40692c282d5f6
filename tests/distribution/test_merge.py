"""Shards become the whole run again, and what does not belong together is refused: never a wrong merge, never a traceback."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep_rows import environment, row, store_run

from kvsuite.__main__ import main
from kvsuite.distribution.merge import join, read_part, write_merged
from kvsuite.distribution.shards import assign
from kvsuite.errors import UserError
from kvsuite.store.records_file import RECORDS_FILE, read_records

NAMES = ["baseline", "streaming_6", "streaming_10", "broken"]
WHOLE = {name: row(name, "crashed" if name == "broken" else "ok", case_index=at) for at, name in enumerate(NAMES)}


def shards(base: Path, of: int = 2, **changes: Any) -> list[Path]:
    parts = assign([1.0] * len(NAMES), of)
    return [
        store_run(
            base / f"s{index}",
            [WHOLE[name] for name, part in zip(NAMES, parts, strict=True) if part == index],
            options={"shard": f"{index}/{of}"},
            cases=parts.count(index),
            **changes,
        )
        for index in range(1, of + 1)
    ]


def joined(paths: list[Path], **how: bool) -> Any:
    return join([read_part(path)[0] for path in paths], **how)


def test_a_run_of_an_older_version_is_no_part_and_one_line_says_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = Path(__file__).parents[1] / "data" / "recorded_run"
    run, rows, _ = read_records(recorded)
    rows = [dict(one, id=f"{one['id']} again", sidecar=None, case=one["case"] | {"name": "new"}) for one in rows[:1]]
    rows[0]["metrics"]["perplexity"]["version"] = 2
    names = ("command", "seed", "order_seed", "cases")
    newer = store_run(
        tmp_path, rows, **{name: run[name] for name in names}, code=run["code"] | {"kvsuite": "sha256:other"},
        environment=run["environment"] | {"kvsuite": {"version": "0.1.0", "commit": "f" * 40, "dirty": True}},
        options={"model": "smollm2"},
    )  # fmt: skip
    assert main(["merge", str(recorded), str(newer), "-o", str(tmp_path / "out")]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "are not parts of one sweep: " in line
    assert "--kv-rounds: 2 and 5; " in line
    assert "the code of kvsuite has changed (0.1.0 at e6239657e and 0.1.0 at fffffffff with changes)" in line
    assert "the definition of perplexity: version 1 and 2" in line
    assert not (tmp_path / "out").exists()


def test_shards_become_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "whole"
    assert main(["merge", *map(str, shards(tmp_path)), "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert "4 records of 2 parts: 3 ok, 1 crashed" in said.out
    assert said.err == ""
    run, rows, notes = read_records(out)
    assert {row["case"]["name"]: row for row in rows} == WHOLE
    assert (run["run_id"], run["cases"], len(run["merged"]), run["options"]["shard"]) == ("whole", 4, 2, None)
    assert not notes
    report = json.loads((out / "report.json").read_text())
    assert [one["case"]["name"] for one in report["records"]] == NAMES
    assert "broken" in (out / "table.txt").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["whole"], "nothing half made is left"
    # what was merged can be merged and drawn again
    assert main(["report", str(out), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "table.txt").read_bytes() == (out / "table.txt").read_bytes()


def test_reports_and_records_of_the_same_run_are_the_same_part(tmp_path: Path) -> None:
    folder = store_run(tmp_path, WHOLE.values())
    assert main(["report", str(folder)]) == 0
    merged = joined([folder, folder / "report.json"])
    assert [one for _, one in merged.rows] == list(WHOLE.values())
    assert merged.run["cases"] is None, "how many there were cannot be counted from parts that overlap"


def test_a_missing_shard_is_told_and_the_run_is_partial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = shards(tmp_path, 3)
    assert main(["merge", str(paths[0]), str(paths[2]), "-o", str(tmp_path / "out")]) == 0
    assert "note: shards 2/3 are missing: the merged run is partial" in capsys.readouterr().err
    assert read_records(tmp_path / "out")[0]["cases"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"rounds": "3", "shard": "2/2"}}, "--kv-rounds: 5 and 3"),
        ({"seed": 7}, "seed: 0 and 7"),
        ({"code": {"kvsuite": "sha256:zz"}}, "the code of kvsuite has changed"),
        ({"environment": environment(gpu={"name": "H100"})}, "gpu name: none and H100"),
        ({"environment": environment(host={"cores": 64})}, "cores: 2 and 64; with --other-machines"),
        ({"options": {"shard": "2/3"}}, "not shards of one sweep"),
        ({"options": {"shard": ""}}, "not shards of one sweep"),
    ],
)
def test_parts_of_another_sweep_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    first = store_run(tmp_path, [WHOLE["baseline"]], options={"shard": "1/2"})
    changed = {"options": {"shard": "2/2"}} | changes
    if not changed["options"]["shard"]:
        changed["options"] = {}
    other = store_run(tmp_path, [WHOLE["broken"]], **changed)
    with pytest.raises(UserError) as caught:
        joined([first, other])
    assert said in str(caught.value)
    assert str(first) in str(caught.value)
    assert str(other) in str(caught.value)


def test_a_part_measured_on_a_gpu_does_not_join_one_of_the_cpu_in_either_order(tmp_path: Path) -> None:
    on_gpu = environment(gpu={"name": "H100"})
    one = store_run(tmp_path, [row("baseline", env=on_gpu)], options={"shard": "1/2"}, environment=on_gpu)
    other = store_run(tmp_path, [row("broken")], options={"shard": "2/2"})
    for paths in ([one, other], [other, one]):
        with pytest.raises(UserError, match="--other-machines"):
            joined(paths)


def test_other_machines_are_taken_where_that_is_asked_for(tmp_path: Path) -> None:
    there = environment(host={"name": "b", "cores": 64})
    first = store_run(tmp_path, [row("baseline")], options={"shard": "1/2"})
    other = store_run(tmp_path, [row("broken", env=there)], options={"shard": "2/2"}, environment=there)
    merged = joined([first, other], other_machines=True)
    assert "times do not compare: cores: then 2, now 64" in merged.notes[0]
    folder = write_merged(merged, tmp_path / "out")
    run, rows, _ = read_records(folder)
    environments = {run["env"]: run["environment"]} | {one["env"]: one["environment"] for one in run["sessions"]}
    assert [environments[one["env"]]["host"]["cores"] for one in rows] == [2, 64]


@pytest.mark.parametrize("field", ["status", "metrics", "duration_s", "env"])
def test_two_results_of_one_case_are_a_conflict(tmp_path: Path, field: str) -> None:
    other = copy.deepcopy(WHOLE["baseline"])
    changed = {"status": "error", "metrics": {}, "duration_s": 9.0, "env": "sha256:other"}
    other[field] = changed[field]
    if field == "status":
        other["error"] = {"type": "E", "message": "m"}
    paths = [store_run(tmp_path, [one]) for one in (WHOLE["baseline"], other)]
    with pytest.raises(UserError, match=r"both have .*baseline\].* with different results; leave one of them out"):
        joined(paths)
    assert main(["merge", *map(str, paths), "-o", str(tmp_path / "out")]) == 4
    assert not (tmp_path / "out").exists()


def test_sidecars_come_along_and_lead_nowhere_else(tmp_path: Path) -> None:
    folder = store_run(tmp_path, [WHOLE["baseline"] | {"sidecar": "tokens/a.parquet"}])
    with pytest.raises(UserError, match="is not in its folder; restore it"):
        write_merged(joined([folder]), tmp_path / "out")
    (folder / "tokens").mkdir()
    (folder / "tokens" / "a.parquet").write_bytes(b"tokens")
    assert (write_merged(joined([folder]), tmp_path / "out") / "tokens" / "a.parquet").read_bytes() == b"tokens"
    (tmp_path / "secret").write_text("x")


PLANTED = {
    "above": ("../secret", "leads out"),
    # the one that once planted a file beside the merged run
    "away and back": ("../{own}/conftest.py", "leads out"),
    "absolute": ("/etc/passwd", "is no name"),
    "through a link": ("out/secret.parquet", "leads out"),
    "a program": ("conftest.py", "is no .parquet"),
    "the records": ("records.jsonl", "is no .parquet"),
}


@pytest.mark.parametrize(("name", "told"), PLANTED.values(), ids=PLANTED)
def test_a_sidecar_is_taken_from_its_folder_and_put_into_the_merged_one(tmp_path: Path, name: str, told: str) -> None:
    base = tmp_path / "reports"
    name = name.format(own=store_run(base, []).name + "_2")
    (base / "secret").write_text("x")
    (base / "secret.parquet").write_text("x")
    hostile = store_run(base, [WHOLE["baseline"] | {"sidecar": name}])
    (hostile / "conftest.py").write_text("raise SystemExit")
    (hostile / "out").symlink_to(base)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"names {name}, which {told}"):
        write_merged(joined([hostile]), tmp_path / "merged" / "whole")
    assert sorted(tmp_path.rglob("*")) in (before, sorted([*before, tmp_path / "merged"]))


def test_two_records_of_one_sidecar_are_refused(tmp_path: Path) -> None:
    rows = [one | {"sidecar": "tokens/a.parquet"} for one in list(WHOLE.values())[:2]]
    folder = store_run(tmp_path, rows)
    (folder / "tokens").mkdir()
    (folder / "tokens" / "a.parquet").write_bytes(b"tokens")
    with pytest.raises(UserError, match="as another record does"):
        write_merged(joined([folder]), tmp_path / "out")


def test_bad_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = store_run(tmp_path, [WHOLE["baseline"]])
    assert main(["merge", str(folder), str(folder), "-o", str(tmp_path / "out")]) == 4
    assert "is given more than once" in capsys.readouterr().err
    assert main(["merge", str(folder), "-o", str(folder)]) == 4
    assert "is there already; give a new folder" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 4
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["merge", str(folder), "-o", str(tmp_path / "file" / "out")]) == 4
    assert "cannot be written" in capsys.readouterr().err


@settings(max_examples=60)
@given(of=st.integers(1, 6), order=st.permutations(range(4)), doubled=st.lists(st.integers(0, 3), max_size=3))
def test_however_cases_are_dealt_the_whole_is_the_same(of: int, order: list[int], doubled: list[int]) -> None:
    with tempfile.TemporaryDirectory() as base:
        names = [NAMES[at] for at in order]
        dealt = [names[index::of] for index in range(of)]
        # the same record twice is no conflict
        dealt[0] = list(dict.fromkeys([*dealt[0], *(NAMES[at] for at in doubled)]))
        parts = [read_part(store_run(Path(base), [WHOLE[name] for name in some]))[0] for some in dealt]
        merged = join(parts)
        assert {one["case"]["name"]: one for _, one in merged.rows} == WHOLE
        assert len(merged.rows) == len(NAMES)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def damage(file: Path, data: st.DataObject) -> None:
    """Replace one field of one line by anything, or cut the file and scribble on it."""
    lines = file.read_text().splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans()):
        line = json.loads(lines[at])
        field = data.draw(st.sampled_from(sorted(line)))
        old, new = line[field], data.draw(JSON)
        inside = isinstance(old, dict) and old and data.draw(st.booleans())
        line[field] = old | {data.draw(st.sampled_from(sorted(old))): new} if inside else new
        lines[at] = json.dumps(line)
        file.write_text("\n".join(lines) + "\n")
    else:
        whole = file.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        file.write_bytes(whole[:cut] + data.draw(st.binary(max_size=8)) + whole[cut + data.draw(st.integers(0, 8)) :])


def merge_damaged(data: st.DataObject, *, write: bool) -> None:
    with tempfile.TemporaryDirectory() as base:
        paths = shards(Path(base))
        damage(paths[1] / RECORDS_FILE, data)
        out = Path(base) / "out"
        try:
            merged = joined(paths)
            if write:
                write_merged(merged, out)
        except UserError:
            assert not out.exists()
            return
        names = [one["id"] for _, one in merged.rows]
        assert len(set(names)) == len(names)
        # the part that was not touched is whole
        first = read_records(paths[0])[1]
        assert [one for _, one in merged.rows if one in first] == first


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_parts_are_refused_or_right(data: st.DataObject) -> None:
    merge_damaged(data, write=False)


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_parts_that_join_can_be_drawn_or_are_refused(data: st.DataObject) -> None:
    merge_damaged(data, write=True)
