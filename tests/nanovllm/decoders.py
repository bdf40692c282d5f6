"""Small random decoders as the loader would return them, prompts, and what plain transformers makes of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from shared_weights import share
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvsuite.models.load import LoadedModel
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.sampling import SamplingParameters

VOCAB = 256
WINDOW = 12
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llava() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**_SHAPE), vision_config=vision, image_token_index=VOCAB - 1)
    )


def _neox() -> Any:
    shape = {name: value for name, value in _SHAPE.items() if name not in ("num_key_value_heads", "head_dim")}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    return GPTNeoXForCausalLM(GPTNeoXConfig(rope_parameters=rope, rotary_pct=0.5, **shape))


_MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **_SHAPE)),
    "neox": _neox,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_layer=3, n_embd=64, n_head=4, n_positions=512)),
    "llava": _llava,
    # windows of their own: in every layer, and in every second one
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **_SHAPE)),
    "qwen3-mixed": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            **_SHAPE,
        )
    ),
}
KINDS = tuple(_MAKE)


def fresh(kind: str) -> LoadedModel:
    """A new float32 model: wide weights, so that attention is not flat and a mistake in a cache shows."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return wrap(_MAKE[kind]())


def wrap(model: Any) -> LoadedModel:
    model = model.eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=None,
        spec=resolve_model("dummy:tiny"),
        text_config=model.config.get_text_config(),
        device=torch.device("cpu"),
        dtype=model.dtype,
        weights_bytes=0,
        parameters=0,
        trained_length=None,
        load_s=0.0,
    )


#: what `loaded` gave, and what `transformers.generate` said of it
_SHARED: list[LoadedModel] = []
_GENERATED: dict[tuple[int, tuple[int, ...], int], list[int]] = {}


@functools.cache
def loaded(kind: str) -> LoadedModel:
    """`fresh`, shared by all tests that give it back as it was."""
    made = fresh(kind)
    share(f"decoders.loaded({kind!r})", made.model)
    _SHARED.append(made)
    return made


def text(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them special, and no two equal: equal ones have keys of equal norm in the first layer."""
    found: list[int] = torch.randperm(VOCAB - 4, generator=torch.Generator().manual_seed(seed))[:length].add(3).tolist()
    return found


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    """One random prompt of each length, all different."""
    return [text(length, seed=i) for i, length in enumerate(lengths)]


def fed(of: LoadedModel, token: int, at: int, cache: Any) -> Tensor:
    """Logits behind one more token at position ``at``, which sees all that is stored, in layers of different lengths too."""
    found = of.model(
        input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[at]]),
        attention_mask=torch.zeros(1, 1, 1, 1),
    )  # fmt: skip
    logits: Tensor = found.logits[0, -1]
    return logits


def generated(of: LoadedModel, prompt: Sequence[int], new_tokens: int, **options: Any) -> list[int]:
    """Greedy output of `transformers.generate` for one prompt alone; no end of text unless given.

    Of a shared model, which no test may change, it is computed once: many tests serve the same prompts.
    """
    place = next((at for at, shared in enumerate(_SHARED) if shared is of), None)
    if place is None or options:
        return _generated(of, prompt, new_tokens, **options)
    key = place, tuple(prompt), new_tokens
    if key not in _GENERATED:
        _GENERATED[key] = _generated(of, prompt, new_tokens)
    return list(_GENERATED[key])


def _generated(of: LoadedModel, prompt: Sequence[int], new_tokens: int, **options: Any) -> list[int]:
    ids = torch.tensor([list(prompt)])
    options = {"eos_token_id": None} | options
    out = of.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def forward(of: LoadedModel, tokens: Sequence[int]) -> Tensor:
    """Logits ``[n, vocab]`` of a plain forward pass."""
    with torch.inference_mode():
        logits: Tensor = of.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def greedy(prompt: Sequence[int], new_tokens: int, **more: Any) -> Request:
    """A request that goes on to its last token."""
    return Request(prompt, SamplingParameters(max_new_tokens=new_tokens, ignore_eos=True), **more)
