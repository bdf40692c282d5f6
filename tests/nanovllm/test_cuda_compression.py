"""Compression on CUDA: beside captured, overlapped steps, without waiting, with the tokens of `sync` and of no policy."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("a side stream needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from compressor_weights import random_weights, written  # noqa: E402
from decoders import fresh, greedy, prompts  # noqa: E402
from kept_positions import turning  # noqa: E402
from prompt_policies import EVERY  # noqa: E402
from serving import assert_nothing_lost  # noqa: E402

from kvsuite.compression import get_policy  # noqa: E402
from kvsuite.compression.merging import CacheShape  # noqa: E402
from kvsuite.compression.prompt_view import attention_weights  # noqa: E402
from kvsuite.nanovllm.cuda_runner import cuda_runner  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
LENGTHS = (38, 12, 40, 37, 11, 52, 29, 47)
NEW = 16


def _on_cuda(kind: str = "llama"):
    of = fresh(kind)
    return replace(of, model=of.model.to(DEVICE), device=DEVICE, dtype=of.model.dtype)


def _not_waiting(after_step: Any) -> Any:
    """The stage's work, which raises where the host would wait for the device."""

    def watching(requests: Any) -> None:
        with warnings.catch_warnings():
            # the mode itself warns that it is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            after_step(requests)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watching


def _served(
    name: str,
    own: dict[str, Any],
    *,
    stage: str,
    slow: bool = False,
    watched: bool = False,
    shared: bool = False,
    how: dict[str, Any] | None = None,
    **limits: Any,
):
    """Output of requests that want each other's blocks, and the runtime's facts."""
    of = _on_cuda()
    policy = get_policy(name, **own) if name else None
    rotation = None if policy is None else turning(of, policy)
    small: dict[str, Any] = {
        "max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 56, "num_blocks": 40, "block_size": 4,
        "prefix_caching": False, "prefill_first": True,
    }  # fmt: skip
    runner = cuda_runner(rotation=rotation, sizes=[2, 5, 8])
    runtime = Runtime(
        of, Limits(**small | limits), policy=policy, rotation=rotation, stage=stage, runner=runner, **how or {}
    )
    assert runtime.overlap
    facts = runtime.runner.facts
    assert facts["decode_step"] == "cuda_graph", facts
    stage_of = runtime.compression
    if slow:
        submit = stage_of._aside.submit

        def later(work: Any, fence: Any) -> None:
            def slowly() -> None:
                torch.cuda._sleep(20_000_000)
                work()

            submit(slowly, fence)

        stage_of._aside.submit = later
    if watched:
        # kernels and libraries are loaded by the first requests
        runtime.run([greedy(prompt, 3) for prompt in prompts((21, 33))])
        stage_of.after_step = _not_waiting(stage_of.after_step)
    given = prompts(LENGTHS)
    if shared:
        given = [given[5][:20] + prompt for prompt in given[:5]]
    requests = runtime.run([greedy(prompt, NEW) for prompt in given])
    counters = runtime.counters
    runtime.close()
    torch.cuda.synchronize()
    assert_nothing_lost(runtime)
    assert [request.reason for request in requests] == ["length"] * len(requests)
    return [request.output for request in requests], counters


@EVERY
def test_aside_gives_the_tokens_of_between_the_steps(name, own):
    wanted, counters = _served(name, {"factor": 3, **own}, stage="sync")
    assert counters.evicted_tokens > 0
    assert _served(name, {"factor": 3, **own}, stage="async")[0] == wanted


@pytest.mark.parametrize("name", ["streaming_llm", "knorm", "snapkv"])
def test_a_slow_stage_gives_the_same_tokens(name):
    """20 million cycles before every move: whoever does not wait reads blocks that are not written yet."""
    wanted, _ = _served(name, {"factor": 3}, stage="sync", num_blocks=20)
    assert _served(name, {"factor": 3}, stage="async", num_blocks=20, slow=True)[0] == wanted


@pytest.mark.parametrize("stage", ["sync", "async"])
def test_a_factor_of_one_gives_the_tokens_of_no_compression(stage):
    dense, _ = _served("", {}, stage="sync")
    for name in ("streaming_llm", "h2o"):
        assert _served(name, {"factor": 1}, stage=stage)[0] == dense


@pytest.mark.parametrize("name", ["streaming_llm", "uniform_stride", "knorm"])
def test_the_prefix_cache_changes_nothing(name):
    wanted, off = _served(name, {"factor": 3}, stage="async", prefix_caching=False, shared=True)
    for slow in (False, True):
        found, on = _served(name, {"factor": 3}, stage="async", prefix_caching=True, slow=slow, shared=True)
        assert on.prefix_hit_tokens > 0
        assert found == wanted
    assert off.prefix_hit_tokens == 0


