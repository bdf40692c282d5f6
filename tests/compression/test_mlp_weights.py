"""Checkpoints of the MLP compressor: FastCache's layout, and one line for what is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_weights import random_weights, written

from kvsuite.compression.mlp_weights import MlpWeights, read_weights
from kvsuite.errors import UserError


def state() -> dict[str, Any]:
    return random_weights().state_dict() | {
        f"attention.{layer}.{kind}": torch.zeros(1, 16) if kind == "weight" else torch.zeros(1)
        for layer in range(3)
        for kind in ("weight", "bias")
    }


def assert_same(found: MlpWeights, wanted: MlpWeights) -> None:
    assert (found.layers, found.head_dim, found.factor) == (wanted.layers, wanted.head_dim, wanted.factor)
    assert found.families.keys() == wanted.families.keys()
    for family, linears in wanted.families.items():
        for one, two in zip(found.families[family], linears, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("wrapped", ["bare", "state dict", "compressor", "safetensors"])
def test_layouts_that_the_original_reads(wrapped: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{'safetensors' if wrapped == 'safetensors' else 'pth'}"
    if wrapped == "safetensors":
        from safetensors.torch import save_file

        save_file(state(), path, metadata={"form": "residual"})
    else:
        inner = {"compressor": state()} if wrapped == "compressor" else state()
        torch.save(inner if wrapped == "bare" else {"model_state_dict": inner, "epoch": 3}, path)
    found = read_weights(str(path), "--kv-compressor-path=x")
    assert_same(found, random_weights())
    assert found.form == ("residual" if wrapped == "safetensors" else None)
    assert found.model is None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    wanted = random_weights(form="residual", model="tiny", revision="sha256:1", images=False)
    found = read_weights(written(tmp_path / "w.pth", wanted), "x")
    assert_same(found, wanted)
    assert (found.form, found.model, found.revision) == ("residual", "tiny", "sha256:1")


BROKEN: dict[str, Any] = {
    "a layer is missing": (lambda own: own.pop("compress_tk.1.3.weight"), "compress_tk.1.3.weight is missing"),
    "a family is missing": (
        lambda own: [own.pop(name) for name in list(own) if name.startswith("compress_tv")],
        "the weights compress_tv are missing",
    ),
    "half of the image": (
        lambda own: [own.pop(name) for name in list(own) if name.startswith("compress_iv")],
        "the weights compress_iv are missing",
    ),
    "a foreign name": (lambda own: own.update({"lm_head.weight": torch.zeros(2)}), "lm_head.weight is no weight of it"),
    "a shape": (
        lambda own: own.update({"compress_ik.2.6.bias": torch.zeros(3)}),
        "compress_ik.2.6.bias is [3], where [16] is needed",
    ),
    "no factor": (
        lambda own: own.update({"compress_tk.0.0.weight": torch.zeros(16, 90)}),
        "compress_tk.0.0.weight is [16, 90], where [head_dim, factor * head_dim] is needed",
    ),
    "no width": (
        lambda own: own.update({"compress_tk.0.0.weight": torch.zeros(0, 8)}),
        "compress_tk.0.0.weight is [0, 8], where [head_dim, factor * head_dim] is needed",
    ),
    "8 bits": (
        lambda own: own.update({"compress_tv.0.3.bias": torch.zeros(16).to(torch.float8_e4m3fn)}),
        "compress_tv.0.3.bias is no dense tensor of 16, 32 or 64 bit floats, where [16] is needed",
    ),
    "sparse": (
        lambda own: own.update({"compress_tv.0.3.bias": torch.ones(16).to_sparse()}),
        "compress_tv.0.3.bias is no dense tensor",
    ),
    "no values": (
        lambda own: own.update({"compress_tk.0.0.weight": torch.empty(16, 80, device="meta")}),
        "compress_tk.0.0.weight is no dense tensor",
    ),
    "not finite": (
        lambda own: own.update({"compress_tv.0.3.bias": torch.full((16,), float("nan"))}),
        "compress_tv.0.3.bias holds numbers that are not finite",
    ),
    "nothing": (lambda own: own.clear(), "not the weights of an MLP compressor (there are none)"),
}


@pytest.mark.parametrize(("harm", "message"), BROKEN.values(), ids=BROKEN)
def test_names_and_shapes_are_checked(harm: Any, message: str, tmp_path: Path) -> None:
    own = state()
    harm(own)
    torch.save({"model_state_dict": {"compressor": own}}, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        read_weights(str(tmp_path / "w.pth"), "--kv-compressor-path=w.pth")
    assert str(caught.value).startswith("--kv-compressor-path=w.pth: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_writing_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "w.pth", tmp_path / "link.pth"
    link.symlink_to(path)
    written(link, random_weights(form="residual"))
    assert link.is_symlink()
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="full"):
        random_weights(form="specified").write(path)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [link, path]


class Code:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": state(), "more": Code()}, "w.pth")
    with pytest.raises(UserError, match=r"holds no weights that can be read without running code"):
        read_weights("w.pth", "--kv-compressor-path=w.pth")
    Path("text.pth").write_text("not a checkpoint")
    Path("text.safetensors").write_text("not one either")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(UserError, match=r"holds no weights that can be read"):
            read_weights(name, f"--kv-compressor-path={name}")
    assert not Path("ran").exists()
