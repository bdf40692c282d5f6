"""Steps with prompts over static tensors, layer by layer: the tokens are those of steps launched as they come.

On a CPU nothing is captured, and kernels are plain torch; all else is as on CUDA (`test_cuda_layers`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from decoders import fresh, generated, greedy, prompts, text
from serving import assert_nothing_lost
from torch_kernels import use_torch_kernels

from kvsuite.compression import get_policy
from kvsuite.errors import UserError
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm import cuda_runner as module
from kvsuite.nanovllm.captured_layers import MOST_TOKENS, CapturedLayers, layer_sizes
from kvsuite.nanovllm.cuda_runner import CapturableReference, CudaRunner, cuda_runner
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime

MIXED = (1, 40, 7, 16, 33, 3, 57, 15)
NEW = 10


@pytest.fixture(autouse=True)
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch_kernels(monkeypatch)


@contextmanager
def _running(of: LoadedModel, monkeypatch: pytest.MonkeyPatch, sizes: list[int], **options: Any) -> Iterator[Runtime]:
    """A runtime of steps of up to 40 tokens, whose layers are captured for some numbers of tokens."""
    monkeypatch.setattr(module, "layer_sizes", lambda most: sizes)
    limits = Limits(
        max_model_len=84, max_num_seqs=8, max_num_batched_tokens=40, num_blocks=32, block_size=4,
        admission="optimistic", prefix_caching="policy" not in options,
    )  # fmt: skip
    runtime = Runtime(of, limits, runner=cuda_runner(sizes=[2, 8]), **options)
    try:
        yield runtime
    finally:
        runtime.close()
        assert_nothing_lost(runtime)


def _taken(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Tokens of every step that is not a captured decode step, and whether its layers were captured; fills as steps come."""
    assert isinstance(runtime.runner, CudaRunner)
    layers, seen = runtime.runner.layers, list[tuple[int, bool]]()
    assert isinstance(layers, CapturedLayers)
    whole = layers.hidden

    def hidden(batch: Any, *given: Any, **named: Any) -> Any:
        found = whole(batch, *given, **named)
        seen.append((batch.tokens, found is not None))
        return found

    monkeypatch.setattr(layers, "hidden", hidden)
    return seen


