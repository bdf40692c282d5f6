from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoders import HEAD_DIM, model
from transformers import LlamaConfig, LlamaForCausalLM

from kvsuite.compression import StreamingLLM
from kvsuite.engines.rotary import Rotary
from kvsuite.errors import CaseInvalid

KINDS = pytest.mark.parametrize("kind", ["llama", "neox"])


def rotary(kind: str, length: int = 512) -> Rotary:
    built = Rotary(model(kind))
    built.table(length)
    return built


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def models_own_keys(kind: str, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys as the model itself rotates them."""
    import importlib

    built = model(kind)
    module = importlib.import_module(type(built).__module__)
    embedding = built.model.rotary_emb if kind == "llama" else built.gpt_neox.rotary_emb
    cos, sin = embedding(keys, positions[None])
    rotated: torch.Tensor = module.apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    return rotated


@KINDS
@settings(max_examples=30)
@given(old=st.integers(0, 500), new=st.integers(0, 500), seed=st.integers(0, 99))
def test_a_rerotated_key_is_a_freshly_rotated_one(kind: str, old: int, new: int, seed: int) -> None:
    turn, keys = rotary(kind), states(1, 2, 1, seed=seed)
    at_old, at_new = (models_own_keys(kind, keys, torch.tensor([p])) for p in (old, new))
    moved = turn.rotate(turn.unrotate(at_old, torch.tensor([old])), torch.tensor([new]))
    torch.testing.assert_close(moved, at_new, rtol=0, atol=1e-5)
    torch.testing.assert_close(turn.unrotate(at_old, torch.tensor([old])), keys, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5, atol=0)


@KINDS
@settings(max_examples=30)
@given(place=st.integers(0, 200), distance=st.integers(0, 200), shift=st.integers(0, 100))
def test_attention_depends_on_the_distance_alone(kind: str, place: int, distance: int, shift: int) -> None:
    turn, key, query = rotary(kind), states(1, 1, 1), states(1, 1, 1, seed=1)

    def product(at: int) -> float:
        rotated = turn.rotate(query, torch.tensor([at + distance])), turn.rotate(key, torch.tensor([at]))
        return float((rotated[0] * rotated[1]).sum())

    assert product(place) == pytest.approx(product(place + shift), abs=2e-5)


@KINDS
def test_norms_are_those_before_the_rotation(kind: str) -> None:
    keys = states(2, 3, 40)
    rotated = models_own_keys(kind, keys, torch.arange(40))
    assert not torch.allclose(rotated, keys, atol=1e-2)
    torch.testing.assert_close(rotated.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5, atol=0)


def test_positions_a_head() -> None:
    turn, keys = rotary("llama"), states(2, 3, 7)
    places = torch.randint(0, 500, (2, 3, 7), generator=torch.Generator().manual_seed(3))
    together = turn.rotate(keys, places)
    for row in range(2):
        for head in range(3):
            alone = turn.rotate(keys[row : row + 1, head : head + 1], places[row, head])
            torch.testing.assert_close(together[row : row + 1, head : head + 1], alone, rtol=0, atol=0)


def test_dtype_stays_and_the_work_is_done_in_float32() -> None:
    turn = rotary("llama")
    keys = states(1, 2, 8).to(torch.bfloat16)
    rotated = turn.rotate(keys, torch.arange(8) + 300)
    assert rotated.dtype == torch.bfloat16
    exact = turn.rotate(keys.float(), torch.arange(8) + 300)
    assert torch.equal(rotated, exact.to(torch.bfloat16))


@KINDS
def test_the_table_grows(kind: str) -> None:
    short, long = rotary(kind, 16), rotary(kind, 3000)
    key = states(1, 1, 1)
    short.table(3000)
    at = torch.tensor([2999])
    assert torch.equal(short.rotate(key, at), long.rotate(key, at))


def test_a_model_without_rotary_positions() -> None:
    with pytest.raises(CaseInvalid, match="--kv-positions=original"):
        Rotary(model("gpt2"))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length(kind: str) -> None:
    with pytest.raises(CaseInvalid, match=f"rope_type '{kind}' changes its frequencies"):
        Rotary(llama_with(kind))


def test_scaled_frequencies_are_followed() -> None:
    """YaRN scales cosines and sines: a rotated key is longer, and rotating back takes the scale off."""
    built = llama_with("yarn")
    turn = Rotary(built)
    turn.table(300)
    key, at = states(1, 1, 1), torch.tensor([200])
    cos, sin = built.model.rotary_emb(key, at[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    own = apply_rotary_pos_emb(key, key, cos, sin)[1]
    scale = built.model.rotary_emb.attention_scaling
    assert scale > 1.05
    torch.testing.assert_close(turn.unrotate(own, at), key, rtol=0, atol=1e-5)
    torch.testing.assert_close(turn.rotate(key, at), own, rtol=0, atol=1e-5)


def test_an_embedding_that_is_no_rotation() -> None:
    built = copy.deepcopy(model("llama"))
    built.model.rotary_emb.inv_freq.data += torch.inf
    with pytest.raises(CaseInvalid, match="not a rotation"):
        Rotary(built)


def llama_with(rope_type: str) -> Any:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 512}
    if rope_type == "yarn":
        rope |= {"original_max_position_embeddings": 512}
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        vocab_size=32,
        max_position_embeddings=2048,
        rope_parameters=rope,
    )
    return LlamaForCausalLM(config).eval()


def test_defect_02_positions_are_a_choice_and_cache_is_the_papers() -> None:
    # the reference comparisons of both are in test_eviction_cache.py
    assert StreamingLLM().positions == "original"
    assert StreamingLLM(positions="cache").to_dict()["positions"] == "cache"
