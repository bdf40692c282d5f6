from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import pre_tokenizers

from kvsuite.errors import UserError
from kvsuite.models import resolve_model
from kvsuite.models.gguf import bpe_tokenizer, read_fields
from kvsuite.models.load import load_model

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def fields(**changes: Any) -> dict[str, Any]:
    tokens = ["<s>", "</s>", *ALPHABET, "12", "123", "1234", "<user>"]
    types = [3, 3] + [1] * (len(tokens) - 3) + [4]
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | changes


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["<s>", "123", "4"]),
    ],
)
def test_numbers_are_cut_as_the_model_family_does(pre: str, pieces: list[str]) -> None:
    tokenizer = bpe_tokenizer(fields(**{"tokenizer.ggml.pre": pre}))
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234").input_ids) == pieces
    text = "It's  1234\r\n\n é🙂"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_bos_follows_the_file() -> None:
    assert bpe_tokenizer(fields()).bos_token == "<s>"
    assert bpe_tokenizer(fields())("a").input_ids[0] != 0
    assert bpe_tokenizer(fields(**{"tokenizer.ggml.add_bos_token": True}))("a").input_ids[0] == 0


def test_special_and_user_defined_tokens_are_single() -> None:
    tokenizer = bpe_tokenizer(fields())
    ids = tokenizer("a</s><user>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "</s>", "<user>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<user>"
    assert tokenizer.model_max_length == 64
    assert tokenizer.pad_token == "</s>"


def test_unknown_pre_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"martian.*smollm.*Hugging Face folder"):
        bpe_tokenizer(fields(**{"tokenizer.ggml.pre": "martian"}))


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for content in (b"", b"no gguf at all, but long enough to be read", b"GGUF\x03\x00\x00\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no GGUF file that can be loaded") as caught:
            load_model(resolve_model(str(path)), device="cpu", dtype=None)
        assert "\n" not in str(caught.value)


def test_small_gguf_loads_dense(tmp_path: Path) -> None:
    """A Llama of one layer, written with the gguf library: values, tokenizer and dtype come out as they went in."""
    import numpy as np
    import torch

    path = tmp_path / "small.gguf"
    random = np.random.default_rng(0)
    vocabulary = fields()["tokenizer.ggml.tokens"]
    shapes = {
        "token_embd": (len(vocabulary), 32),
        "output": (len(vocabulary), 32),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(20_000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types(fields()["tokenizer.ggml.token_type"])
    writer.add_token_merges(fields()["tokenizer.ggml.merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    assert read_fields(path)["tokenizer.ggml.pre"] == "smollm"
    loaded = load_model(resolve_model(str(path)), device="cpu", dtype=None)
    state = loaded.model.state_dict()
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(tensors["blk.0.ffn_up"]))
    assert torch.equal(state["lm_head.weight"], torch.from_numpy(tensors["output"]))
    assert loaded.text_config.rope_parameters["rope_theta"] == 20_000.0
    assert not any(value.is_meta for value in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert getattr(loaded.model.config, "quantization_config", None) is None
    ids = loaded.tokenizer("ab 12", return_tensors="pt").input_ids
    assert torch.isfinite(loaded.model(ids).logits).all()
    assert any("dequantised" in note for note in loaded.notes)
    loaded.model.save_pretrained(tmp_path / "again")
