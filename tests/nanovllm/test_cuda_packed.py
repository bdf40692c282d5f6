"""The runtime over packed pages on a CUDA device, captured and not, against float32 on the CPU over what it stored."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("the runtime on CUDA needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from decoders import greedy, wrap  # noqa: E402
from serving import assert_nothing_lost  # noqa: E402
from stored_reference import StoredReference  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from kvsuite.cache_formats.cache_format import CacheFormat  # noqa: E402
from kvsuite.compression import get_policy  # noqa: E402
from kvsuite.errors import CaseInvalid  # noqa: E402
from kvsuite.nanovllm.cuda_runner import cuda_runner  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
NEW = 8
PROMPTS = (1, 40, 7, 57, 16)
#: a prefix that some prompts share: whole blocks
SHARED = 32
NAMES = ("fp8_e4m3", "int8:int4(group=32)", "int4+hadamard")
# Relative error of logits, and of stored vectors beyond what packing takes. Over the same stored codes nothing is left but
# bfloat16 in the layers and in attention: 6e-3 with either, and with every format, where the CPU's attention serves this model.
BOUND = 2e-2


def _of(device, dtype=torch.bfloat16):
    """A model whose weights bfloat16 holds, which computes in ``dtype``."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128,
    )  # fmt: skip
    model = wrap(Qwen3ForCausalLM(config).to(torch.bfloat16).to(dtype))
    return replace(model, model=model.model.to(device), device=device)


@functools.cache
def _texts():
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 512, (n + NEW,), generator=generator).tolist() for n in PROMPTS]
    # the same first blocks, found in the prefix cache where it is on
    return [texts[3][:SHARED] + text for text in (texts[0], texts[2])] + texts


def _requests():
    return [greedy(text[:-NEW], NEW, forced=text[-NEW:]) for text in _texts()]


def _served(of, name, runner, policy=None, **limits):
    """What every step gave and held, the runtime, and the facts of its runner, which has no graphs once it is closed."""
    small: dict[str, Any] = {
        "max_model_len": 96, "max_num_seqs": 6, "max_num_batched_tokens": 48, "num_blocks": 26, "block_size": 4,
        "admission": "optimistic", "cache_format": CacheFormat.parse(name),
    }  # fmt: skip
    runtime = Runtime(of, Limits(**small | limits), runner=runner, policy=policy)
    seen = StoredReference(runtime)
    # one first, so that others find its prefix
    requests = _requests()
    runtime.run([requests[5]])
    runtime.run([*requests[:5], requests[6]])
    facts = runtime.runner.facts
    runtime.close()
    assert_nothing_lost(runtime)
    return seen, runtime, facts


def _assert_exact(seen, *what):
    logits, stored = seen.errors(_of(CPU, torch.float32))
    print(*what, f"error of logits {logits:.4f}, of stored vectors {stored:.4f}")
    assert logits < BOUND
    assert stored < BOUND


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"graphs": False}, {"graphs": False, "fuse": False}], ids=["captured", "uncaptured", "unfused"]
)
def test_logits_are_those_of_what_is_stored(name, options):
    """Prompts in chunks, found prefixes, preemption, captured steps of padded batches: all over packed pages."""
    seen, runtime, facts = _served(_of(CUDA), name, cuda_runner(sizes=[2, 6], tune=False, **options))
    assert runtime.counters.preemptions > 0
    assert runtime.counters.prefix_hit_tokens >= SHARED
    if options:
        assert facts["decode_step"] == "eager"
    else:
        assert facts["decode_step"] == "cuda_graph", facts
        assert set(facts["decode_attention"].values()) == {f"split {name}"}
    _assert_exact(seen, name, options)


@pytest.mark.parametrize(
    ("policy", "limits"),
    [("streaming_llm", {}), ("", {"sliding_window": 24, "attention_sinks": 4, "num_blocks": 60})],
    ids=["policy", "window"],
)
def test_what_a_policy_or_a_window_leaves_of_packed_pages(policy, limits):
    name, chosen = "int8:int4(group=32)", get_policy(policy, factor=2) if policy else None
    seen, runtime, _ = _served(_of(CUDA), name, cuda_runner(sizes=[2, 6], tune=False), chosen, **limits)
    if policy:
        assert runtime.counters.evicted_tokens > 0
    _assert_exact(seen, name, policy or "window")
    # the same tokens as on the CPU, whose codes may be neighbouring ones
    assert seen.farthest(_served(_of(CPU), name, None, chosen, **limits)[0]) < 0.5


def test_a_value_that_has_no_number_ends_the_run():
    of = _of(CUDA)
    limits = Limits(max_model_len=96, max_num_seqs=2, num_blocks=12, cache_format=CacheFormat.parse("int8"))
    runtime = Runtime(of, limits, runner=cuda_runner(sizes=[2], tune=False))
    try:
        runtime.run([greedy(_texts()[1][:20], 3)])
        weight = of.model.model.layers[2].self_attn.v_proj.weight
        with torch.inference_mode():
            weight[0] = float("inf")
        with pytest.raises(CaseInvalid, match=r"^--kv-cache-dtype=int8: a key or a value is not finite"):
            runtime.run([greedy(_texts()[1][:20], 3)])
    finally:
        runtime.close()
