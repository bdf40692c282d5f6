"""``python -m kvsuite fit-compressor``: weights that the methods read, and one line for what cannot be fitted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.__main__ import USAGE_ERROR, main
from kvsuite.compression.mlp_weights import read_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 3)
    return path


def test_it_writes_weights_of_the_model(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "own.pth"
    words = ["--model", model, "--text", text, "--output", output, "--method", "mlp", "--factor", 3, "--minutes", 0.02]
    words += ["--prompt-tokens", 24, "--answer-tokens", 6]
    assert main(["fit-compressor", *map(str, words)]) == 0
    printed = capsys.readouterr()
    found = read_weights(str(output), "--output")
    assert (found.layers, found.head_dim, found.factor, found.form) == (2, 16, 3, "specified")
    assert found.model == model.name
    assert found.revision is not None
    assert sorted(found.families) == ["tk", "tv"]
    (line,) = printed.out.splitlines()
    assert f"own.pth: mlp at factor 3 for {model.name}, " in line
    assert "mean pooling" in line
    steps = printed.err.splitlines()
    assert any(one.startswith("answering: ") and one.endswith(" s left") for one in steps)
    assert any(one.startswith("layer by layer: ") for one in steps)
    assert any(one.startswith("end to end: ") for one in steps)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "default"], "--text=default: is what the suites measure; give pydoc"),
        (["--text", "default", "--model", "not/there"], "--text=default: is what the suites measure; give pydoc"),
        (["--text", "nosuch.txt", "--model", "not/there"], "--text=nosuch.txt: no such corpus or file"),
        (["--output", "/dev/full"], "--output=/dev/full: is there and no regular file; give another file"),
        (["--text", "nosuch.txt"], "--text=nosuch.txt: no such corpus or file"),
        (["--prompt-tokens", "60"], "was trained for 64 tokens, and prompts with their answers have 68"),
        (["--prompt-tokens", "16", "--factor", "9"], "--prompt-tokens=16: fewer than two groups of --factor=9"),
        (["--minutes", "0"], "--minutes=0: must be more than 0"),
        (["--model", "dummy:tiny"], "--model=dummy:tiny: its weights are random"),
        (["--output", "no/such/folder.pth"], "--output=no/such/folder.pth: cannot be written"),
        (["--prompt-tokens", "200", "--answer-tokens", "2"], "was trained for 64 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_one_line_and_leaves_no_file(
    words: list[str], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    usual = {"--model": str(model), "--prompt-tokens": "24", "--answer-tokens": "8"} | dict(
        zip(words[::2], words[1::2], strict=True)
    )
    assert main(["fit-compressor", *(word for pair in usual.items() for word in pair)]) == USAGE_ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_file_that_is_not_there_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.pth").symlink_to("weights.pth")
    assert main(["fit-compressor", "--model", str(model), "--text", "default", "--output", "link.pth"]) == USAGE_ERROR
    assert "--text=default" in capsys.readouterr().err
    assert Path("link.pth").is_symlink()
    assert not Path("weights.pth").exists()


def test_a_full_disk_is_one_line(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    words = ["--model", model, "--text", text, "--output", tmp_path / "own.pth", "--minutes", 0.001]
    words += ["--prompt-tokens", 24, "--answer-tokens", 6]
    assert main(["fit-compressor", *map(str, words)]) == USAGE_ERROR
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("own.pth: cannot be written (No space left on device); give another file")
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_short_to_hold_any_of_it_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("A few words. " * 20)
    words = ["--model", model, "--text", tmp_path / "short.txt", "--prompt-tokens", 32, "--answer-tokens", 4]
    assert main(["fit-compressor", *map(str, words)]) == USAGE_ERROR
    assert "has 260 tokens, 8 prompts of 32; give a longer text or shorter prompts" in capsys.readouterr().err
