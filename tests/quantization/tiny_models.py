"""Small random models of two families, as the loader would return them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from kvsuite.models.load import LoadedModel
from kvsuite.models.resolve import resolve_model

VOCAB = 160


def llama_config(*, tied: bool) -> LlamaConfig:
    # neither 72 nor 100 is a multiple of a group
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        tie_word_embeddings=tied,
    )


def loaded(model: Any, *, kind: str = "dummy:tiny") -> LoadedModel:
    model = model.eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=None,
        spec=resolve_model(kind),
        text_config=model.config,
        device=torch.device("cpu"),
        dtype=model.dtype,
        weights_bytes=0,
        parameters=sum(p.numel() for p in model.parameters()),
        trained_length=None,
        load_s=0.0,
    )


def tiny_llama(*, tied: bool = False, seed: int = 0) -> LoadedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return loaded(LlamaForCausalLM(llama_config(tied=tied)))


def tiny_neox(seed: int = 0) -> LoadedModel:
    """With biases, and a final layer of its own."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return loaded(model)


def ids(tokens: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(5))
