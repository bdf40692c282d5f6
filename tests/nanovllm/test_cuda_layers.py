"""Steps with prompts from captured layers give the logits of steps that are launched as they come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("captured layers need a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from decoders import greedy, wrap  # noqa: E402
from serving import LogitsByRequest, assert_nothing_lost  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from kvsuite.cache_formats.cache_format import CacheFormat  # noqa: E402
from kvsuite.compression import get_policy  # noqa: E402
from kvsuite.nanovllm.cuda_runner import CudaRunner, cuda_runner  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
LENGTHS = (1, 90, 7, 230, 33, 150, 64, 2)
NEW = 12
# bfloat16 keeps 8 bits; four layers of them
BOUND = 2e-2


def _model(kind: str) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 128,
    }  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    of = wrap(model.to(torch.bfloat16))
    return replace(of, model=of.model.to(DEVICE), device=DEVICE, dtype=of.model.dtype)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("kind", "cache", "policy"),
    [("llama", None, None), ("qwen3", None, None), ("qwen3", "int8", None), ("qwen3", None, "snapkv")],
)
def test_logits_are_those_of_steps_launched_as_they_come(
    kind: str, cache: str | None, policy: str | None, overlap: bool
) -> None:
    of = _model(kind)
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 512, (n + NEW,), generator=generator).tolist() for n in LENGTHS]
    limits = Limits(
        max_model_len=256, max_num_seqs=6, max_num_batched_tokens=100, num_blocks=60, block_size=16, prefix_caching=False,
        cache_format=None if cache is None else CacheFormat.parse(cache),
    )  # fmt: skip
    found = []
    for captured in (False, True):
        options: dict[str, Any] = {} if policy is None else {"policy": get_policy(policy, factor=2)}
        runner = cuda_runner(sizes=[2, 6], tune=False, prompts_apart=not captured)
        runtime = Runtime(of, limits, runner=runner, overlap=overlap, **options)
        facts = runtime.runner.facts
        assert facts["prompt_step"] == ("layers captured up to 128 tokens" if captured else "eager"), facts
        ran: list[int] = []
        if captured:
            assert isinstance(runtime.runner, CudaRunner)
            assert facts["prompt_sizes"] == [64, 128]
            layers: Any = runtime.runner.layers
            whole = layers.hidden
            layers.hidden = lambda batch, *given, **named: ran.append(batch.tokens) or whole(batch, *given, **named)  # noqa: B023
        seen = LogitsByRequest(runtime)
        requests = [greedy(tokens[:n], NEW, forced=tokens[n:]) for n, tokens in zip(LENGTHS, texts, strict=True)]
        runtime.run(requests)
        runtime.close()
        assert_nothing_lost(runtime)
        # padded ones of both sizes, and full ones
        assert bool(ran) == captured
        assert not ran or (100 in ran and min(ran) < 64)
        found.append([seen.of(request).double() for request in requests])
    for mine, expected in zip(*reversed(found), strict=True):
        assert torch.isfinite(mine).all()
        assert ((mine - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < BOUND
