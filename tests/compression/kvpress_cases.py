"""What the kvpress tests share: a small random Llama, a tokenizer, a cache that counts tokens seen, one way to run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from shared_weights import share
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicLayer

from kvsuite.compression.kvpress.adapter import KvpressMethod

LAYERS, KV_HEADS, VOCAB, PROMPT, STEPS = 4, 2, 512, 512, 8
FULL_BYTES = PROMPT * LAYERS * 2 * KV_HEADS * 16 * 4


class SeenLayer(DynamicLayer):
    """Stores in properties and reports the tokens it has seen, as a serving cache would."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    @property
    def keys(self) -> torch.Tensor | None:
        return self._keys

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._keys = states

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states)

    def stored(self) -> int:
        return 0 if self.keys is None or self.keys.numel() == 0 else int(self.keys.shape[-2])

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query: Any, *args: Any) -> tuple[int, int]:
        # transformers 5.2 passes the cache positions, later versions the query's length
        tokens = query.shape[0] if isinstance(query, torch.Tensor) else query
        return self.stored() + tokens, self.seen - self.stored()


def seen_cache() -> Cache:
    return Cache(layers=[SeenLayer() for _ in range(LAYERS)])


@functools.cache
def model(attention: str = "sdpa") -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(config).eval()
    share(f"kvpress_cases.model({attention!r})", made)
    return made


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=built)


def tokens(batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, PROMPT + STEPS), generator=generator)


def cache_bytes(cache: Cache) -> int:
    states = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in states}.values())


@dataclass
class Outcome:
    """``logits`` ``[steps, batch, vocab]`` of the continuation, and what the cache held before and after it."""

    logits: torch.Tensor
    prefilled: dict[str, Any]
    decoded: dict[str, Any]
    prefilled_bytes: int
    decoded_bytes: int
    info: Any


@torch.no_grad()
def run(
    name: str,
    *,
    keep: float = 0.5,
    attention: str | None = None,
    new_cache: Callable[[], Cache] = DynamicCache,
    ids: torch.Tensor | None = None,
    seed: int = 0,
    **params: Any,
) -> Outcome:
    """Prefill the prompt with a press and feed the continuation one token at a time at explicit positions.

    ``attention`` overrules what the press declares that it needs.
    """
    ids = tokens() if ids is None else ids
    method = KvpressMethod.create(name, keep_ratio=keep, **params)
    implementation = attention or ("eager" if method.attention == "eager" else "sdpa")
    if attention:
        method = replace(method, info=replace(method.info, attention="any"))
    llama, cache = model(implementation), new_cache()
    logits = []
    with method.session(llama, tokenizer=tokenizer(), seed=seed) as session:
        with session.prefill():
            llama(input_ids=ids[:, :PROMPT], past_key_values=cache)
        prefilled, prefilled_bytes = session.measure_effective(cache, PROMPT), cache_bytes(cache)
        position = session.first_decode_position(cache, PROMPT)
        for step in range(STEPS):
            at = torch.full((ids.shape[0], 1), position + step)
            new = ids[:, PROMPT + step : PROMPT + step + 1]
            logits.append(llama(input_ids=new, past_key_values=cache, position_ids=at).logits[:, -1])
        decoded = session.measure_effective(cache, PROMPT + STEPS)
    return Outcome(torch.stack(logits), prefilled, decoded, prefilled_bytes, cache_bytes(cache), method.info)


@functools.cache
def full_logits(attention: str = "sdpa") -> torch.Tensor:
    """The continuation's logits from one forward over everything, ``[steps, batch, vocab]``."""
    return plain_forward(attention)[:, PROMPT:].transpose(0, 1)


@torch.no_grad()
def plain_forward(attention: str = "sdpa") -> torch.Tensor:
    return model(attention)(input_ids=tokens()).logits
