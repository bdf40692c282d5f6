"""Two lanes on a CUDA device: captured decode steps beside prompts give the tokens of one lane, with parted SMs and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("lanes on CUDA need a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from decoders import fresh, greedy, prompts, text  # noqa: E402
from serving import assert_nothing_lost  # noqa: E402

from kvsuite.compression import get_policy  # noqa: E402
from kvsuite.errors import CaseSkipped  # noqa: E402
from kvsuite.nanovllm.cuda_runner import cuda_runner  # noqa: E402
from kvsuite.nanovllm.fences import StreamFence  # noqa: E402
from kvsuite.nanovllm.green_contexts import open_partition  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402
from kvsuite.sm_split import PartitionRequest  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
MIXED = (1, 40, 7, 16, 33, 3, 57, 15, 17, 21, 64, 2)
SMALL: dict[str, Any] = {
    "max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 32, "block_size": 4,
    "admission": "optimistic",
}  # fmt: skip


def _on_cuda(of):
    return replace(of, model=of.model.to(DEVICE), device=DEVICE, dtype=of.model.dtype)


@contextmanager
def _parted(shares: tuple[float, float] | None) -> Iterator[Any]:
    if shares is None:
        yield None
        return
    try:
        partition = open_partition(PartitionRequest(decode=shares[0], prompt=shares[1]), DEVICE)
    except CaseSkipped as reason:
        pytest.skip(str(reason))
    try:
        yield partition
    finally:
        partition.close()


def _served(of, given, *, limits: dict[str, Any], again: bool = False, **options: Any) -> list[list[int]]:
    runtime = Runtime(of, Limits(**SMALL | limits), runner=cuda_runner(sizes=[2, 5, 8]), overlap=True, **options)
    try:
        assert runtime.runner.facts["decode_step"] == "cuda_graph"
        requests = runtime.run([greedy(prompt, 24) for prompt in given])
        if again:
            requests += runtime.run([greedy(prompt, 24) for prompt in given])
    finally:
        runtime.close()
    assert_nothing_lost(runtime)
    return [request.output for request in requests]


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("layers", [1, None])
@pytest.mark.parametrize("shares", [None, (0.5, 0.5)])
def test_tokens_are_those_of_one_lane(shares, layers, caching):
    of = _on_cuda(fresh("qwen3"))
    given = prompts(MIXED)
    limits = {"prefix_caching": caching}
    alone = _served(of, given, limits=limits, again=True)
    with _parted(shares) as partition:
        beside = _served(of, given, limits=limits, again=True, lanes=2, prompt_layers=layers, partition=partition)
    assert beside == alone


@pytest.mark.parametrize("name", ["streaming_llm", "knorm"])
def test_compressed_prompts_give_the_tokens_of_one_lane(name):
    of = _on_cuda(fresh("llama"))
    given = prompts(MIXED)
    limits = {"prefix_caching": False}
    alone = _served(of, given, limits=limits, policy=get_policy(name, factor=3))
    assert _served(of, given, limits=limits, policy=get_policy(name, factor=3), lanes=2) == alone


def test_prefixes_that_the_decode_lane_wrote_are_found_by_the_prompt_lane():
    of = _on_cuda(fresh("llama"))
    shared = text(24)
    [first] = _served(of, [shared], limits={"prefix_caching": False})
    given = [shared, shared + first[:20], shared + first[:11]]
    alone = _served(of, given, limits={"prefix_caching": False}, again=True)
    assert _served(of, given, limits={"prefix_caching": True}, again=True, lanes=2) == alone


def test_a_fence_passes_when_its_stream_has_got_there():
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        fence = StreamFence()
    assert not fence.passed()
    fence.wait()
    assert fence.passed()
