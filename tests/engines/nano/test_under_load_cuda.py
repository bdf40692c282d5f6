"""Requests under load on a CUDA device: overlapped and captured steps give the tokens and losses that eager ones alone give."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from kvsuite.engines.nano.under_load import serve_under_load  # noqa: E402
from kvsuite.engines.results import ServeRequest  # noqa: E402
from kvsuite.meters.served_divergence import kl_divergences  # noqa: E402
from kvsuite.models.load import LoadedModel  # noqa: E402
from kvsuite.models.resolve import resolve_model  # noqa: E402
from kvsuite.nanovllm.cuda_runner import cuda_runner  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.request import Request  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(config)
    made = made.to("cuda", torch.bfloat16).eval().requires_grad_(False)
    return LoadedModel(
        model=made, tokenizer=None, spec=resolve_model("dummy:tiny"), text_config=made.config,
        device=torch.device("cuda", 0), dtype=torch.bfloat16, weights_bytes=0, parameters=0, trained_length=None,
        load_s=0.0,
    )  # fmt: skip


def runtime(of: LoadedModel, blocks: int, *, graphs: bool) -> Runtime:
    limits = Limits(
        max_model_len=256, max_num_seqs=8, max_num_batched_tokens=512, num_blocks=blocks, admission="optimistic"
    )
    return Runtime(of, limits, runner=cuda_runner(rotation=None, graphs=graphs, tune=False), eos_token_ids=())


def requests(**more: Any) -> list[ServeRequest]:
    generator = torch.Generator().manual_seed(3)
    return [
        ServeRequest(torch.randint(0, 512, (60 + 9 * index,), generator=generator).tolist(), 40, 0.01 * index, **more)
        for index in range(8)
    ]


def test_overlapped_steps_under_preemption_score_what_is_forced(model: LoadedModel) -> None:
    large = runtime(model, 256, graphs=False)
    dense = serve_under_load(large, requests(rows=512))
    large.close()
    small = runtime(model, 24, graphs=True)
    assert small.overlap
    rows = [one.scores.rows for one in dense.requests if one.scores is not None]
    forced = [
        replace(one, forced=output, rows=kept.ids)
        for one, output, kept in zip(requests(), dense.outputs, rows, strict=True)
        if kept is not None
    ]
    step, calls = small.step, itertools.count(1)

    def preempting() -> list[Request]:
        ended = step()
        if next(calls) in (8, 20, 30):
            small.scheduler.preempt_for(Request([1]))
        return ended

    small.step = preempting  # type: ignore[method-assign]
    served = serve_under_load(small, forced)
    small.close()
    assert served.counts["preemptions"] > 0
    assert served.outputs == dense.outputs
    divergences = []
    for ours, theirs in zip(served.requests, dense.requests, strict=True):
        assert ours.scores is not None
        assert theirs.scores is not None
        assert ours.scores.rows is not None
        assert theirs.scores.rows is not None
        divergences += kl_divergences(theirs.scores.rows, ours.scores.rows)
        # a wrong position would be off by nats
        assert ours.scores.nll == pytest.approx(theirs.scores.nll, abs=0.3)
        assert ours.token_s == sorted(ours.token_s)
        assert ours.arrival_s <= ours.admitted_s <= ours.token_s[0]
    print(f"KL of equal caches in bfloat16: mean {sum(divergences) / len(divergences):.2e}, max {max(divergences):.2e}")
    assert sum(divergences) / len(divergences) < 0.01
    fed = sum(step.prompt_tokens + step.decode_tokens for step in served.steps)
    assert fed == served.counts["computed_prefill_tokens"] + served.counts["computed_decode_tokens"]
