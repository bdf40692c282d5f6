"""Times of the compression stage: layer groups of a prompt together, the last turn of a preempted one, no waiting."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.stage_times import StageTimes


def test_layer_groups_of_a_prompt_are_one_time_and_work_is_done_between_the_marks() -> None:
    marks, done = itertools.accumulate([0.0, 1.0, 5.0, 2.0, 9.0, 0.5]), []
    times = StageTimes(torch.device("cpu"), lambda: next(marks))
    first, second = Request([5, 6], 2), Request([5, 6], 2)
    works = [times(one, lambda one=one: done.append(one)) for one in (first, first, second)]
    assert done == []
    for work in works:
        work()
    assert done == [first, first, second]
    assert times.seconds() == pytest.approx({first: 1.0 + 2.0, second: 0.5})


def test_a_prompt_that_is_compressed_again_counts_once() -> None:
    marks = itertools.accumulate([0.0, 1.0, 5.0, 4.0])
    times = StageTimes(torch.device("cpu"), lambda: next(marks))
    request = Request([5, 6], 2)
    times(request, lambda: None)()
    request.preemptions += 1
    times(request, lambda: None)()
    assert times.seconds() == pytest.approx({request: 4.0})
