"""Limits and models that cannot be: refused before anything runs, with the option, the value and the mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import VOCAB, generated, greedy, loaded, text, wrap
from serving import serving
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from kvsuite.errors import CaseInvalid, UserError
from kvsuite.nanovllm.attention_layers import attention_layers
from kvsuite.nanovllm.limits import Limits

TOKEN_BYTES = 2 * 3 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens=8: every one of max_num_seqs=9"),
        ({"num_blocks": 0}, "num_blocks=0: must be a whole number of at least 1: a pool needs a block"),
        ({"pool_bytes": 0}, "pool_bytes=0"),
        ({"memory_share": 1.0}, "memory_share=1.0"),
        ({"num_blocks": 4, "pool_bytes": 4}, "num_blocks and pool_bytes"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"attention_sinks": 4}, "attention_sinks=4: without a window"),
        ({"sliding_window": 4, "attention_sinks": -1}, "attention_sinks=-1"),
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Limits(**limits)


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_a_pool_of_bytes_holds_what_fits_beside_the_scratch_block(blocks: int) -> None:
    block = 4 * TOKEN_BYTES
    with serving(loaded("llama"), block_size=4, pool_bytes=(blocks + 2) * block - 1) as runtime:
        assert runtime.num_blocks == blocks
        assert runtime.pool_bytes == (blocks + 1) * block


def test_a_pool_smaller_than_a_block_is_refused() -> None:
    with (
        pytest.raises(UserError, match="pool_bytes=6143: 6143 bytes do not hold one block of 4 tokens"),
        serving(loaded("llama"), block_size=4, pool_bytes=2 * 4 * TOKEN_BYTES - 1),
    ):
        pass


def test_a_pool_is_never_larger_than_all_sequences_need() -> None:
    with serving(loaded("llama"), memory_share=0.5, max_model_len=50, max_num_seqs=3) as runtime:
        assert runtime.num_blocks == 3 * 4


def test_a_pool_that_the_device_cannot_hold_is_refused() -> None:
    with (
        pytest.raises(UserError, match=r"num_blocks=1000000000000: the pool needs .* GiB"),
        serving(loaded("llama"), num_blocks=10**12),
    ):
        pass


def test_the_smallest_pool_serves() -> None:
    with serving(loaded("llama"), num_blocks=1, block_size=16) as runtime:
        [request] = runtime.run([greedy(text(4), 5)])
        assert request.output_length == 5


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: BloomForCausalLM(BloomConfig(n_head=2, **SMALL)), "0 of 2 layers attend through transformers'"),
        (lambda: MambaForCausalLM(MambaConfig(state_size=4, **SMALL)), "0 of 2 layers attend through"),
        (
            lambda: Gemma2ForCausalLM(
                Gemma2Config(
                    intermediate_size=32,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=16,
                    attn_logit_softcapping=30.0,
                    **SMALL,
                )
            ),
            "attention takes softcap",
        ),
    ],
    ids=["alibi", "state", "softcap"],
)
def test_an_architecture_that_does_not_fit_is_refused_and_left_as_it_was(model: Any, reason: str) -> None:
    of = wrap(model())
    before = of.text_config._attn_implementation
    with pytest.raises(CaseInvalid, match=reason) as refused, serving(of):
        pass
    # no engine measures a model that holds no keys and values
    assert ("--kv-engine=hf" in str(refused.value)) == (not isinstance(of.model, MambaForCausalLM))
    assert of.text_config._attn_implementation == before


def test_kvpress_may_be_imported_between_two_runtimes() -> None:
    """It wraps every attention function that transformers knows then, for good."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention_patch = pytest.importorskip("kvpress.attention_patch")
    of = loaded("llama")
    with serving(of):
        pass
    own = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    try:
        attention_patch.patch_attention_functions()
        for kind in ("llama", "qwen3"):
            with serving(loaded(kind)) as runtime:
                [request] = runtime.run([greedy(text(9), 5)])
            assert request.output == generated(loaded(kind), request.prompt, 5)
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(own)


def test_tokens_that_meet_outside_of_attention_are_noticed() -> None:
    """A convolution over tokens, as hybrid models have one beside attention."""
    of = wrap(type(loaded("llama").model)(loaded("llama").model.config))
    layer = of.model.model.layers[1]
    layer.mlp.register_forward_hook(lambda module, given, out: out + torch.cumsum(given[0], dim=1))
    with pytest.raises(CaseInvalid, match="tokens meet outside of attention"):
        attention_layers(of.model, of.text_config)
