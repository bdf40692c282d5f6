"""Models as strangers have them, and what is right for each.

Where each comes from: QwenLM/Qwen#401, ggml-org/llama.cpp#24875, vllm-project/vllm#27431, huggingface/transformers#25104 and
#10815, ikawrakow/ik_llama.cpp#285, keras-team/keras-hub#2861.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from strangers import BASE, IDS, SMALL, WINDOWS, measured, save
from tiny_checkpoint import byte_tokenizer

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.nano.session import NanoSession
from kvsuite.models.load import load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters


@pytest.mark.parametrize("kind", ["default", "dynamic", "longrope"])
def test_requests_that_are_served_together_get_what_each_gets_alone(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4}
    if kind != "default":
        rope["factor"] = 4.0
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}
    longest = 32 if kind == "dynamic" else 512
    config = BASE | {"head_dim": 16, "rope_parameters": rope, "max_position_embeddings": longest}
    loaded = load_model(resolve_model(str(save(tmp_path, "Llama", **config))), device="cpu", dtype=None)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (5, 12, 90)]

    def alone(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        found = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return found[0, len(prompt) :].tolist()

    expected = [alone(prompt) for prompt in prompts]
    runtime = Runtime(loaded, Limits(max_model_len=128, max_num_seqs=3, max_num_batched_tokens=512, num_blocks=64))
    served = runtime.run([Request(p, SamplingParameters(max_new_tokens=12, ignore_eos=True)) for p in prompts])
    runtime.close()
    assert [request.output for request in served] == expected


@pytest.mark.parametrize("engine", ["hf", "nano"])
def test_a_model_without_positions_does_not_care_where_its_keys_are_placed(engine: str, tmp_path: Path) -> None:
    folder = save(tmp_path, "SmolLM3", **BASE, no_rope_layers=[0, 0, 0, 0])
    found = []
    for positions in ("original", "cache"):
        case = Case(
            suite="compression", engine=engine, model=str(folder), name="streaming_32", device="cpu", dtype="float32",
            policy="streaming_llm", policy_params={"start_size": 4, "recent_size": 28, "positions": positions},
            workload={"prompt_tokens": 16, "max_new_tokens": 4},
        )  # fmt: skip
        session = {"hf": HfSession, "nano": NanoSession}[engine](case, EngineSettings(threads=1))
        session.prepare(case)
        nll = session.score(IDS, "streaming-decode", 0).nll
        found.append(math.exp(sum(nll) / len(nll)))
        session.close()
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("suite", "name", "options"), [("compression", "baseline", SMALL), ("perplexity", "none", WINDOWS)]
)
def test_losses_that_are_not_finite_are_told_in_every_suite(
    suite: str, name: str, options: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE))
    model.model.layers[1].mlp.down_proj.weight.data.mul_(3e5)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    record = measured(tmp_path, suite, name, dtype="float16", **options)
    assert record.status == "invalid", record.error
    assert "not finite" in str(record.reason)
    assert "--kv-dtype" in str(record.reason)


@pytest.mark.parametrize("engine", ["hf", "nano"])
def test_a_text_past_the_learned_positions_is_refused(engine: str, tmp_path: Path) -> None:
    config = {"vocab_size": 258, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 48}
    folder = save(tmp_path, "GPT2", **config, bos_token_id=256, eos_token_id=257)
    record = measured(
        folder, "compression", "baseline", engine, max_tokens="65", prompt_tokens="32", max_new_tokens="4"
    )
    assert record.status == "invalid", record.error


@pytest.mark.parametrize("engine", ["hf", "nano"])
def test_a_tokenizer_that_is_larger_than_the_embedding_is_named(engine: str, tmp_path: Path) -> None:
    folder = save(tmp_path, "Llama", **(BASE | {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}))
    record = measured(folder, "compression", "baseline", engine, **SMALL)
    assert record.status == "invalid", record.error
    assert "tokenizer" in str(record.reason)


def test_alibi_under_a_policy_is_refused(tmp_path: Path) -> None:
    folder = save(
        tmp_path, "Falcon", vocab_size=258, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, alibi=True,
        multi_query=False, new_decoder_architecture=False, initializer_range=0.1, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    assert measured(folder, "compression", "baseline", **SMALL).status == "ok"
    record = measured(folder, "compression", "streaming_32", **SMALL)
    assert record.status == "invalid", record.error


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Gemma2", BASE | {"head_dim": 16}),
        ("GptOss", BASE | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("GPTJ", {"vocab_size": 258, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    ],
)
def test_a_model_without_sdpa_is_loaded(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path, kind, **config)
    assert load_model(resolve_model(str(folder)), device="cpu", dtype=None).model is not None


_SLIDING = {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}


@pytest.mark.parametrize(
    ("kind", "config", "suite", "name", "options", "engine"),
    [
        ("Mistral", {"sliding_window": 400}, "compression", "baseline", SMALL, "hf"),
        ("Gemma3", _SLIDING, "perplexity", "none", WINDOWS, "hf"),
        ("Gemma3", _SLIDING, "perplexity", "none", WINDOWS, "nano"),
        ("Gemma3", _SLIDING, "compression", "baseline", SMALL, "nano"),
    ],
)
def test_a_window_of_its_own_refuses_nothing_that_it_does_not_touch(
    kind: str, config: dict[str, Any], suite: str, name: str, options: dict[str, str], engine: str, tmp_path: Path
) -> None:
    record = measured(save(tmp_path, kind, **(BASE | config)), suite, name, engine, **options)
    assert record.status == "ok", record.reason
