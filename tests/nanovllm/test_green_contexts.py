"""Who provides SM partitions, and what is said where nobody does. What they really do is in test_cuda_green_contexts."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kvsuite.errors import CaseSkipped
from kvsuite.nanovllm import cuda_driver, green_contexts
from kvsuite.sm_split import PartitionRequest, split

BOTH = split(PartitionRequest(decode=24, prompt=104), total=132, capability=(9, 0))
FREE = split(PartitionRequest(decode=24, prompt=104, decode_bound=False), total=132, capability=(9, 0))
WHOLE = split(PartitionRequest(decode=64, prompt=64), total=128, capability=(9, 0))


class Stream:
    """Bears a number, as streams do."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number


def module(name: str, **members: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture
def torch_contexts(monkeypatch):
    """Put something in the place of ``torch.cuda.green_contexts``."""

    def put(**members):
        monkeypatch.setitem(sys.modules, "torch.cuda.green_contexts", module("torch.cuda.green_contexts", **members))

    return put


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_no_partition_without_cuda(device):
    with pytest.raises(CaseSkipped, match=f"needs a CUDA device, not {device}"):
        green_contexts.open_partition(PartitionRequest(decode=64, prompt=64), torch.device(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_no_partition_where_torch_sees_no_device():
    with pytest.raises(CaseSkipped, match="torch sees no CUDA device"):
        green_contexts.open_partition(PartitionRequest(decode=64, prompt=64), torch.device("cuda:0"))


class TorchTwelve:
    """Keyword arguments alone, and a stream."""

    @staticmethod
    def create(*, num_sms, device_id):
        return SimpleNamespace(Stream=lambda: Stream(num_sms), device_id=device_id)

    def Stream(self): ...


class TorchTen:
    """No stream of its own: one is made while it is current."""

    current = 0

    @staticmethod
    def create(num_sms, device_id=0):
        made = TorchTen()
        made.num_sms = num_sms
        return made

    def set_context(self):
        TorchTen.current = self.num_sms

    def pop_context(self):
        TorchTen.current = 0


def test_contexts_of_torch_that_would_share_sms_are_passed_over(torch_contexts):
    for context in (TorchTen, TorchTwelve):
        torch_contexts(GreenContext=context)
        with pytest.raises(green_contexts._PassedOver, match="two would share SMs"):
            green_contexts._by_torch(BOTH, 0)


def test_torch_gives_the_prompt_lane_its_part_where_decoding_is_not_bound(torch_contexts, monkeypatch):
    torch_contexts(GreenContext=TorchTwelve)
    made = green_contexts._by_torch(FREE, 0)
    assert (made.decode, made.prompt.cuda_stream) == (None, 104)
    torch_contexts(GreenContext=TorchTen)
    monkeypatch.setattr(cuda_driver, "current_stream", lambda: TorchTen.current)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: Stream(handle))
    made = green_contexts._by_torch(FREE, 0)
    assert (made.decode, made.prompt.cuda_stream, TorchTen.current) == (None, 104, 0)


def test_torch_splits_where_it_can(torch_contexts):
    class Part:
        @staticmethod
        def from_device(index):
            return Part()

        def split(self, *, num_sms):
            return tuple(num_sms), 4

    torch_contexts(
        SMPartition=Part, GreenContext=lambda *, sm_partition: SimpleNamespace(Stream=lambda: Stream(sm_partition))
    )
    made = green_contexts._by_torch(BOTH, 0)
    assert (made.decode.cuda_stream, made.prompt.cuda_stream) == (24, 104)


def test_sgl_kernel_and_flashinfer_are_asked_in_their_order(monkeypatch):
    def create_greenctx_stream_by_value(first, second, device):
        return Stream(first), Stream(second)

    def split_device_green_ctx_by_sm_count(device, counts):
        assert device == torch.device("cuda:0")
        return [Stream(count) for count in (*counts, 132 - sum(counts))], None

    monkeypatch.setitem(
        sys.modules, "sgl_kernel", module("sgl_kernel", create_greenctx_stream_by_value=create_greenctx_stream_by_value)
    )
    name = "flashinfer.green_ctx"
    monkeypatch.setitem(sys.modules, "flashinfer", module("flashinfer"))
    monkeypatch.setitem(
        sys.modules, name, module(name, split_device_green_ctx_by_sm_count=split_device_green_ctx_by_sm_count)
    )
    for made in (green_contexts._by_sgl_kernel(BOTH, 0), green_contexts._by_flashinfer(BOTH, 0)):
        assert (made.decode.cuda_stream, made.prompt.cuda_stream) == (24, 104)
    # nothing remains of 64 + 64 of 128, and a part of nothing cannot be made
    made = green_contexts._by_flashinfer(WHOLE, 0)
    assert (made.decode.cuda_stream, made.prompt.cuda_stream) == (132 - 64, 64)
    monkeypatch.setitem(sys.modules, "sgl_kernel", module("sgl_kernel"))
    with pytest.raises(green_contexts._PassedOver, match="no create_greenctx_stream_by_value"):
        green_contexts._by_sgl_kernel(BOTH, 0)


def test_a_package_that_is_missing_or_broken_says_which(tmp_path, monkeypatch):
    with pytest.raises(green_contexts._PassedOver, match="not installed"):
        green_contexts._package("no_such_package_of_anybody")
    (tmp_path / "broken_package_of_somebody.py").write_text("import no_such_package_of_anybody\n")
    (tmp_path / "odd_package_of_somebody.py").write_text("raise OSError('undefined symbol:\\n c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(green_contexts._PassedOver, match="cannot be imported: no no_such_package_of_anybody"):
        green_contexts._package("broken_package_of_somebody")
    with pytest.raises(green_contexts._PassedOver, match="OSError: undefined symbol: c10"):
        green_contexts._package("odd_package_of_somebody")


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({1: 24, 2: 112}, "gave 24 and 112 SMs where 24 and 104 were asked for"),
        ({1: 24, 2: None}, "gave 24 and all SMs"),
    ],
)
def test_other_counts_than_those_asked_for_are_no_partition(counts, told, monkeypatch):
    closed = []
    monkeypatch.setattr(cuda_driver, "sms_of", counts.__getitem__)
    made = green_contexts._Made(Stream(1), Stream(2), lambda: closed.append(True))
    with pytest.raises(green_contexts._PassedOver, match=told):
        green_contexts._opened("somebody", made, BOTH, 0, {})
    assert closed == [True]


def test_where_nobody_can_the_case_is_skipped_with_every_reason_and_nothing_stands_in_for_a_partition(monkeypatch):
    def first(wanted, index):
        raise green_contexts._PassedOver("not installed")

    def second(wanted, index):
        raise OSError("undefined symbol")

    def third(wanted, index):
        return green_contexts._Made(Stream(1), Stream(2), lambda: None)

    monkeypatch.setattr(green_contexts, "_MADE", {})
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    # streams of the whole device, as plain ones are
    monkeypatch.setattr(cuda_driver, "sms_of", {1: None, 2: None}.__getitem__)
    monkeypatch.setattr(green_contexts, "PROVIDERS", {"one": first, "two": second, "plain": third})
    with pytest.raises(CaseSkipped) as skipped:
        green_contexts.open_split(BOTH, torch.device("cuda:0"))
    assert str(skipped.value) == (
        "SM partition 24:104: nobody here can make it: one: not installed; two: OSError: undefined symbol; "
        "plain: gave all and all SMs where 24 and 104 were asked for"
    )
    monkeypatch.setattr(cuda_driver, "sms_of", {1: 24, 2: 104}.__getitem__)
    opened = green_contexts.open_split(BOTH, torch.device("cuda:0"))
    assert (opened.provider, list(opened.passed_over)) == ("plain", ["one", "two"])
    # memory that was used on its streams is freed whenever: they are not destroyed, and not made a second time
    assert green_contexts.open_split(BOTH, torch.device("cuda:0")) is opened


def test_a_record_says_who_made_it_who_did_not_and_what_was_preloaded(monkeypatch):
    monkeypatch.setattr(cuda_driver, "sms_of", {1: 24, 2: 104}.__getitem__)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    made = green_contexts._Made(Stream(1), Stream(2), lambda: None)
    opened = green_contexts._opened("cuda driver", made, BOTH, 0, {"sgl_kernel": "not installed"})
    told = opened.to_dict()
    assert (told["decode_sms"], told["prompt_sms"], told["requested_sms"]) == (24, 104, [24, 104])
    assert (told["provider"], told["passed_over"]) == ("cuda driver", {"sgl_kernel": "not installed"})
    assert (told["shimmed"], "ld_preload" in told) == (False, False)
    monkeypatch.setenv("LD_PRELOAD", "/somewhere/sgl_kernel_shim.so")
    assert (opened.to_dict()["shimmed"], opened.to_dict()["ld_preload"]) == (True, "/somewhere/sgl_kernel_shim.so")


@pytest.mark.parametrize("lacking", ["context", "stream"])
def test_what_the_driver_made_before_it_refused_is_given_back(lacking, monkeypatch):
    alive = {}

    def made(kind, of):
        if kind == lacking and of == 104:
            raise cuda_driver.DriverError("no more")
        alive[kind, of] = True
        return of

    monkeypatch.setattr(cuda_driver, "green_context", lambda device, part: made("context", part))
    monkeypatch.setattr(cuda_driver, "context_stream", lambda context: made("stream", context))
    monkeypatch.setattr(cuda_driver, "destroy_context", lambda context: alive.pop(("context", context)))
    monkeypatch.setattr(cuda_driver, "destroy_stream", lambda stream: alive.pop(("stream", stream)))
    with pytest.raises(cuda_driver.DriverError):
        green_contexts._from_driver(0, [24, 104], 0)
    assert alive == {}


def test_the_structure_of_the_driver_has_the_size_of_its_abi():
    import ctypes

    assert (ctypes.sizeof(cuda_driver.Resource), cuda_driver.Resource.sm_count.offset) == (144, 96)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_driver_it_says_so():
    with pytest.raises(cuda_driver.DriverError, match="no CUDA driver"):
        cuda_driver.version()
