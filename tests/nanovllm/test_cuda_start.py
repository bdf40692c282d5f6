"""A start on a GPU: kernels are compiled side by side, tilings kept, and nothing is built once a runtime is there."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from decoders import prompts, wrap  # noqa: E402
from serving import assert_nothing_lost  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from kvsuite.kernel_builds import BUILDS  # noqa: E402
from kvsuite.nanovllm import cuda_runner as module  # noqa: E402
from kvsuite.nanovllm import (  # noqa: E402
    fill_kernel,
    fused_kernels,
    fused_sampling,
    gated_linear,
    greedy_tokens,
    row_linear,
    split_attention,
    step_attention,
    whole_rows,
)
from kvsuite.nanovllm.compile_ahead import compiling_ahead  # noqa: E402
from kvsuite.nanovllm.cuda_runner import cuda_runner  # noqa: E402
from kvsuite.nanovllm.flashinfer_libraries import Libraries  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.request import Request  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402
from kvsuite.nanovllm.sampling import SamplingParameters  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
KERNELS = (
    fill_kernel,
    fused_kernels,
    fused_sampling,
    gated_linear,
    greedy_tokens,
    row_linear,
    split_attention,
    step_attention,
    whole_rows,
)


@triton.jit
def _add_kernel(values, ADDED: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(values + at, tl.load(values + at) + ADDED)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """No compiled kernel and no kept tiling to be found; what is built is counted."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path / "kvsuite"))
    # nor one that an earlier test of this process loaded
    for kernel in (one for room in KERNELS for one in vars(room).values()):
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()
    BUILDS.watch_triton()
    return tmp_path


def test_what_is_compiled_ahead_is_not_launched_and_then_found(empty):
    values = torch.zeros(16, device=DEVICE)
    before = len(BUILDS.done)
    with compiling_ahead() as compiles:
        assert compiles
        # twice the same is compiled once
        for added in (1.0, 2.0, 1.0):
            _add_kernel[(1,)](values, ADDED=added)
    assert [build.name for build in BUILDS.done[before:]] == ["_add_kernel", "_add_kernel"]
    assert values.sum().item() == 0
    _add_kernel[(1,)](values, ADDED=2.0)
    assert values.sum().item() == 32
    assert len(BUILDS.done) == before + 2


def _model():
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    return replace(wrap(Qwen3ForCausalLM(config).to(DEVICE, torch.bfloat16)), device=DEVICE)


def _limits():
    return Limits(max_model_len=200, max_num_seqs=8, max_num_batched_tokens=256, num_blocks=120, block_size=16)


def _runtime(of, **options):
    return Runtime(of, _limits(), runner=cuda_runner(sizes=[1, 2, 4, 8], **options))


def _serve(runtime):
    """Prompts one after the other, prompts beside decoding, greedy and drawn."""
    for length in (1, 2, 7, 100, 180):
        runtime.run([Request(prompt, _chosen(0.0)) for prompt in prompts([length])])
    requests = [Request(prompt, _chosen(0.7 * (at % 2))) for at, prompt in enumerate(prompts([3, 60, 17, 1, 90, 5]))]
    for request in requests:
        runtime.add(request)
        runtime.step()
    runtime.run()


def _chosen(temperature):
    return SamplingParameters(max_new_tokens=12, temperature=temperature, ignore_eos=True)


def test_nothing_is_built_once_a_runtime_is_there(empty, monkeypatch):
    monkeypatch.setattr(module, "libraries_for", lambda pools, build: Libraries(missing="fa3"))
    before = len(BUILDS.done)
    runtime = _runtime(_model())
    facts, started = runtime.runner.facts, len(BUILDS.done)
    assert started > before
    assert facts["attention"] == "paged: torch flash, single tokens split"
    assert facts["kernels"] == "not prepared: flashinfer fa3, tilings of products of 16 rows"
    assert set(facts["decode_attention"].values()) == {"split"}
    _serve(runtime)
    decoder = runtime.runner.decoder
    if decoder.gates:
        # as steps of more tokens than these limits allow
        weight = decoder.weights("gate_up")[1]
        gated_linear.gated_linear(weight.new_zeros(700, weight.shape[1]), weight, 16)
    assert [build.name for build in BUILDS.done[started:]] == []
    runtime.close()
    assert_nothing_lost(runtime)


def test_tilings_that_were_tried_are_kept(empty, monkeypatch):
    monkeypatch.setattr(module, "libraries_for", lambda pools, build: Libraries())
    of = _model()
    tried = _runtime(of, build=True)
    products = tried.runner.facts["products"]
    assert tried.runner.facts["kernels"] == "prepared"
    tried.close()
    # a lock lies beside it
    [kept] = (empty / "kvsuite" / "tilings").glob("*.json")
    again = _runtime(of)
    assert again.runner.facts["products"] == products
    assert again.runner.facts["kernels"] == "prepared"
    again.close()
    # a file that somebody cut short is none
    kept.write_text(kept.read_text()[:40])
    without = _runtime(of)
    assert without.runner.facts["kernels"] == "not prepared: tilings of products of 16 rows"
    without.close()
