"""Policies on models whose layers differ: right, against a masked forward pass of the model itself, or refused."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.workloads.windows import Window, plan_windows

SINK, RECENT, LENGTH, PROMPT, NEW = 2, 8, 40, 24, 6
BASE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEAD = {"head_dim": 16}
MLA = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
GPT = {
    "vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * 2
#: configuration, and the layers on which a policy acts
MODELS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "llama": ("Llama", BASE, [0, 1, 2, 3]),
    "window longer than the text": ("Mistral", BASE | {"sliding_window": 400}, [0, 1, 2, 3]),
    "windows among full layers": ("Qwen2", BASE | {
        "use_sliding_window": True, "sliding_window": 12, "layer_types": MIXED}, [1, 3]),
    "gemma 2, eager": ("Gemma2", BASE | HEAD | {"sliding_window": 12, "query_pre_attn_scalar": 16}, [1, 3]),
    "gemma 3": ("Gemma3Text", BASE | HEAD | {
        "sliding_window": 12, "query_pre_attn_scalar": 16, "layer_types": MIXED}, [1, 3]),
    "cohere 2": ("Cohere2", BASE | {"sliding_window": 12, "layer_types": MIXED}, [1, 3]),
    "no rotary in some": ("SmolLM3", BASE | {"no_rope_layers": [1, 0, 1, 0]}, [0, 1, 2, 3]),
    "chunks": ("Llama4Text", BASE | HEAD | {
        "attention_chunk_size": 12, "intermediate_size_mlp": 64, "num_local_experts": 2, "moe_layers": []}, [3]),
    "latents": ("DeepseekV3", BASE | MLA, [0, 1, 2, 3]),
    "learned positions": ("GPT2", GPT, [0, 1, 2]),
    "a part of a key is rotated": ("Phi", BASE | {"partial_rotary_factor": 0.5}, [0, 1, 2, 3]),
    "gpt-j, eager": ("GPTJ", GPT | {"rotary_dim": 8}, [0, 1, 2]),
    "convolutions": ("Lfm2", BASE | {
        "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16, "block_auto_adjust_ff_dim": False,
    }, [1, 3]),
}  # fmt: skip


@functools.cache
def folder(kind: str, fields: tuple[tuple[str, Any], ...]) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{name: _thaw(value) for name, value in fields})
    made = transformers.AutoModelForCausalLM.from_config(config)
    path = Path(tempfile.mkdtemp())
    made.save_pretrained(path)
    return path


def _thaw(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def saved(kind: str, config: Mapping[str, Any]) -> Path:
    return folder(kind, tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(config.items())))


def case(path: Path, policy: str | None, **parameters: Any) -> Case:
    return Case(
        suite="compression", engine="hf", model=str(path), name=policy or "baseline", device="cpu", dtype="float32",
        policy=policy, policy_params=parameters,
        workload={"prompt_tokens": PROMPT, "max_new_tokens": NEW, "max_tokens": LENGTH},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def session(path: Path, policy: str | None, **parameters: Any) -> HfSession:
    chosen = case(path, policy, **parameters)
    made = HfSession(chosen, EngineSettings(threads=1))
    made.prepare(chosen)
    return made


TEXT = torch.randint(3, 96, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


def masked_losses(path: Path, treated: list[int]) -> torch.Tensor:
    """Losses of one forward pass in which treated layers see sinks and the last tokens alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    query, key = torch.arange(LENGTH - 1)[:, None], torch.arange(LENGTH - 1)[None]
    sees = (key <= query) & ((key < SINK) | (key >= query - RECENT))
    mask = torch.zeros(1, 1, LENGTH - 1, LENGTH - 1).masked_fill(~sees, torch.finfo(torch.float32).min)

    def hide(module: Any, arguments: Any, named: dict[str, Any]) -> Any:
        assert "attention_mask" in named
        return arguments, named | {"attention_mask": mask}

    for module in model.modules():
        if getattr(module, "layer_idx", None) in treated and type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(hide, with_kwargs=True)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([TEXT[:-1]]), use_cache=False).logits[0].double()
    return -logits.log_softmax(-1).gather(-1, torch.tensor(TEXT[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_acts_on_the_layers_that_hold_the_whole_text_and_is_right_there(name: str) -> None:
    kind, config, treated = MODELS[name]
    path = saved(kind, config)
    on = session(path, "streaming_llm", start_size=SINK, recent_size=RECENT)
    if len(treated) < on.decoder.layers:
        assert on.effective["policy_layers"] == treated
    assert on.score(TEXT, "streaming-decode", 0).nll == pytest.approx(masked_losses(path, treated).tolist(), abs=2e-4)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "auto") for name in ("llama", "gemma 2, eager", "gemma 3", "gpt-j, eager", "learned positions")]
    + [("llama", "eager")],
)
def test_skipped_layers_keep_all_whatever_the_attention(name: str, attention: str) -> None:
    kind, config, treated = MODELS[name]
    path = saved(kind, config)
    chosen = case(path, "streaming_llm", start_size=SINK, recent_size=RECENT, skip_layers=[1])
    on = HfSession(chosen, EngineSettings(threads=1, attention=attention))
    on.prepare(chosen)
    expected = masked_losses(path, sorted({*treated} - {1})).tolist()
    assert on.score(TEXT, "streaming-decode", 0).nll == pytest.approx(expected, abs=2e-4)


