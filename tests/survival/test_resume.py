"""Which run goes on, which of its cases are finished, and what it refuses to go on with."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child_processes import child_process
from sweep_rows import case, environment, facts, node_id, row, store_run

from kvsuite.errors import UserError
from kvsuite.store.records_file import RECORDS_FILE, code_of, read_records
from kvsuite.store.store import RecordStore
from kvsuite.survival.resume import EarlierRun, find_earlier, is_finished
from kvsuite.survival.settings import differences

RERUN = ("crashed", "error")


def earlier(base: Path, *rows: dict[str, object], rerun: tuple[str, ...] = RERUN, **changes: object) -> EarlierRun:
    found = find_earlier(str(store_run(base, rows, **changes)), base, rerun)
    assert found is not None
    return found


def test_latest_is_the_run_that_was_written_last(tmp_path: Path) -> None:
    assert find_earlier("latest", tmp_path, RERUN) is None
    folders = [store_run(tmp_path, [row(name)]) for name in ("a", "b", "c")]
    # what a run leaves that was killed before its first line was whole
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / RECORDS_FILE).write_text('{"schema": "kvsuite.run/1", "run')
    (tmp_path / "empty").mkdir()
    for age, folder in enumerate((folders[2], folders[0], folders[1])):
        os.utime(folder / RECORDS_FILE, ns=(age * 10**9, age * 10**9))
    found = find_earlier("latest", tmp_path, RERUN)
    assert found is not None
    assert found.folder == folders[1]


def test_latest_is_the_run_of_the_same_shard(tmp_path: Path) -> None:
    shards = {text: store_run(tmp_path, [row("a")], options={"shard": text}) for text in ("1/2", "2/2")}
    for text, folder in shards.items():
        found = find_earlier("latest", tmp_path, RERUN, shard=text)
        assert found is not None
        assert found.folder == folder
    for text in ("1/3", None):
        assert find_earlier("latest", tmp_path, RERUN, shard=text) is None


def test_a_latest_run_whose_first_line_is_damaged_is_told(tmp_path: Path) -> None:
    path = store_run(tmp_path, []) / RECORDS_FILE
    path.write_bytes(b"{" + path.read_bytes())
    with pytest.raises(UserError, match="line 1 is damaged"):
        find_earlier("latest", tmp_path, RERUN)


def test_a_run_by_path_name_or_file(tmp_path: Path) -> None:
    folder = store_run(tmp_path, [row("a")])
    for request in (str(folder), folder.name, str(folder / RECORDS_FILE)):
        found = find_earlier(request, tmp_path, RERUN)
        assert found is not None
        assert found.folder == folder
    with pytest.raises(UserError, match=r"--kv-resume=nowhere: no records.jsonl in nowhere; give latest"):
        find_earlier("nowhere", tmp_path, RERUN)


@pytest.mark.parametrize(
    ("rerun", "left"),
    [
        (("crashed", "error"), {"error", "crashed"}),
        ((), set()),
        (("oom", "skipped", "invalid"), {"oom", "skipped", "invalid"}),
    ],
)
def test_finished_is_what_the_policy_does_not_run_again(tmp_path: Path, rerun: tuple[str, ...], left: set[str]) -> None:
    statuses = ("ok", "oom", "error", "crashed", "invalid", "skipped")
    found = earlier(tmp_path, *(row(status, status) for status in statuses), rerun=rerun)
    finished = frozenset(found.finished())
    planned = [case(name) for name in (*statuses, "new")]
    again = {one.name for one in planned if not is_finished(node_id(one), one, finished)}
    assert again == left | {"new"}


def test_another_case_of_the_same_id_is_not_finished(tmp_path: Path) -> None:
    finished = frozenset(earlier(tmp_path, row("a")).finished())
    one = case("a")
    assert is_finished(node_id(one), one, finished)
    assert not is_finished(node_id(one), case("a", dtype="bfloat16"), finished)
    assert not is_finished("mine.py::test", one, finished)
    # on which of its GPUs a machine measures decides nothing
    on_gpu = frozenset(earlier(tmp_path, row("g", case=case("g", device="cuda:0"))).finished())
    other = case("g", device="cuda:1")
    assert is_finished(node_id(other), other, on_gpu)


def test_a_case_that_asks_for_something_else_than_its_kept_row_is_named(tmp_path: Path) -> None:
    plan = {"group": "policy", "serving": {"max_num_seqs": 4}}
    found = earlier(tmp_path, row("a", case=case("a", params=plan)), row("b", "error"))
    other = case("a", params={"group": "policy", "serving": {"max_num_seqs": 2}})
    found.require_same_plans((node_id(one), one) for one in (case("new"), case("b", dtype="bfloat16")))
    with pytest.raises(
        UserError, match=r"mix two measurements: a: params.serving.max_num_seqs: then 4, now 2; measure again"
    ):
        found.require_same_plans([(node_id(other), other)])


def test_options_that_choose_cases_may_differ(tmp_path: Path) -> None:
    earlier(tmp_path, row("a")).require_same(facts(options={"variants": "triad"}))


def test_the_same_is_the_same(tmp_path: Path) -> None:
    found = earlier(tmp_path, row("a"))
    found.require_same(facts(options={"report_dir": "elsewhere", "timeout": "5", "resume": "latest", "plan": "true"}))
    found.require_same_case(row("b"), environment(command=["pytest", "--kv-resume=latest"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"rounds": "3"}}, "--kv-rounds: then 5, now 3"),
        ({"options": {"num_warmup": "9", "seed": "1"}}, "--kv-num-warmup: then 2, now 9; --kv-seed: then 0, now 1"),
        ({"options": {"shard": "1/2"}}, "--kv-shard: then none, now 1/2"),
        ({"code": {"kvsuite": "sha256:cc", "benchmarks/test_compression.py": "sha256:bb"}}, "the code of kvsuite has changed"),
        ({"code": {"kvsuite": "sha256:aa", "conftest.py": "sha256:dd"}}, "conftest.py is new"),
        ({"environment": environment(packages={"torch": "2.14.0"})}, "torch: then 2.13.0, now 2.14.0"),
        ({"environment": environment(host={"cpu": "other"})}, "cpu: then scripted, now other"),
    ],
)  # fmt: skip
def test_what_has_changed_is_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    found = earlier(tmp_path, row("a"))
    with pytest.raises(UserError) as caught:
        found.require_same(facts(**changes))
    assert str(caught.value).startswith(f"--kv-resume={found.folder}: would mix two measurements: {said};")


RECORDED = Path(__file__).parents[1] / "data" / "recorded_run"


def recorded() -> tuple[EarlierRun, dict[str, Any]]:
    """The run of an older version, and a run line of now that differs in nothing."""
    found = find_earlier(str(RECORDED), RECORDED, RERUN)
    assert found is not None
    return found, copy.deepcopy({name: found.run[name] for name in ("options", "code", "environment")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda now: now["code"].update(kvsuite="sha256:other"),
            "the code of kvsuite has changed (then 0.1.0 at e6239657e, now 0.1.0 at 123456789)",
        ),
        (lambda now: now["options"].pop("stride"), "--kv-stride: then 64, and no option of this version"),
        (lambda now: now["options"].update(depth=3), "--kv-depth: no option of that version, now 3"),
        (lambda now: now["options"].update(reference=None), "--kv-reference: then 'none', now None"),
        (lambda now: now["environment"]["packages"].update(torch="2.14.0"), "torch: then 2.13.0+cpu, now 2.14.0"),
        (lambda now: now["environment"]["host"].update(cores=64), "cores: then 2, now 64"),
    ],
)  # fmt: skip
def test_a_run_of_an_older_version_names_what_differs(change: Callable[[Any], object], said: str) -> None:
    found, now = recorded()
    now["environment"]["kvsuite"] = {"version": "0.1.0", "commit": "123456789abc", "dirty": False}
    found.require_same(now, {"perplexity": 1})
    change(now)
    with pytest.raises(UserError) as caught:
        found.require_same(now)
    assert str(caught.value) == (
        f"--kv-resume={RECORDED}: would mix two measurements: {said}; measure again without --kv-resume, or go back to what "
        "the run had"
    )


def test_a_metric_of_another_definition_is_named() -> None:
    found, now = recorded()
    with pytest.raises(UserError, match=r"measurements: the definition of perplexity: then version 1, now 2; measure"):
        found.require_same(now, {"perplexity": 2, "tpot_s": 1, "never_measured": 7})


def test_what_computes_in_an_engine_is_named(tmp_path: Path) -> None:
    then = environment(engines={"nano": {"torch": "2.13.0", "flashinfer-python": "0.4"}, "mlc": {"mlc_llm": "1"}})
    found = earlier(tmp_path, row("a"), environment=then)
    for same in (environment(), environment(engines={}), then, environment(engines={"mlc": {"mlc_llm": "1"}})):
        found.require_same_case(row("b"), same)
    now = environment(engines={"nano": {"torch": "2.13.0", "flashinfer-python": "0.5"}})
    with pytest.raises(UserError, match=r"flashinfer-python of engine nano: then 0\.4, now 0\.5"):
        found.require_same_case(row("b"), now)


def test_code_that_only_a_resumed_session_brought_is_known(tmp_path: Path) -> None:
    folder = store_run(tmp_path, [row("a")])
    first, more = facts()["code"], {"benchmarks/test_perplexity.py": "sha256:cc"}
    with RecordStore.reopen(folder) as store:
        # the same command again, and a file more
        run = store.with_session(read_records(folder)[0], facts(code=first | more))
        assert store.with_session(run, facts(code=first | more)) == run
        assert store.with_session(run, facts()) == run
        store.append(row("b"))
    assert read_records(folder)[0] == run
    assert len(run["sessions"]) == 1
    assert code_of(run) == first | more
    found = find_earlier(str(folder), tmp_path, RERUN)
    assert found is not None
    found.require_same(facts())
    found.require_same(facts(code=first | more))
    with pytest.raises(UserError, match=r"the code of benchmarks/test_perplexity\.py has changed"):
        found.require_same(facts(code=first | {"benchmarks/test_perplexity.py": "sha256:dd"}))


def test_a_run_without_hashes_of_its_code_is_refused(tmp_path: Path) -> None:
    found = earlier(tmp_path, row("a"), code={})
    with pytest.raises(UserError, match=r"conftest\.py is new"):
        found.require_same(facts(code={"kvsuite": "sha256:aa", "conftest.py": "sha256:dd"}))
    assert differences({"options": {}}, {"options": {}, "code": {"kvsuite": "sha256:aa"}})


@pytest.mark.parametrize(
    ("fields", "env", "said"),
    [
        ({"model": {"revision": "dummy:other"}}, {}, "model: then dummy:tiny, now dummy:other"),
        ({}, {"gpu": {"name": "H100", "driver": "580"}}, "gpu name: then none, now H100"),
        ({}, {"packages": {"transformers": "5.17.0"}}, "transformers: then 5.23.0, now 5.17.0"),
    ],
)  # fmt: skip
def test_what_only_loading_finds_out_is_named(
    tmp_path: Path, fields: dict[str, object], env: dict[str, object], said: str
) -> None:
    found = earlier(tmp_path, row("a"))
    with pytest.raises(UserError, match="would mix two measurements") as caught:
        found.require_same_case(row("b", **fields), environment(**env))
    assert said in str(caught.value)


GPU = {"gpu": {"name": "H100", "driver": "580"}}
BLIND = {name: value for name, value in environment().items() if name != "gpu"}


def test_a_run_on_a_gpu_does_not_go_on_without_one(tmp_path: Path) -> None:
    found = earlier(tmp_path, row("a"), environment=environment(**GPU))
    # before anything is loaded nobody has looked
    found.require_same(facts(environment=BLIND))
    with pytest.raises(UserError, match="gpu name: then H100, now none"):
        found.require_same_case(row("b"), environment())


def test_a_run_whose_first_process_died_before_it_looked_goes_on(tmp_path: Path) -> None:
    folder = store_run(tmp_path, [row("a", "crashed")], environment=BLIND)
    found = find_earlier(str(folder), tmp_path, RERUN)
    assert found is not None
    found.require_same_case(row("a"), environment(**GPU))
    with RecordStore.reopen(folder) as store:
        store.append_session(found.run | facts(environment=environment(**GPU)))
        store.append(row("a", env=environment(**GPU)))
    found = find_earlier(str(folder), tmp_path, RERUN)
    assert found is not None
    with pytest.raises(UserError, match="gpu name: then H100, now none"):
        found.require_same_case(row("b"), environment())


def test_another_text_of_the_same_name_is_named(tmp_path: Path) -> None:
    found = earlier(tmp_path, row("a", dataset={"text_hash": "sha256:one"}))
    found.require_same_case(row("b", dataset={"text_hash": "sha256:one"}), environment())
    with pytest.raises(UserError, match="text: then sha256:one, now sha256:two"):
        found.require_same_case(row("b", dataset={"text_hash": "sha256:two"}), environment())


def test_half_a_line_is_cut_off_and_told(tmp_path: Path) -> None:
    folder = store_run(tmp_path, [row("a")])
    path = folder / RECORDS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"schema": "kvsuite.record/1", "id": "ha')
    found = find_earlier("latest", tmp_path, RERUN)
    assert found is not None
    assert found.notes == [f"{path}: line 3 is cut off and was left out: the run ended while writing it"]
    with RecordStore.reopen(folder) as store:
        assert path.read_bytes() == whole
        store.append(row("b"))
    assert [one["case"]["name"] for one in read_records(folder)[1]] == ["a", "b"]


def test_a_run_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    folder = store_run(tmp_path, [row("a")])
    code = (
        "import sys; from pathlib import Path; from kvsuite.store.store import RecordStore\n"
        "RecordStore.reopen(Path(sys.argv[1]))"
    )
    with (
        RecordStore.reopen(folder),
        child_process([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE, text=True) as other,
    ):
        assert "another process is writing it; wait for that run, or end it" in other.communicate()[1]
    RecordStore.reopen(folder).close()


def test_a_killed_writer_frees_its_run(tmp_path: Path) -> None:
    folder = store_run(tmp_path, [row("a")])
    code = (
        "import sys, time; from pathlib import Path; from kvsuite.store.store import RecordStore\n"
        "store = RecordStore.reopen(Path(sys.argv[1])); print('open', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process is writing it"):
            RecordStore.reopen(folder)
        writer.kill()
    RecordStore.reopen(folder).close()


@pytest.mark.parametrize("field", ["id", "status", "suite", "case", "model", "dataset"])
def test_a_record_that_lacks_what_resuming_asks_for_is_refused(tmp_path: Path, field: str) -> None:
    one = row("a")
    del one[field]
    folder = store_run(tmp_path, [one])
    with pytest.raises(UserError, match="not a valid record, at top level: "):
        find_earlier(str(folder), tmp_path, RERUN)


def test_a_run_line_that_lacks_its_environment_is_refused(tmp_path: Path) -> None:
    path = store_run(tmp_path, [row("a")]) / RECORDS_FILE
    path.write_text(path.read_text().replace('"environment"', '"surroundings"', 1))
    with pytest.raises(UserError, match="'environment' is a required property"):
        find_earlier(str(path), tmp_path, RERUN)


def test_foreign_lines_are_refused(tmp_path: Path) -> None:
    folder = store_run(tmp_path, [])
    with (folder / RECORDS_FILE).open("a") as file:
        file.write('{"schema": "kvsuite.record/1", "id": "x", "status": "ok"}\n')
    with pytest.raises(UserError, match="not a valid record, at top level: "):
        find_earlier("latest", tmp_path, RERUN)