@pytest.mark.parametrize(("kind", "overlap"), [("llama", False), ("qwen3", True), ("mistral-window", True)])
def test_output_equals_generate(kind: str, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    of = fresh(kind)
    given = prompts(MIXED)
    expected = [generated(of, prompt, NEW) for prompt in given]
    with _running(of, monkeypatch, [10, 24], overlap=overlap) as runtime:
        seen = _taken(runtime, monkeypatch)
        requests = runtime.run([greedy(prompt, NEW) for prompt in given])
        facts = runtime.runner.facts
    assert [request.output for request in requests] == expected
    # smaller and larger ones than there are layers for, and padded ones of every size
    assert all(captured == (tokens <= 24) for tokens, captured in seen)
    assert {tokens > 24 for tokens, _ in seen} == {True, False}
    assert facts["prompt_sizes"] == [10, 24]
    assert (facts["prompt_step"], facts["prompt_step_reason"]) == ("eager", "cpu captures nothing")


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "knorm"])
def test_a_policy_sees_the_queries_that_it_would_see(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(MIXED[:6])
    found = []
    for sizes in ([10, 40], [1]):
        runtime: Runtime
        with _running(fresh("llama"), monkeypatch, sizes, policy=get_policy(policy, factor=2)) as runtime:
            seen = _taken(runtime, monkeypatch)
            found.append([request.output for request in runtime.run([greedy(prompt, NEW) for prompt in given])])
            assert any(captured and tokens > 1 for tokens, captured in seen) == (sizes != [1])
    assert found[0] == found[1]


def test_single_tokens_in_front_attend_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of three single tokens and a chunk: the attention of steps as they come is begun for the chunk alone."""
    of = fresh("llama")
    with _running(of, monkeypatch, [40]) as runtime:
        assert isinstance(runtime.runner, CudaRunner)
        first = [runtime.add(greedy(text(5, seed), NEW)) for seed in range(3)]
        while any(request.output_length < 2 for request in first):
            runtime.step()
        begun: list[list[int]] = []
        attention = runtime.runner.attention
        begin = attention.begin

        def note(batch: Any) -> None:
            begun.append(batch.query_start_host.tolist())
            begin(batch)

        monkeypatch.setattr(attention, "begin", note)
        late = runtime.add(greedy(text(50, 9), 3))
        runtime.run()
    assert begun[:2] == [[0, 37], [0, 13]]
    for request in (*first, late):
        assert request.output == generated(of, request.tokens[: request.prompt_length], request.output_length)


def test_attention_of_single_tokens_begins_every_step_and_stays_when_graphs_take_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, begun, made = fresh("llama"), list[list[int]](), list[weakref.ref[Any]]()
    captured, begin = CapturableReference.captured, CapturableReference.begin

    def note(attention: CapturableReference, batch: Any) -> None:
        if any(attention is ref() for ref in made):
            begun.append(batch.kv_lengths.tolist())
        begin(attention, batch)

    def make(attention: CapturableReference, batch: Any) -> CapturableReference:
        found = captured(attention, batch)
        made.append(weakref.ref(found))
        return found

    with _running(of, monkeypatch, [40]) as runtime:
        assert isinstance(runtime.runner, CudaRunner)
        attention, decoder = runtime.runner.attention, runtime.runner.decoder
        assert isinstance(attention, CapturableReference)
        assert decoder is not None
        monkeypatch.setattr(CapturableReference, "captured", make)
        layers = CapturedLayers(decoder, attention, [40], max_sequences=8, max_blocks=21, singles_apart=True)
        monkeypatch.setattr(CapturableReference, "begin", note)
        monkeypatch.setattr(runtime.runner, "layers", layers)
        first = [runtime.add(greedy(text(5, seed), NEW)) for seed in range(3)]
        while any(request.output_length < 2 for request in first):
            runtime.step()
        begun.clear()
        runtime.add(greedy(text(50, 9), 3))
        runtime.run()
        # with a row of padding, from tensors that hold this step's numbers
        assert begun == [[7, 7, 7, 1], [8, 8, 8, 1]]
        # a graph that replays what they launch holds none of them
        layers._single_pieces.clear()
        gc.collect()
        assert len(made) == 4
        assert all(ref() is not None for ref in made)


class _Late:
    """The stream beside: what is launched there comes last."""

    def launch(self, launch: Callable[[], None]) -> None:
        self.join = launch


def test_padding_of_single_tokens_leaves_prompts_alone_whoever_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three single tokens are padded to four, beside a chunk whose attention is there already."""
    of = fresh("llama")
    with _running(of, monkeypatch, [40]) as runtime:
        assert isinstance(runtime.runner, CudaRunner)
        monkeypatch.setattr(runtime.runner.layers, "_beside", _Late())
        first = [runtime.add(greedy(text(5, seed), NEW)) for seed in range(3)]
        while any(request.output_length < 2 for request in first):
            runtime.step()
        late = runtime.add(greedy(text(36, 9), 3))
        runtime.run()
    for request in (*first, late):
        assert request.output == generated(of, request.tokens[: request.prompt_length], request.output_length)


def test_padding_writes_the_scratch_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with _running(fresh("llama"), monkeypatch, [40]) as runtime:
        runtime.run([greedy(text(38), 1)])
        before = [pool.keys.clone() for pool in runtime.pools]
        request = runtime.add(greedy(text(6, seed=1), 2))
        runtime.step()
        for pool, earlier in zip(runtime.pools, before, strict=True):
            changed = (pool.keys != earlier).flatten(3).any(-1).any(0)
            blocks = set(changed.any(-1).nonzero().flatten().tolist()) - {0}
            own = runtime.tables[0].rows(np.array([request.row]))[0, :2]
            assert blocks == set(own.tolist())
            assert torch.isfinite(pool.keys[:, 0]).all()


def test_prompts_with_a_lane_of_their_own_get_no_layers() -> None:
    of = fresh("llama")
    limits = Limits(max_model_len=84, max_num_seqs=8, max_num_batched_tokens=40, num_blocks=32, block_size=4)
    runtime = Runtime(of, limits, runner=cuda_runner(sizes=[2, 8], prompts_apart=True), lanes=2)
    facts = runtime.runner.facts
    assert (facts["prompt_step"], facts["prompt_step_reason"]) == ("eager", "prompts have a lane of their own")
    assert "prompt_sizes" not in facts
    [request] = runtime.run([greedy(text(30), 4)])
    runtime.close()
    assert request.output == generated(of, text(30), 4)


def test_switched_off_and_not_fused_have_their_reasons() -> None:
    limits = Limits(max_model_len=84, max_num_seqs=2, num_blocks=32)
    for options, reason in (({"graphs": False}, "switched off"), ({"fuse": False}, "layers are not fused")):
        runtime = Runtime(fresh("llama"), limits, runner=cuda_runner(**options))
        facts = runtime.runner.facts
        runtime.close()
        assert (facts["prompt_step"], facts["prompt_step_reason"]) == ("eager", reason)


def test_layers_that_do_not_fit_say_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "CapturedLayers", fails)
    with pytest.raises(UserError, match=r"max_num_batched_tokens=40: .* layers for 64 tokens .* smaller memory_share"):
        Runtime(
            fresh("llama"),
            Limits(max_model_len=32, max_num_seqs=8, max_num_batched_tokens=40, num_blocks=8),
            runner=cuda_runner(),
        )


@pytest.mark.parametrize(
    ("limits", "sizes", "apart"),
    [
        ({"max_num_seqs": 2}, [64, 128, 192], True),
        # one sequence is short, and nothing decodes beside its prompt
        ({"max_num_seqs": 1}, [64, 128], False),
        ({"max_num_seqs": 2, "prefill_first": True}, [64, 128, 192], False),
        # the pool holds no more
        ({"max_num_seqs": 8, "num_blocks": 30}, [64, 128], True),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 60}, [64], True),
    ],
)
def test_nothing_is_captured_that_limits_leave_no_step_for(
    limits: dict[str, Any], sizes: list[int], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    class Noted(CapturedLayers):
        def __init__(self, *given: Any, **named: Any) -> None:
            seen.append(named["singles_apart"])
            super().__init__(*given, **named)

    monkeypatch.setattr(module, "CapturedLayers", Noted)
    given = {"max_model_len": 84, "max_num_batched_tokens": 8192, "num_blocks": 200, "block_size": 4} | limits
    runtime = Runtime(fresh("llama"), Limits(**given), runner=cuda_runner(sizes=[1]))
    [request] = runtime.run([greedy(text(70), 4)])
    facts = runtime.runner.facts
    runtime.close()
    assert (facts["prompt_sizes"], seen) == (sizes, [apart])
    assert request.output == generated(fresh("llama"), text(70), 4)


@pytest.mark.parametrize("most", [1, 64, 65, 200, 256, 700, 1024, 8192])
def test_sizes_reach_what_a_step_can_have(most: int) -> None:
    sizes = layer_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= min(most, MOST_TOKENS)
    # none is larger than is needed
    assert len(sizes) == 1 or sizes[-2] < most
    for tokens in range(1, sizes[-1] + 1):
        assert next(size for size in sizes if size >= tokens) - tokens < 128