@pytest.mark.parametrize("stage", ["sync", "async"])
@EVERY
def test_the_stage_does_not_wait_for_the_device(name, own, stage):
    _served(name, {"factor": 3, **own}, stage=stage, watched=True, num_blocks=160)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("queries", "length"), [(5, 70), (64, 64), (1, 9)])
def test_attention_weights_of_half_precision_are_added_up_in_float32(dtype, queries, length):
    generator = torch.Generator().manual_seed(3)
    query, keys = (torch.randn(heads, n, 32, generator=generator).to(dtype) for heads, n in ((8, queries), (2, length)))
    wanted = attention_weights(query.float(), keys.float(), 0.2, length - queries)
    found = attention_weights(query.to(DEVICE), keys.to(DEVICE), 0.2, length - queries)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("streaming_llm", {"start_size": 2, "recent_size": 9}),
        ("l2_compress", {"keep_ratio": 0.5, "prune_after": 11, "mode": "every_token"}),
        # which lets sequences of several lengths lose one token after every step
        ("l2_compress", {"keep_ratio": 0.9, "prune_after": 7, "mode": "every_token"}),
        ("fix_size_l2", {"size": 10, "keep_ratio": 0.25, "strategy": "keep_low"}),
        ("fix_size_l2", {"size": 10, "keep_ratio": 0.25, "strategy": "random", "seed": 5}),
    ],
)
def test_policies_of_every_token_decide_together_without_waiting(name, own):
    found = []
    for together in (True, False):
        policy = get_policy(name, **own)
        policy.sequences_apart = together
        limits = Limits(
            max_model_len=96,
            max_num_seqs=8,
            max_num_batched_tokens=56,
            num_blocks=160,
            block_size=4,
            prefix_caching=False,
        )
        runtime = Runtime(_on_cuda(), limits, policy=policy, runner=cuda_runner(sizes=[2, 5, 8]))
        runtime.run([greedy(prompt, 6) for prompt in prompts((21, 33))])
        runtime.compression.after_step = _not_waiting(runtime.compression.after_step)
        requests = runtime.run([greedy(prompt, NEW) for prompt in prompts(LENGTHS)])
        assert runtime.counters.evicted_tokens > 0
        runtime.close()
        assert_nothing_lost(runtime)
        found.append([request.output for request in requests])
        assert [request.reason for request in requests] == ["length"] * len(requests)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["mean_pool", "mlp", "mlp_residual"])
def test_what_is_merged_aside_is_what_is_merged_between_the_steps(name, tmp_path):
    own = {} if name == "mean_pool" else {"weights": written(tmp_path / "w.pth", random_weights(factor=3))}
    wanted, counters = _served(name, {"factor": 3, **own}, stage="sync")
    assert counters.evicted_tokens == sum(2 * (length // 3) for length in LENGTHS)
    assert _served(name, {"factor": 3, **own}, stage="async", num_blocks=20, slow=True)[0] == wanted
    for stage in ("sync", "async"):
        _served(name, {"factor": 3, **own}, stage=stage, watched=True, num_blocks=160)
    # layers with a gap between them
    skipped = {"factor": 3, "skip_layers": (1,), **own}
    _served(name, skipped, stage="async", watched=True, num_blocks=160)


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_merged_layer_by_layer_is_the_same_beside_the_steps_and_on_two_lanes(layers, tmp_path):
    own = {"factor": 3, "weights": written(tmp_path / "w.pth", random_weights(factor=3))}
    how = {"layers_per_step": layers}
    wanted, counters = _served("mlp", own, stage="sync", how=how)
    assert counters.evicted_tokens == sum(2 * (length // 3) for length in LENGTHS)
    at_the_end, _ = _served("mlp", own, stage="sync")
    assert at_the_end != wanted
    # whoever does not wait reads blocks that are not written yet, or writes what is still read
    for num_blocks in (24, 160):
        assert _served("mlp", own, stage="async", how=how, num_blocks=num_blocks, slow=True)[0] == wanted
    assert _served("mlp", own, stage="async", how=how | {"lanes": 2}, slow=True)[0] == wanted
    for stage in ("sync", "async"):
        _served("mlp", own, stage=stage, how=how, watched=True, num_blocks=160)


def test_merged_vectors_are_those_of_the_cpu(tmp_path):
    policy = get_policy("mlp", factor=3, weights=written(tmp_path / "w.pth", random_weights(factor=3)))
    keys, values = torch.randn(2, 3, 2, 40, 16, generator=torch.Generator().manual_seed(1))
    shape = CacheShape(
        model="x", revision=None, layers=3, head_dims=frozenset({16}), device=torch.device("cpu"), dtype=torch.float32
    )
    policy.prepare(shape)
    wanted = policy.merge(keys, values, range(3), ((0, 13),))
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        policy.prepare(replace(shape, device=DEVICE, dtype=dtype))
        found = policy.merge(keys.to(DEVICE, dtype), values.to(DEVICE, dtype), range(3), ((0, 13),))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.float().cpu(), other, atol=tolerance, rtol=tolerance)
