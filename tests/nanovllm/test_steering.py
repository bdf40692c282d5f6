"""When the controller is asked, its meters, its log, and replaying one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import CaseInvalid, UserError
from kvsuite.nanovllm.controller import ControllerSettings
from kvsuite.nanovllm.steering import Controller, Meter, log_for, read_logs

SETTINGS = ControllerSettings(
    method="h2o", factor=5, layers=36, kv_heads=8, head_dim=128, weight_bytes=15_100_000_000, token_bytes=147_456,
    bandwidth=4.2e12,
)  # fmt: skip
STEP = {"batch": 32, "seq_len": 3968, "expected_output": 128.0, "pending": 0}


def controller(settings=SETTINGS, **how) -> Controller:
    ticks = count()
    return Controller(settings, now=lambda: next(ticks) * 0.5, **how)


def decisions(made: Controller) -> list[dict]:
    return [entry for entry in made.log if "decision" in entry]


def test_it_is_asked_at_the_first_step_with_prompts_and_at_every_fourth():
    made = controller()
    new = [made.prompts(**STEP)[1] for _ in range(13)]
    assert [at + 1 for at, is_new in enumerate(new) if is_new] == [1, 4, 8, 12]
    assert [entry["counter"] for entry in decisions(made)] == [1, 4, 8, 12]


def test_in_between_the_last_decision_holds():
    made = controller()
    first, _ = made.prompts(**STEP)
    held, is_new = made.prompts(**STEP | {"seq_len": 10})
    assert (held, is_new) == (first, False)


def test_every_fourth_step_is_timed():
    made = controller()
    assert [made.next_step_is_sampled(decode_only=True) for _ in range(9)] == [False, False, False, True] * 2 + [False]
    # whatever lies between, a step with prompts comes to be timed
    prompts = []
    for _ in range(8):
        prompts.append(made.next_step_is_sampled(decode_only=False))
        for _ in range(3):
            made.next_step_is_sampled(decode_only=True)
    assert prompts == [False, False, False, True] * 2


def test_a_meter_forgets_slowly_and_ignores_a_clock_that_failed():
    meter = Meter()
    for value in (1.0, 2.0, 0.0, -1.0, float("nan"), float("inf")):
        meter.add(value)
    assert (meter.mean, meter.samples) == (pytest.approx(1.2), 2)


def test_every_decision_is_logged_with_inputs_time_and_what_came_of_it():
    made = controller()
    made.prompts(**STEP)
    made.applied({"pipeline": "prefill", "partition": None})
    made.compress.add(0.3)
    made.prefill.add(1.0)
    for _ in range(3):
        made.prompts(**STEP)
    log = json.loads(json.dumps(made.log))
    assert log == made.log
    assert log[0]["settings"]["bandwidth_source"] == "measured"
    first, second = log[1:]
    assert (first["time_s"], second["time_s"]) == (0.5, 1.0)
    assert first["applied"] == {"pipeline": "prefill", "partition": None}
    assert second["applied"] is None
    assert (first["inputs"]["compress_s"], second["inputs"]["compress_s"]) == (None, 0.3)
    # from the first decision's streams and share, one less of each
    assert (second["inputs"]["streams"], second["decision"]["sm_compress_ratio"]) == (1, 0.2)


def test_shares_move_from_decision_to_decision_down_to_their_bound():
    made = controller()
    made.compress.add(0.36)
    made.prefill.add(1.0)
    for _ in range(24):
        made.prompts(**STEP)
    shares = [entry["decision"]["sm_compress_ratio"] for entry in decisions(made)]
    assert shares == [0.20, 0.15, 0.10, 0.10, 0.10, 0.10, 0.10]


STEPS = st.lists(
    st.tuples(
        st.integers(1, 64),
        st.integers(1, 8000),
        st.integers(1, 600),
        st.integers(0, 8),
        st.floats(1e-4, 1),
        st.booleans(),
    ),
    min_size=1,
    max_size=20,
)


def drive(made: Controller, steps, *, slower: float = 1.0) -> list:
    found = []
    for batch, length, output, pending, seconds, compresses in steps:
        found.append(
            made.prompts(batch=batch, seq_len=length, expected_output=output, pending=pending * (slower == 1))[0]
        )
        (made.compress if compresses else made.prefill).add(seconds * slower)
        made.decode.add(seconds * slower)
        made.decode_tokens.add(length)
        found.append(made.phase(waiting=pending + 1, running=batch))
    return found


@given(STEPS, st.sampled_from([SETTINGS, replace(SETTINGS, method="mlp", dual=True, force=True)]))
def test_a_replayed_run_decides_as_the_recorded_one_whatever_its_clocks_say(steps, settings):
    recorded = controller(settings)
    expected = drive(recorded, steps)
    log = json.loads(json.dumps(recorded.log))
    elsewhere = replace(settings, bandwidth=1e9)
    again = controller(elsewhere, replay=log)
    # a choice of phase depends on who waits, which the recorded run has to have alike
    found = drive(again, steps, slower=1.0 if settings.dual else 7.0)
    assert found == expected
    assert [entry.get("decision") for entry in again.log] == [entry.get("decision") for entry in recorded.log]
    assert again.settings.bandwidth == settings.bandwidth


def recorded() -> list[dict]:
    made = controller()
    for _ in range(4):
        made.prompts(**STEP)
    return json.loads(json.dumps(made.log))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch": 31}, "at counter 1 batch is 31, and 32 in the log"),
        ({"seq_len": 3967}, "seq_len is 3967, and 3968"),
        ({"expected_output": 64.0}, "expected_output is 64, and 128"),
    ],
)
def test_a_log_of_other_requests_is_refused(change, told):
    with pytest.raises(CaseInvalid, match=told):
        controller(replay=recorded()).prompts(**STEP | change)


def test_a_log_of_a_shorter_run_is_refused():
    made = controller(replay=recorded())
    for _ in range(7):
        made.prompts(**STEP)
    with pytest.raises(CaseInvalid, match="ends before counter 8"):
        made.prompts(**STEP)


def test_a_log_of_another_case_is_refused():
    with pytest.raises(CaseInvalid, match=r"another case: factor 5 there and 2 here, method h2o there and snapkv here"):
        controller(replace(SETTINGS, method="snapkv", factor=2), replay=recorded())


def test_a_log_that_was_changed_is_refused():
    log = recorded()
    log[1]["decision"]["sm_compress_ratio"] = 0.5
    with pytest.raises(CaseInvalid, match="does not say what its inputs give"):
        controller(replay=log)
    log = recorded()
    log[2]["inputs"]["batch"] = 1
    with pytest.raises(CaseInvalid, match="does not say what its inputs give"):
        controller(replay=log)


@pytest.mark.parametrize("spoil", ["settings", "inputs", "decision", "schema", "all", "text"])
def test_what_is_no_log_is_refused(spoil):
    log = copy.deepcopy(recorded())
    if spoil == "all":
        log = []
    elif spoil == "text":
        log[1]["inputs"]["seq_len"] = "long"
    elif spoil == "schema":
        log[0]["schema"] = "kvsuite.decisions/9"
    else:
        del log[0 if spoil == "settings" else 1][spoil]
    with pytest.raises(CaseInvalid, match=r"^replayed decisions: "):
        controller(replay=log)


def test_a_file_has_one_log_or_one_for_each_case(tmp_path):
    alone, several = tmp_path / "alone.json", tmp_path / "several.json"
    alone.write_text(json.dumps(recorded()))
    several.write_text(json.dumps({"nano-triad": recorded()}))
    assert log_for(read_logs(alone), "any") == recorded()
    assert log_for(read_logs(several), "nano-triad") == recorded()
    with pytest.raises(CaseInvalid, match="no decisions of other, only of nano-triad"):
        log_for(read_logs(several), "other")


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"a": 3}', '[{"time": 1}]', "[" * 100_000])
def test_a_file_of_something_else_is_named(tmp_path, text):
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"--kv-replay-decisions=.*log\.json: (not JSON|neither)"):
        read_logs(path)
    with pytest.raises(UserError, match=r"missing\.json: No such file"):
        read_logs(tmp_path / "missing.json")
