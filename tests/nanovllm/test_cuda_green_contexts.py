"""Partitions of a real device: a kernel of each lane says on which SMs it ran."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("partitions need a CUDA device", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import smid  # noqa: E402

from kvsuite.errors import CaseSkipped  # noqa: E402
from kvsuite.nanovllm import cuda_driver, green_contexts  # noqa: E402
from kvsuite.nanovllm.green_contexts import open_partition, open_split, partition_available, sm_facts  # noqa: E402
from kvsuite.sm_split import PartitionRequest, nearest, split  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
PROGRAMS = 4096


@triton.jit
def _where(out, numbers, LOOPS: tl.constexpr):
    """Note the SM of every program, after so much work that all SMs get some."""
    total = tl.zeros([128], tl.float32)
    for at in range(LOOPS):
        total += tl.load(numbers + tl.arange(0, 128) + at % 64)
    tl.store(out + tl.program_id(0), smid() + tl.sum(total).to(tl.int32))


@pytest.fixture(scope="module")
def numbers():
    return torch.zeros(256, device=DEVICE)


def launch(out, numbers):
    _where[(PROGRAMS,)](out, numbers, LOOPS=2000, num_warps=4)


def sms_seen(stream, numbers) -> set[int]:
    """SMs on which a kernel of a stream ran."""
    out = torch.full((PROGRAMS,), -1, dtype=torch.int32, device=DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        launch(out, numbers)
    stream.synchronize()
    return set(out.tolist())


@pytest.fixture(scope="module")
def total() -> int:
    return sm_facts(DEVICE)[0]


def half(total: int) -> PartitionRequest:
    capability = sm_facts(DEVICE)[1]
    ((decode, prompt),) = nearest((total // 4, total // 2), total=total, capability=capability, count=1)
    return PartitionRequest(decode=decode, prompt=prompt)


@pytest.fixture
def partition(total):
    opened = open_partition(half(total), DEVICE)
    yield opened
    opened.close()


def test_kernels_of_the_lanes_run_on_their_own_sms_and_on_all_of_them(partition, numbers, total):
    print(partition.provider, partition.passed_over, partition.id)
    decode = sms_seen(partition.decode_stream, numbers)
    prompt = sms_seen(partition.prompt_stream, numbers)
    assert (len(decode), len(prompt)) == (partition.decode_sms, partition.prompt_sms)
    assert not decode & prompt
    assert cuda_driver.sms_of(partition.decode_stream.cuda_stream) == partition.decode_sms
    assert len(sms_seen(torch.cuda.Stream(DEVICE), numbers)) == total


@pytest.mark.parametrize("provider", list(green_contexts.PROVIDERS))
def test_every_provider_that_is_here_gives_what_it_says(provider, numbers, total, monkeypatch):
    monkeypatch.setattr(green_contexts, "_MADE", {})
    monkeypatch.setattr(green_contexts, "PROVIDERS", {provider: green_contexts.PROVIDERS[provider]})
    try:
        opened = open_partition(half(total), DEVICE)
    except CaseSkipped as error:
        if provider == "cuda driver":
            raise
        pytest.skip(str(error))
    try:
        lanes = [sms_seen(stream, numbers) for stream in (opened.decode_stream, opened.prompt_stream)]
        assert list(map(len, lanes)) == [opened.decode_sms, opened.prompt_sms]
        assert not lanes[0] & lanes[1]
    finally:
        opened.close()


def test_an_unbound_decode_lane_reaches_all_sms(numbers, total):
    wanted = half(total)
    opened = open_partition(PartitionRequest(decode=wanted.decode, prompt=wanted.prompt, decode_bound=False), DEVICE)
    try:
        print(opened.provider, opened.passed_over)
        assert len(sms_seen(opened.decode_stream, numbers)) == total == opened.decode_sms
        assert len(sms_seen(opened.prompt_stream, numbers)) == wanted.prompt
    finally:
        opened.close()


def test_both_lanes_compute_at_the_same_time_and_rightly(partition):
    left = torch.randn(1024, 1024, device=DEVICE, dtype=torch.bfloat16)
    expected = (left @ left).float()
    torch.cuda.synchronize()
    found = []
    for stream in (partition.decode_stream, partition.prompt_stream) * 4:
        with torch.cuda.stream(stream):
            found.append(left @ left)
    torch.cuda.synchronize()
    for product in found:
        # tilings, and so the order of sums, depend on the SMs that a library sees
        torch.testing.assert_close(product.float(), expected, rtol=2e-2, atol=1.0)


def test_a_captured_step_keeps_the_partition_that_it_was_captured_on(partition, numbers, total):
    out = torch.full((PROGRAMS,), -1, dtype=torch.int32, device=DEVICE)
    launch(out, numbers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=partition.decode_stream):
        launch(out, numbers)
    own = sms_seen(partition.decode_stream, numbers)
    streams = {
        "decode": partition.decode_stream, "prompt": partition.prompt_stream, "plain": torch.cuda.Stream(DEVICE)
    }  # fmt: skip
    seen = {}
    for name, stream in streams.items():
        out.fill_(-1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        stream.synchronize()
        seen[name] = set(out.tolist())
    del graph
    assert {name: len(sms) for name, sms in seen.items()} == dict.fromkeys(streams, len(own))
    assert all(sms == own for sms in seen.values())


def test_pinned_memory_of_a_closed_partition_is_freed_and_its_streams_are_had_again(numbers, total):
    capability = sm_facts(DEVICE)[1]
    first, second = nearest((total // 2, total // 2), total=total, capability=capability, count=2)
    pinned, streams = [], []
    for decode, prompt in [first, second] * 4:
        wanted = split(PartitionRequest(decode=decode, prompt=prompt), total=total, capability=capability)
        opened = open_split(wanted, DEVICE)
        host = torch.ones(1 << 20, pin_memory=True)
        with torch.cuda.stream(opened.prompt_stream):
            host.to(DEVICE, non_blocking=True)
        pinned.append(host)
        streams.append(opened.prompt_stream.cuda_stream)
        opened.close()
        opened.close()
        # of the partition before this one
        del pinned[:-1]
    assert len(set(streams)) == 2
    assert len(sms_seen(torch.cuda.Stream(DEVICE), numbers)) == total


def test_what_is_available_is_said():
    provider, passed_over = partition_available(DEVICE)
    assert provider in green_contexts.PROVIDERS
    assert set(passed_over) < set(green_contexts.PROVIDERS)
