from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.doctor.noise import Noise, drift, self_test


def noise(cv: float, drift: float = 0.0) -> Noise:
    return Noise("cpu", "work", 1, {1: 0.01}, 50, 0.04, cv, drift, 0.0)


def test_what_can_be_told_is_the_interval_of_a_difference():
    # t(0.975, 8) = 2.306: docs of 5 rounds at 4 %
    assert noise(0.04).detectable(5) == pytest.approx(2.306 * math.sqrt(2 / 5) * 0.04, rel=1e-3)
    assert noise(0.04, -0.01).detectable(5) == pytest.approx(noise(0.04).detectable(5) + 0.01)


@given(cv=st.floats(0, 0.5), moved=st.floats(-0.2, 0.2))
def test_the_rounds_asked_for_are_the_fewest_that_do(cv, moved):
    found = noise(cv, moved)
    rounds = found.rounds_for(0.05)
    if rounds is None:
        assert found.detectable(200) > 0.05
    else:
        assert found.detectable(rounds) <= 0.05
        assert rounds == 2 or found.detectable(rounds - 1) > 0.05


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (noise(0.01), "quiet: differences of times below 1.5% cannot be told with 5 rounds"),
        (noise(0.05), "noisy: differences of times below 7.3% cannot be told with 5 rounds; 9 rounds would tell 5%"),
        (noise(0.01, 0.06), "too noisy for times: "),
    ],
)
def test_verdicts(found, words):
    assert found.verdict.startswith(words)


def test_drift_is_not_moved_by_an_outlier():
    rounds = [1.0 + 0.001 * place for place in range(101)]
    rounds[50] = 30.0
    assert drift(rounds) == pytest.approx(0.1 / 1.05, rel=0.01)


def test_a_self_test_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    found = self_test("cpu", 0.2, rows=256)
    assert torch.get_num_threads() == before
    assert found.threads in found.step_s_by_threads
    assert found.step_s_by_threads[found.threads] == min(found.step_s_by_threads.values())
    assert found.rounds >= 3
    assert found.cv >= 0
    assert "256" not in found.work  # in MiB, of float32
    assert "0 MiB" in found.work


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_self_test_of_a_gpu():
    found = self_test("cuda:0", 1.0)
    assert found.threads is None
    # as many as a second has room for, and it may share the device with other tests
    assert found.rounds >= 3
    assert "512 MiB" in found.work
    # the matrix is read once a product: no device reads faster than 20 TB/s
    products = int(found.work.split()[2])
    assert found.round_s > products * 2**29 / 20e12
