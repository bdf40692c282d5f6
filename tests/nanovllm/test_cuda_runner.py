"""The runner of CUDA devices. On a CPU its decode steps go over the same static tensors, uncaptured and by the reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoders import KINDS, VOCAB, fresh, generated, greedy, loaded, prompts, text
from serving import LogitsByRequest, assert_nothing_lost

from kvsuite.errors import CaseSkipped
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm import cuda_runner as module
from kvsuite.nanovllm.cuda_runner import CapturableReference, CudaRunner, attention_for, cuda_runner
from kvsuite.nanovllm.decode_graphs import default_sizes
from kvsuite.nanovllm.flashinfer_libraries import Libraries, flashinfer_module
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kernel_attention import KernelAttention
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime

MIXED = (1, 40, 7, 16, 33, 3, 57, 15, 17, 21)


@contextmanager
def _running(of: LoadedModel, runner: dict[str, Any] | None = None, **limits: Any) -> Iterator[Runtime]:
    small = {"max_model_len": 84, "max_num_seqs": 8, "max_num_batched_tokens": 24, "num_blocks": 32, "block_size": 4}
    runtime = Runtime(of, Limits(**(small | limits), admission="optimistic"), runner=cuda_runner(**(runner or {})))
    try:
        yield runtime
    finally:
        runtime.close()
        assert_nothing_lost(runtime)


@pytest.mark.parametrize("kind", KINDS)
def test_output_through_static_steps_equals_generate(kind: str) -> None:
    of = loaded(kind)
    given = prompts(MIXED)
    blocks = 20 if kind == "mistral-window" else 32
    with _running(of, {"sizes": [2, 5, 8]}, num_blocks=blocks) as runtime:
        requests = runtime.run([greedy(prompt, 24) for prompt in given])
        assert runtime.counters.preemptions > 0
        facts = runtime.runner.facts
    assert [request.output for request in requests] == [generated(of, prompt, 24) for prompt in given]
    if kind in ("mistral-window", "qwen3-mixed"):
        assert "sliding window" in facts["decode_step_reason"]
    else:
        assert facts["decode_sizes"] == [2, 5, 8]
    assert facts["decode_step"] == "eager"
    assert "the kernels need CUDA" in facts["attention"]


def test_decode_steps_go_over_the_static_tensors() -> None:
    of = loaded("llama")
    with _running(of, {"sizes": [1, 4]}) as runtime:
        assert isinstance(runtime.runner, CudaRunner)
        graphs = runtime.runner.graphs
        assert graphs is not None
        ran: list[Any] = []
        whole = graphs.run
        graphs.run = lambda batch: ran.append(whole(batch)) or ran[-1]  # type: ignore[method-assign, func-returns-value]
        runtime.run([greedy(text(8, seed), 6) for seed in range(3)])
        taken = [found is not None for found in ran]
        # one step for the prompts, five that decode
        assert taken == [False, True, True, True, True, True]
        # six at a time are more than the largest size
        ran.clear()
        runtime.run([greedy(text(2, seed), 4) for seed in range(6)])
        assert [found is not None for found in ran] == [False] * 4


def test_logits_of_padded_steps_equal_those_of_the_plain_runner() -> None:
    of = loaded("qwen3")
    seen = []
    for runner in (None, cuda_runner(sizes=[8])):
        runtime = Runtime(of, Limits(max_model_len=64, max_num_seqs=8, num_blocks=40), runner=runner)
        logits = LogitsByRequest(runtime)
        requests = runtime.run([greedy(text(5 + 3 * seed, seed), 12) for seed in range(3)])
        seen.append([logits.of(request) for request in requests])
        runtime.close()
    for plain, padded in zip(*seen, strict=True):
        torch.testing.assert_close(padded, plain, atol=2e-5, rtol=1e-4)


def test_graphs_and_fusing_can_be_switched_off() -> None:
    of = loaded("llama")
    with _running(of, {"graphs": False, "fuse": False}) as runtime:
        facts = runtime.runner.facts
        assert (facts["decode_step"], facts["decode_step_reason"]) == ("eager", "switched off")
        assert facts["not_fused"] == "switched off"
        [request] = runtime.run([greedy(text(9), 5)])
    assert request.output == generated(of, text(9), 5)


def test_the_model_gets_its_attention_back() -> None:
    of = fresh("llama")
    before = of.text_config._attn_implementation
    with _running(of) as runtime:
        assert of.text_config._attn_implementation != before
        runtime.run([greedy(text(3), 2)])
    assert of.text_config._attn_implementation == before


def test_a_runner_that_cannot_be_made_gives_the_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    of = fresh("llama")
    before = of.text_config._attn_implementation

    def fails(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module.DecodeGraphs, "capture", fails)
    with pytest.raises(module.UserError, match=r"max_num_seqs=8: .* smaller memory_share"):
        Runtime(of, Limits(max_model_len=32, max_num_seqs=8, num_blocks=8), runner=cuda_runner())
    assert of.text_config._attn_implementation == before


def test_a_model_that_cannot_be_captured_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(module.DecodeGraphs, "capture", fails)
    of = loaded("neox")
    with _running(of) as runtime:
        assert runtime.runner.facts["decode_step_reason"] == (
            "the model cannot be captured: operation not permitted when stream is capturing"
        )
        [request] = runtime.run([greedy(text(9), 5)])
    assert request.output == generated(of, text(9), 5)


def test_large_gathers_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    of = loaded("llama")
    # a row of 84 tokens, two heads of 16, keys and values, four bytes
    monkeypatch.setattr(module, "_REFERENCE_BYTES", 3 * 84 * 2 * 16 * 2 * 4)
    with _running(of) as runtime:
        assert runtime.runner.facts["decode_sizes"] == [1, 2]
    monkeypatch.setattr(module, "_REFERENCE_BYTES", 0)
    with _running(of) as runtime:
        assert "1 GiB" in runtime.runner.facts["decode_step_reason"]


@pytest.mark.parametrize("kind", ["llama", "qwen3-mixed"])
@pytest.mark.parametrize("length", [84, 4])
def test_warming_up_touches_the_scratch_block_alone(kind: str, length: int) -> None:
    of = loaded(kind)
    with _running(of, {"warm_up": True}, max_model_len=length) as runtime:
        for pool in runtime.pools:
            assert pool.keys[:, 0].any()
            assert not pool.keys[:, 1:].any()
            assert torch.isfinite(pool.values).all()
        [request] = runtime.run([greedy(text(2), 2)])
    assert request.output == generated(of, text(2), 2)


def test_scoring_rows_equal_logits() -> None:
    of = loaded("llama")
    with _running(of) as runtime:
        kept: list[Any] = []
        whole = runtime.runner.run

        def both(batch: Any) -> Any:
            kept.append((runtime.runner.logits(runtime.runner.hidden(batch)), whole(batch)))
            return kept[-1][1]

        runtime.runner.run = both  # type: ignore[method-assign]
        runtime.run([greedy(text(9), 3)])
    assert kept[0][0].shape == (1, VOCAB)
    for scored, sampled in kept:
        torch.testing.assert_close(scored, sampled, atol=1e-5, rtol=1e-4)


def test_sizes_are_finer_where_padding_costs_more() -> None:
    sizes = default_sizes(256)
    assert sizes[0] == 1
    assert sizes[-1] == 256
    for batch in range(1, 257):
        size = next(s for s in sizes if s >= batch)
        assert size - batch <= max(1, 3 * batch // 5)


def test_flashinfer_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(CaseSkipped, match=r"pip install .*flashinfer-python"):
        flashinfer_module()


def test_the_reference_attends_where_kernels_cannot() -> None:
    group = LayerGroup((0,), 2, 80)
    pool = KVPool(group, num_blocks=2, block_size=4, device=torch.device("cpu"), dtype=torch.bfloat16)
    attention, why = attention_for([pool], query_heads=4)
    assert isinstance(attention, CapturableReference)
    assert why == "the kernels need CUDA, not cpu"


@pytest.mark.parametrize("group", [LayerGroup((0,), 2, 64), LayerGroup((0,), 2, 64, window=8)])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_the_reference_attends_where_torchs_flash_attention_cannot(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], group: LayerGroup
) -> None:
    pool = KVPool(group, num_blocks=2, block_size=4, device=torch.device("cpu"), dtype=torch.float16)
    monkeypatch.setattr(module, "_without_kernel", lambda pools: "")
    monkeypatch.setattr(pool, "device", torch.device("cuda"))
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module, "libraries_for", lambda pools, build: Libraries(missing="fa2"))
    made: list[Any] = []
    # what it would allocate has no device here
    monkeypatch.setattr(module, "KernelAttention", lambda pools, **options: made.append(pools))
    attention, why = attention_for([pool], query_heads=4)
    # single tokens with a window need none of torch's
    if capability == (7, 5) and group.window is None:
        assert isinstance(attention, CapturableReference)
        assert why == (
            "torch's flash attention needs compute capability 8.0, the device has 7.5, and FlashInfer is not built"
        )
    else:
        assert made
        assert why == ""


def test_the_record_says_which_kernels_are_there() -> None:
    with _running(loaded("llama"), {"tune": False}) as runtime:
        runner = runtime.runner
        assert isinstance(runner, CudaRunner)
        # as the facts of a CUDA device are made
        runner.device = torch.device("cuda")
        try:
            assert runner.facts["kernels"] == "none: the kernels need CUDA, not cpu"
            for missing, words in ((None, "prepared"), ("fa3", "not prepared: flashinfer fa3")):
                libraries = Libraries(missing=missing)
                runner.attention = KernelAttention(runtime.pools, query_heads=4, libraries=libraries)
                assert runner.facts["kernels"] == words
                # fused layers would have had tilings
                decoder: Any = type("Decoder", (), {"effective": {"products": {}}})
                runner.decoder = decoder
                assert runner.facts["kernels"] == f"{words}; tilings not used"
                runner.decoder = None
        finally:
            runner.device = torch.device("cpu")
