"""The runtime on a CUDA device, with captured decode steps and overlapping steps, against transformers there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("the runtime on CUDA needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from decoders import fresh, greedy, prompts, text, wrap  # noqa: E402
from serving import LogitsByRequest, assert_nothing_lost  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from kvsuite.nanovllm.cuda_runner import cuda_runner  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.request import Request  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402
from kvsuite.nanovllm.sampling import SamplingParameters  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
MIXED = (1, 40, 7, 16, 33, 3, 57, 15, 17, 21, 64, 2)
SMALL: dict[str, Any] = {
    "max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 24, "num_blocks": 32, "block_size": 4,
    "admission": "optimistic",
}  # fmt: skip
NEW = 24
# bfloat16 keeps 8 bits; four layers of them
BOUND = 2e-2


def _on_cuda(of):
    return replace(of, model=of.model.to(DEVICE), device=DEVICE, dtype=of.model.dtype)


def _generated(of, prompt):
    ids = torch.tensor([list(prompt)], device=DEVICE)
    out = of.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prefill_first", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox", "gpt2", "mistral-window"])
def test_float32_output_equals_generate(kind, prefill_first):
    of = _on_cuda(fresh(kind))
    given = prompts(MIXED)
    expected = [_generated(of, prompt) for prompt in given]
    blocks = 20 if kind == "mistral-window" else 32
    runtime = Runtime(
        of,
        Limits(**SMALL | {"num_blocks": blocks, "prefill_first": prefill_first}),
        runner=cuda_runner(sizes=[2, 5, 8]),
    )
    assert runtime.overlap
    facts = runtime.runner.facts
    assert "reference" in facts["attention"]
    if kind != "mistral-window":
        assert facts["decode_step"] == "cuda_graph", facts
        assert facts["decode_sizes"] == [2, 5, 8]
    assert bool(facts["fused"]) == (kind in ("llama", "qwen3", "mistral-window")), facts
    reason = "attention is the reference: the kernels do not compute in" if facts["fused"] else "layers are not fused"
    assert facts["prompt_step_reason"].startswith(reason), facts
    requests = runtime.run([greedy(prompt, NEW) for prompt in given])
    again = runtime.run([greedy(prompt, NEW) for prompt in given])
    assert runtime.counters.preemptions > 0
    runtime.close()
    assert_nothing_lost(runtime)
    assert [request.output for request in requests] == expected
    assert [request.output for request in again] == expected


def test_sampled_output_is_the_same_with_and_without_overlap():
    of = _on_cuda(fresh("qwen3"))
    found = []
    for overlap in (False, True):
        runtime = Runtime(of, Limits(**SMALL), runner=cuda_runner(sizes=[2, 5, 8]), overlap=overlap)
        requests = [
            Request(prompt, SamplingParameters(max_new_tokens=NEW, temperature=0.8 * (i % 2), seed=i, ignore_eos=True))
            for i, prompt in enumerate(prompts(MIXED))
        ]
        requests[3].forced = text(NEW, seed=77)
        runtime.run(requests)
        runtime.close()
        assert_nothing_lost(runtime)
        found.append([request.output for request in requests])
    assert found[0] == found[1]


def _half(kind):
    shape: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 128,
    }  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    return _on_cuda(wrap(model.to(torch.bfloat16)))


@pytest.mark.parametrize(("kind", "tune"), [("llama", True), ("qwen3", False)])
def test_bfloat16_logits_are_those_of_transformers(kind, tune):
    of = _half(kind)
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 512, (n + NEW,), generator=generator).tolist() for n in MIXED]
    with torch.inference_mode():
        whole = [of.model(torch.tensor([tokens], device=DEVICE), use_cache=False).logits[0].float() for tokens in texts]
    runtime = Runtime(
        of, Limits(**SMALL | {"num_blocks": 12, "block_size": 16}), runner=cuda_runner(sizes=[2, 5, 8], tune=tune)
    )
    facts = runtime.runner.facts
    assert "single tokens split" in facts["attention"]
    assert facts["decode_step"] == "cuda_graph"
    seen = LogitsByRequest(runtime)
    requests = [greedy(tokens[:n], NEW, forced=tokens[n:]) for n, tokens in zip(MIXED, texts, strict=True)]
    runtime.run(requests)
    assert runtime.counters.preemptions > 0
    assert runtime.counters.decode_steps > 0
    runtime.close()
    assert_nothing_lost(runtime)
    for request, logits, length in zip(requests, whole, MIXED, strict=True):
        found, expected = seen.of(request).double(), logits[length - 1 : -1].double()
        assert torch.isfinite(found).all()
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.max() < BOUND, (length, errors.max())


@pytest.mark.parametrize(("window", "sinks"), [(24, 4), (17, 0)])
def test_windowed_decode_steps_are_captured_and_those_of_the_reference(window, sinks):
    of = _half("llama")
    limits = Limits(**SMALL | {"block_size": 16, "sliding_window": window, "attention_sinks": sinks})
    found = []
    for runner in (None, cuda_runner(sizes=[2, 5, 8], tune=False)):
        runtime = Runtime(of, limits, runner=runner)
        if runner is not None:
            assert runtime.runner.facts["decode_step"] == "cuda_graph", runtime.runner.facts
            assert set(runtime.runner.facts["decode_attention"].values()) == {"split"}
        seen = LogitsByRequest(runtime)
        requests = [greedy(prompt, NEW, forced=text(NEW, seed=9)) for prompt in prompts(MIXED)]
        runtime.run(requests)
        assert runtime.counters.decode_steps > 0
        runtime.close()
        assert_nothing_lost(runtime)
        found.append([seen.of(request).double() for request in requests])
    for mine, expected in zip(*reversed(found), strict=True):
        assert torch.isfinite(mine).all()
        assert ((mine - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < BOUND


def test_scored_rows_are_those_of_transformers():
    pytest.importorskip("flashinfer")
    of = _half("llama")
    tokens = torch.randint(3, 512, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = of.model(torch.tensor([tokens], device=DEVICE), use_cache=False).logits[0, -20:].double()
    runtime = Runtime(of, Limits(**SMALL | {"block_size": 16}), runner=cuda_runner(sizes=[2], tune=False))
    rows: list[Any] = []
    runtime.on_rows = lambda found, states: rows.append(runtime.runner.logits(states).double().clone())
    runtime.run([Request(tokens, scored=20)])
    runtime.close()
    found = torch.cat(rows)
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < BOUND


def test_warming_up_changes_no_token_and_touches_the_scratch_block_alone():
    pytest.importorskip("flashinfer")
    of = _half("qwen3")
    found = []
    for warm_up in (False, True):
        runtime = Runtime(
            of, Limits(**SMALL | {"block_size": 16}), runner=cuda_runner(sizes=[2, 5, 8], tune=False, warm_up=warm_up)
        )
        torch.cuda.synchronize()
        for pool in runtime.pools:
            assert not pool.keys[:, 1:].any()
            assert not pool.values[:, 1:].any()
            assert torch.isfinite(pool.values).all()
        assert runtime.runner.captured_bytes > 0
        requests = [
            Request(prompt, SamplingParameters(max_new_tokens=NEW, temperature=0.8 * (i % 2), seed=i, ignore_eos=True))
            for i, prompt in enumerate(prompts(MIXED))
        ]
        runtime.run(requests)
        runtime.close()
        assert_nothing_lost(runtime)
        found.append([request.output for request in requests])
    assert found[0] == found[1]
