"""A controller at a runtime: what its decisions do there, what its meters are fed, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from decoders import fresh, greedy, prompts
from serving import assert_nothing_lost

from kvsuite.compression import get_policy
from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.controller import ControllerSettings, ratios
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.prompt_lane import LaneStreams
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runner import ModelRunner
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.nanovllm.spans import Spans
from kvsuite.nanovllm.steering import Controller

LENGTHS = (48, 40, 56, 33, 64, 50, 37, 61)
NEW = 12


def settings(**how) -> ControllerSettings:
    known = {
        "method": "streaming_llm", "factor": 2, "layers": 3, "kv_heads": 2, "head_dim": 16, "weight_bytes": 1,
        "token_bytes": 768, "bandwidth": 1e9, "greenctx": False, "min_seq_len": 32, "min_output_len": 8,
    }  # fmt: skip
    return ControllerSettings(**known | how)


def ticking(**how) -> Controller:
    """A controller whose clock goes on by a tenth of a second with every look."""
    ticks = count()
    replay = how.pop("replay", None)
    return Controller(settings(**how), replay=replay, now=lambda: next(ticks) * 0.1)


def served(controller, *, lengths=LENGTHS, compresses=True, new=NEW, lanes=1, given=None, **limits):
    """Outputs, tokens evicted, and what every step fed to whom."""
    of = fresh("llama")
    policy = get_policy("streaming_llm", factor=2) if compresses else None
    small = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 64, "block_size": 8}
    stage = "async" if compresses else "sync"
    how = {"policy": policy, "stage": stage, "controller": controller, "lanes": lanes, "partitions": given}
    runtime = Runtime(of, Limits(**small | limits), **how, eos_token_ids=())
    steps = []
    commit = runtime._launcher.commit
    requests = [Request(prompt, SamplingParameters(max_new_tokens=new)) for prompt in prompts(lengths)]

    def noted(plan):
        steps.append([(requests.index(one), fed) for one, fed in zip(plan.requests, plan.counts, strict=True)])
        commit(plan)

    runtime._launcher.commit = noted
    try:
        runtime.run(requests)
        assert {request.reason for request in requests} == {"length"}
        return [list(request.output) for request in requests], runtime.counters.evicted_tokens, steps
    finally:
        runtime.close()
        assert_nothing_lost(runtime)


def decisions(controller: Controller) -> list[dict]:
    return [entry for entry in controller.log if "decision" in entry]


def test_a_controller_that_always_compresses_changes_no_token():
    controller = ticking(force=True)
    assert served(controller) == served(None)
    assert {entry["applied"]["pipeline"] for entry in decisions(controller)} == {"prefill"}


@pytest.mark.parametrize("short", [{"min_seq_len": 65}, {"min_output_len": 13}])
def test_pipeline_none_leaves_the_prompts_alone(short):
    controller = ticking(**short)
    found, evicted, _ = served(controller)
    assert evicted == 0
    assert found == served(None, compresses=False)[0]
    assert {entry["applied"]["pipeline"] for entry in decisions(controller)} == {"none"}


@pytest.mark.parametrize("lanes", [1, 2])
def test_prompts_that_are_left_alone_are_reserved_what_they_take(lanes):
    made = {"policy": get_policy("streaming_llm", factor=8), "stage": "async", "lanes": lanes}
    limits = Limits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64, num_blocks=28, block_size=8)
    runtime = Runtime(fresh("llama"), limits, **made, controller=ticking(min_speedup=1e9), eos_token_ids=())
    try:
        requests = [Request(prompt, SamplingParameters(max_new_tokens=40)) for prompt in prompts(LENGTHS)]
        runtime.run(requests)
        assert {request.reason for request in requests} == {"length"}
        assert (runtime.counters.evicted_tokens, runtime.counters.preemptions) == (0, 0)
    finally:
        runtime.close()


def test_prompts_of_one_decision_are_compressed_and_those_of_another_are_not():
    # one prompt a step, and the rules are asked at the first, the fourth and the eighth
    lengths = (60, 61, 62, 20, 21, 22, 23, 63)
    controller = ticking(force=False, min_speedup=0.0)
    _, evicted, steps = served(controller, lengths=lengths, max_num_seqs=1, max_num_batched_tokens=128)
    assert [entry["decision"]["pipeline"] for entry in decisions(controller)] == ["prefill", "none", "prefill"]
    assert [fed for step in steps for _, fed in step if fed > 1] == list(lengths)
    assert evicted == sum(length - length // 2 for length in (60, 61, 62, 63))


def test_what_was_decided_for_a_prompt_holds_when_it_is_computed_again_and_for_its_fork():
    controller = ticking(min_speedup=1e9)
    made = {"policy": get_policy("streaming_llm", factor=2), "stage": "async", "controller": controller}
    runtime = Runtime(fresh("llama"), Limits(max_model_len=64, num_blocks=16), **made, overlap=False, eos_token_ids=())
    try:
        early = runtime.add(greedy(prompts((40,))[0], NEW))
        for _ in range(3):
            runtime.step()
        child = runtime.fork(early)
        assert (controller.decision.pipeline, early.spared, child.spared) == ("none", True, True)
        controller.decision = replace(controller.decision, pipeline="prefill")
        late = runtime.add(greedy(prompts((40,))[0], NEW))
        for _ in range(2):
            runtime.scheduler.preempt_for(late)
        while runtime.unfinished:
            runtime.step()
        assert (early.preemptions, child.preemptions) == (1, 1)
        assert (early.stored, child.stored, late.stored) == ([40 + NEW - 1], [40 + NEW - 1], [20 + NEW - 1])
        assert early.output == child.output != late.output
    finally:
        runtime.close()


def test_meters_are_fed_and_every_decision_says_what_came_of_it():
    controller = ticking(force=True)
    served(controller, max_num_seqs=1, max_num_batched_tokens=128, lengths=LENGTHS * 2)
    assert [entry["counter"] for entry in decisions(controller)] == [1, 4, 8, 12, 16]
    first, *later = decisions(controller)
    assert (first["inputs"]["prefill_s"], first["inputs"]["compress_s"], first["inputs"]["pending"]) == (None, None, 0)
    # one request at a time: 12 decode steps on up to 76 tokens after each prompt, and one prompt's compression
    assert later[-1]["inputs"]["compress_samples"] == 15
    assert later[-1]["inputs"]["compress_s"] == pytest.approx(0.1)
    assert later[-1]["inputs"]["decode_s"] == pytest.approx(0.1)
    assert 16 <= later[-1]["inputs"]["decode_tokens"] <= 44
    for entry in decisions(controller):
        assert entry["applied"]["async_compress"] == entry["decision"]["async_compress"]
        assert entry["applied"]["compression_streams"] == 1
    assert json.loads(json.dumps(controller.log)) == controller.log
    assert "one stream" in controller.inert["compression_streams"]


def test_triad_runs_the_schedule_of_auto_tune_and_marks_its_axis_inert():
    auto, triad = ticking(force=True), ticking(force=True, dual=True)
    assert served(auto, num_blocks=24) == served(triad, num_blocks=24)
    assert [entry["decision"] for entry in decisions(auto)] == [entry["decision"] for entry in decisions(triad)]
    assert "auto_dual" in triad.inert
    assert "auto_dual" not in auto.inert


def test_a_replayed_run_does_what_the_recorded_one_did_whatever_its_clock_says():
    recorded = ticking(min_speedup=0.0)
    expected = served(recorded)
    log = json.loads(json.dumps(recorded.log))
    slow = count()
    again = Controller(settings(min_speedup=0.0), replay=log, now=lambda: next(slow) ** 2 * 3.0)
    assert served(again) == expected
    assert [entry["decision"] for entry in decisions(again)] == [entry["decision"] for entry in decisions(recorded)]
    assert [entry["applied"] for entry in decisions(again)] == [entry["applied"] for entry in decisions(recorded)]


def test_a_log_of_other_requests_ends_the_run():
    recorded = ticking(force=True)
    served(recorded)
    with pytest.raises(CaseInvalid, match="seq_len is 49, and 48 in the log"):
        served(ticking(force=True, replay=recorded.log), lengths=(49, *LENGTHS[1:]))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"policy": None}, "there is no policy"),
        ({"stage": "sync"}, "stage=sync never does"),
        ({"controller": Controller(settings(greenctx=True))}, "parts the SMs between two lanes"),
        ({"controller": Controller(settings(greenctx=True)), "lanes": 2}, r"partitions were given for \[\]"),
        ({"partitions": dict.fromkeys(ratios()), "lanes": 2}, "greenctx=False never uses one"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_run(how, told):
    made = {"policy": get_policy("streaming_llm", factor=2), "stage": "async", "controller": Controller(settings())}
    with pytest.raises(CaseInvalid, match=told):
        Runtime(fresh("llama"), Limits(max_model_len=64, num_blocks=16), **made | how)


def test_two_lanes_do_what_one_does_and_say_that_the_prompt_lane_compresses():
    controller = ticking(force=True)
    outputs, evicted, _ = served(controller, lanes=2)
    assert (outputs, evicted) == served(None)[:2]
    assert {entry["applied"]["async_compress"] for entry in decisions(controller)} == {True}
    assert "prompt lane compresses" in controller.inert["async_compress"]
    spared = ticking(min_speedup=1e9)
    assert served(spared, lanes=2)[:2] == (served(None, compresses=False)[0], 0)


@dataclass
class Part:
    """A partition by its counts, as far as a runtime on a CPU looks at one."""

    decode_sms: int
    prompt_sms: int

    @property
    def id(self) -> str:
        return f"{self.decode_sms}_{self.prompt_sms}"


GIVEN = {ratio: Part(100 - round(100 * ratio), round(100 * ratio)) for ratio in ratios()}
ONE_BY_ONE = {"lanes": 2, "given": GIVEN, "max_num_seqs": 1, "max_num_batched_tokens": 128}


def test_lanes_move_to_the_partition_of_every_decision_and_the_log_says_which(monkeypatch):
    bound, captured = [], []
    monkeypatch.setattr(LaneStreams, "bind", lambda self, partition: bound.append(partition))
    monkeypatch.setattr(ModelRunner, "use_captured", lambda self, streams: captured.append(streams))
    # every span takes a tenth of a second: compression is as long as a step, and gets more and more
    controller = ticking(force=True, greenctx=True)
    outputs, _, _ = served(controller, lengths=LENGTHS * 2, **ONE_BY_ONE)
    assert outputs == served(None, lengths=LENGTHS * 2, max_num_seqs=1, max_num_batched_tokens=128)[0]
    shares = [entry["decision"]["sm_compress_ratio"] for entry in decisions(controller)]
    assert shares == [0.2, 0.2, 0.25, 0.3, 0.35]
    expected = [GIVEN[ratio] for ratio in shares]
    moved = expected[1:]
    # all of them are there, decode steps captured, before anything runs
    assert bound == [*GIVEN.values(), None, *moved]
    assert captured == [*(part.id for part in GIVEN.values()), "", *(part.id for part in moved)]
    told = [{"decode_sms": part.decode_sms, "prompt_sms": part.prompt_sms} for part in expected]
    assert [entry["applied"]["partition"] for entry in decisions(controller)] == told


def test_lanes_leave_their_partitions_where_a_decision_says_so(monkeypatch):
    bound = []
    monkeypatch.setattr(LaneStreams, "bind", lambda self, partition: bound.append(partition))
    controller = ticking(min_speedup=0.0, greenctx=True)
    served(controller, lengths=(60, 61, 62, 20, 21, 22, 23, 63), **ONE_BY_ONE)
    assert bound[len(GIVEN) + 1 :] == [GIVEN[0.2], None, GIVEN[controller.decision.sm_compress_ratio]]
    assert decisions(controller)[1]["applied"]["partition"] is None


def test_lanes_that_move_come_behind_all_that_they_were_given():
    class Stream:
        def __init__(self):
            self.behind = []

        def wait_stream(self, other):
            self.behind.append(other)

    first, second = SimpleNamespace(decode_stream=Stream(), prompt_stream=Stream()), SimpleNamespace()
    second.decode_stream, second.prompt_stream = Stream(), Stream()
    streams = LaneStreams(torch.device("cpu"), first)
    streams.bind(second)
    for stream in (second.decode_stream, second.prompt_stream):
        assert stream.behind == [first.decode_stream, first.prompt_stream]
    streams.bind(None)
    for stream in (first.decode_stream, first.prompt_stream):
        assert stream.behind == [second.decode_stream, second.prompt_stream]


def test_every_run_begins_with_a_controller_of_its_own():
    first = ticking(force=True)
    made = {"policy": get_policy("streaming_llm", factor=2), "stage": "async", "controller": first}
    runtime = Runtime(fresh("llama"), Limits(max_model_len=128, num_blocks=64), **made, eos_token_ids=())
    try:
        logs = []
        for _ in range(2):
            runtime.restart_controller()
            runtime.run(Request(prompt, SamplingParameters(max_new_tokens=NEW)) for prompt in prompts(LENGTHS))
            logs.append([entry["inputs"] for entry in decisions(runtime.controller)])
        assert logs[0][0] == logs[1][0]
        assert logs[0][0]["prefill_s"] is None
        assert decisions(first) == []
    finally:
        runtime.close()


def test_spans_are_told_once_in_order():
    readings = iter([1.0, 3.0, 4.0, 9.0])
    spans, found = Spans(torch.device("cpu"), lambda: next(readings)), []
    first, second, third, fourth = (spans.mark() for _ in range(4))
    spans.add(first, second, found.append)
    spans.add(third, fourth, found.append)
    assert (found, spans.under_way) == ([], 2)
    spans.collect()
    spans.collect()
    assert (found, spans.under_way) == ([2.0, 5.0], 0)
