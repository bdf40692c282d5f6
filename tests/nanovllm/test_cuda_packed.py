"""The runtime over packed pages on a CUDA device, captured and not, against the exact reference on the CPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("the runtime on CUDA needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")
pytest.importorskip("flashinfer")

from decoders import greedy, wrap  # noqa: E402
from serving import LogitsByRequest, assert_nothing_lost  # noqa: E402
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
# Relative error of logits of a model in bfloat16. Both sides pack by the same rule, but bfloat16 sums in another order put a
# number into the neighbouring code now and then, which is the larger the fewer codes there are.
BOUNDS = {"fp8_e4m3": 5e-2, "int8:int4(group=32)": 8e-2, "int4+hadamard": 1e-1}
EVERY = pytest.mark.parametrize("name", list(BOUNDS))


def _of(device):
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128,
    )  # fmt: skip
    model = wrap(Qwen3ForCausalLM(config).to(torch.bfloat16))
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
    """Logits of every request, and the runtime."""
    small: dict[str, Any] = {
        "max_model_len": 96, "max_num_seqs": 6, "max_num_batched_tokens": 48, "num_blocks": 26, "block_size": 4,
        "admission": "optimistic", "cache_format": CacheFormat.parse(name),
    }  # fmt: skip
    runtime = Runtime(of, Limits(**small | limits), runner=runner, policy=policy)
    seen = LogitsByRequest(runtime)
    # one first, so that others find its prefix
    requests = _requests()
    runtime.run([requests[5]])
    runtime.run([*requests[:5], requests[6]])
    runtime.close()
    assert_nothing_lost(runtime)
    return torch.stack([seen.of(request)[:NEW].cpu().double() for request in requests]), runtime


@functools.cache
def _reference(name, policy=""):
    chosen = get_policy(policy, factor=2) if policy else None
    return _served(_of(CPU), name, None, chosen)[0]


def _error(found, expected):
    assert torch.isfinite(found).all()
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@EVERY
@pytest.mark.parametrize("options", [{}, {"graphs": False, "fuse": False}], ids=["captured", "unfused"])
def test_logits_are_those_of_the_cpu(name, options):
    """Prompts in chunks, found prefixes, preemption, captured steps of padded batches: all over packed pages."""
    found, runtime = _served(_of(CUDA), name, cuda_runner(sizes=[2, 6], tune=False, **options))
    facts, counters = runtime.runner.facts, runtime.counters
    assert counters.preemptions > 0
    assert counters.prefix_hit_tokens >= SHARED
    if options:
        assert facts["decode_step"] == "eager"
    else:
        assert facts["decode_step"] == "cuda_graph", facts
        assert set(facts["decode_attention"].values()) == {f"split {name}"}
    error = _error(found, _reference(name))
    print(f"{name} {options}: error {error:.4f}")
    assert error < BOUNDS[name]


def test_captured_steps_give_what_the_same_kernels_give_uncaptured():
    of, name = _of(CUDA), "int8:int4(group=32)"
    captured, plain = (_served(of, name, cuda_runner(sizes=[2, 6], tune=False, graphs=on))[0] for on in (True, False))
    # a padded batch is cut into other parts
    assert _error(captured, plain) < BOUNDS[name]


@pytest.mark.parametrize("name", ["int8:int4(group=32)"])
def test_a_policy_moves_packed_tokens(name):
    chosen = get_policy("streaming_llm", factor=2)
    found, runtime = _served(_of(CUDA), name, cuda_runner(sizes=[2, 6], tune=False), chosen)
    assert runtime.counters.evicted_tokens > 0
    error = _error(found, _reference(name, "streaming_llm"))
    print(f"{name} streaming_llm: error {error:.4f}")
    assert error < BOUNDS[name]


def test_a_window_over_packed_pages():
    name = "int8:int4(group=32)"
    limits = {"sliding_window": 24, "attention_sinks": 4, "num_blocks": 60}
    found, _ = _served(_of(CUDA), name, cuda_runner(sizes=[2, 6], tune=False), **limits)
    expected, _ = _served(_of(CPU), name, None, **limits)
    assert _error(found, expected) < BOUNDS[name]


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