def test_eager_attention_that_is_wrong_is_refused() -> None:
    path = saved("Falcon", {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True,
        "multi_query": False, "new_decoder_architecture": False,
    })  # fmt: skip
    with pytest.raises(UserError, match="eager attention of Falcon adds the ALiBi biases twice; use auto or sdpa"):
        HfSession(case(path, None), EngineSettings(threads=1, attention="eager"))
    assert session(path, None).effective["attention"] == "sdpa"


@pytest.mark.parametrize("policy", [None, "streaming_llm"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_that_are_stored(name: str, policy: str | None) -> None:
    kind, config, _ = MODELS[name]
    parameters = {} if policy is None else {"start_size": SINK, "recent_size": RECENT}
    on = session(saved(kind, config), policy, **parameters)
    found = on.memory([ServeRequest(TEXT[:PROMPT], NEW)])
    # whole storages are counted: a view that keeps a prompt alive would show
    assert found.kv_bytes_decode == on.planned_kv_bytes(PROMPT, NEW)
    assert not [text for text in found.warnings if "kept alive" in text]
    if policy is None:
        assert found.kv_bytes_decode == on.full_kv_bytes(PROMPT + NEW - 1)
    # rounds begin anew
    first, again = (on.serve([ServeRequest(TEXT[:PROMPT], NEW)]).outputs for _ in range(2))
    assert first == again


def test_layers_without_rotations_store_keys_as_they_are_under_cache_positions() -> None:
    kind, config, _ = MODELS["no rotary in some"]
    path = saved(kind, config)
    on = session(path, "streaming_llm", start_size=SINK, recent_size=RECENT, positions="cache")
    with torch.inference_mode():
        cache = on._generation.new_cache(1, LENGTH)
        seen: dict[int, list[torch.Tensor]] = {}

        def note(module: Any, arguments: Any, output: Any) -> None:
            seen.setdefault(module.kept_index, []).append(output)

        for module in on.decoder.model.modules():
            if hasattr(module, "k_proj"):
                module.k_proj.kept_index = module.layer_idx
                module.k_proj.register_forward_hook(note)
        for token in TEXT[:6]:
            on.decoder.forward(torch.tensor([[token]]), cache)
    for index in range(4):
        plain = torch.cat(seen[index], dim=1).view(1, 6, 2, 16).transpose(1, 2)
        assert torch.allclose(cache.layers[index].keys, plain, atol=1e-5)
    rotates = [layer.rotates for layer in cache.layers]
    assert rotates == [True, False, True, False]


ALIBI = {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}
REFUSED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str]] = {
    "windows alone": (
        "Mistral", BASE | {"sliding_window": 12}, "streaming_llm", {"start_size": 2, "recent_size": 4},
        "no layer to act on: all layers .sliding_attention of 12. of the model see less than the 39 tokens",
    ),
    "alibi": ("Bloom", ALIBI, "streaming_llm", {"start_size": 2, "recent_size": 4}, "ALiBi"),
    "norms of latents": ("DeepseekV3", BASE | MLA, "fix_size_l2", {"size": 12}, "stores latents"),
    "learned positions are not moved": (
        "GPT2", GPT, "streaming_llm", {"start_size": 2, "recent_size": 4, "positions": "cache"}, "use --kv-positions=original",
    ),
    "queries that nobody sees": ("GPTJ", GPT | {"rotary_dim": 8}, "snapkv", {}, "looks at queries"),
    "a press and windows": (
        "Gemma3Text", BASE | HEAD | {"sliding_window": 12, "layer_types": MIXED}, "kvpress:SnapKV", {"keep_ratio": 0.5},
        "a press works on layers that hold the whole text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_with_the_reason(name: str) -> None:
    kind, config, policy, parameters, reason = REFUSED[name]
    path = saved(kind, config)
    if policy.startswith("kvpress:"):
        pytest.importorskip("kvpress")
    with pytest.raises(CaseInvalid, match=reason) as caught:
        session(path, policy, **parameters)
    # no other engine is named that could do no better
    assert "--kv-engine" not in str(caught.value)


def test_a_text_that_outgrows_a_window_under_a_policy_is_refused_and_not_measured_otherwise() -> None:
    path = saved("Mistral", BASE | {"sliding_window": 48})
    on = session(path, "streaming_llm", start_size=SINK, recent_size=RECENT)
    with pytest.raises(CaseInvalid, match="outgrows the model's own window of 48"):
        on.score(TEXT + TEXT, "streaming-decode", 0)


@pytest.mark.parametrize("engine_call", ["prepare", "score", "serve", "windows"])
def test_learned_positions_that_run_out_are_told_before_anything_is_computed(engine_call: str) -> None:
    path = saved("GPT2", GPT)
    on = session(path, None)
    ids = TEXT + TEXT
    chosen = replace(case(path, None), workload={"prompt_tokens": 64, "max_new_tokens": 2})
    windows = plan_windows("hf-strided", len(ids), 70, 35, prefix="none")
    calls: dict[str, Callable[[], Any]] = {
        "prepare": lambda: on.prepare(chosen),
        "score": lambda: on.score(ids, "streaming-decode", 0),
        "serve": lambda: on.serve([ServeRequest(ids[:60], 6)]),
        "windows": lambda: on.score_windows(ids, windows, prefix="none", prefix_token=None),
    }
    with pytest.raises(CaseInvalid, match="64 positions that the model has learned"):
        calls[engine_call]()


def test_what_is_computed_past_the_switch_of_the_frequencies_is_said() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    path = saved("Llama", BASE | {"max_position_embeddings": 32})
    on = session(path, None)
    assert on.decoder.of_layers.switch_length is None
    on.close()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(BASE | {"rope_parameters": rope, "max_position_embeddings": 32}))
    with tempfile.TemporaryDirectory() as made:
        transformers.LlamaForCausalLM(config).save_pretrained(made)
        on = session(Path(made), None)
        short = on.score(TEXT[:28], "streaming-decode", 0).nll
        assert "rotary_frequencies" not in on.effective
        assert not on.memory([ServeRequest(TEXT[:20], NEW)]).warnings
        between = on.score_windows(TEXT[:36], [_window(0, 36)], prefix="none", prefix_token=None).tokens.nll
        on.score(TEXT, "streaming-decode", 0)
        assert "change at 32 tokens" in on.effective["rotary_frequencies"]
        assert "change at 32 tokens" in on.memory([ServeRequest(TEXT[:30], NEW)]).warnings[-1]
        # what went before changes nothing: neither a shorter text nor one that passes the switch by less
        assert on.score(TEXT[:28], "streaming-decode", 0).nll == short
        again = on.score_windows(TEXT[:36], [_window(0, 36)], prefix="none", prefix_token=None).tokens.nll
        assert again == between


def _window(begin: int, end: int) -> Window:
    [window] = plan_windows("hf-strided", end - begin, end - begin, end - begin, prefix="none")
    return window
