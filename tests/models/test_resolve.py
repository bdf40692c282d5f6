from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvsuite.case import id_token
from kvsuite.errors import UserError
from kvsuite.models import resolve_model


@pytest.mark.parametrize(
    ("request_", "kind", "label", "source"),
    [
        ("dummy:tiny", "dummy", "dummy-tiny", "tiny"),
        ("dummy:llama-3-8b", "dummy", "dummy-Llama-3-8B", "Llama-3-8B"),
        ("DUMMY:QWEN3-0.6B", "dummy", "dummy-Qwen3-0.6B", "Qwen3-0.6B"),
        ("EleutherAI/pythia-2.8b", "hub", "pythia-2.8b", "EleutherAI/pythia-2.8b"),
        ("HF://EleutherAI/pythia-2.8b", "hub", "pythia-2.8b", "EleutherAI/pythia-2.8b"),
        (
            "HF://mlc-ai/Llama-3-8B-Instruct-q4f16_1-MLC",
            "mlc",
            "Llama-3-8B-Instruct-q4f16_1-MLC",
            "mlc-ai/Llama-3-8B-Instruct-q4f16_1-MLC",
        ),
    ],
)
def test_table(request_: str, kind: str, label: str, source: str) -> None:
    spec = resolve_model(request_)
    assert (spec.request, spec.kind, spec.label, spec.source) == (request_, kind, label, source)
    assert spec.is_dummy == (kind == "dummy")
    assert id_token(spec.label) == spec.label


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2-135M", "default"])
def test_default_model_says_what_its_weights_are(name: str, tmp_path: Path) -> None:
    spec = resolve_model(name, cache_dir=tmp_path)
    assert spec.kind == "smollm2"
    assert spec.title == "SmolLM2-135M-Instruct (Q4_1 weights)"
    assert spec.notes == ("Q4_1 weights dequantised; computed in the requested dtype, not an fp16 baseline",)
    assert Path(spec.source).parent == tmp_path
    assert id_token(spec.label) == spec.label
    assert not list(tmp_path.iterdir()), "resolving converts nothing"


def test_only_the_mlc_engine_loads_mlc_weights() -> None:
    assert "only the mlc engine" in resolve_model("HF://mlc-ai/x-MLC").notes[0]
    assert resolve_model("HF://mlc-ai/x").notes == ()


def test_local_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resolve_model(str(tiny_folder))
    assert (spec.kind, spec.label, spec.source) == ("local", "tiny-llama", str(tiny_folder))
    monkeypatch.chdir(tiny_folder.parent)
    for request in ("./tiny-llama", "tiny-llama", "tiny-llama/", f"{tiny_folder}/."):
        assert resolve_model(request).revision == spec.revision
        assert resolve_model(request).label == "tiny-llama"
    monkeypatch.chdir(tiny_folder)
    assert resolve_model(".").label == "tiny-llama"


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name").kind == "local"
    assert resolve_model("HF://org/name").kind == "hub"


def test_mlc_folder(tmp_path: Path) -> None:
    (tmp_path / "mlc-chat-config.json").write_text("{}")
    assert resolve_model(str(tmp_path)).kind == "mlc"


def test_revision_of_local_files_follows_their_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weights = tmp_path / "model.safetensors"
    content = bytearray(3 << 20)

    def revision(changed: int | None = None) -> str | None:
        altered = bytearray(content)
        if changed is not None:
            altered[changed] ^= 1
        weights.write_bytes(altered)
        return resolve_model(str(tmp_path)).revision

    first = revision()
    assert first is not None
    assert first.startswith("sha256:")
    assert revision() == first
    assert revision(0) != first
    assert revision(len(content) - 1) != first
    # documented: the middle of a weight file is not read
    assert revision(len(content) // 2) == first
    weights.write_bytes(content + b"x")
    assert resolve_model(str(tmp_path)).revision != first
    weights.write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)).revision != first


def test_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "some model.Q4_0.gguf"
    path.write_bytes(b"GGUF")
    spec = resolve_model(str(path))
    assert (spec.kind, spec.label, spec.source) == ("gguf", "some_model.Q4_0", str(path))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("dummy:gpt-5", ["dummy:gpt-5", "Llama-3-8B", "Qwen3-32B", "LLaVA-1.5-7B", "tiny"]),
        ("dummy:", ["dummy:", "tiny"]),
        ("gpt2", ["gpt2", "EleutherAI/pythia-2.8b", "smollm2"]),
        ("", ["smollm2"]),
        ("org/na me", ["org/na me"]),
        ("./nowhere", ["./nowhere", "no such file"]),
        ("~/nowhere", ["no such file"]),
        ("/a/b", ["/a/b", "no such file"]),
        ("a/b/c", ["a/b/c", "no such file"]),
        ("x.gguf", ["x.gguf", "no such file"]),
    ],
)
def test_bad_requests(request_: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve_model(request_)
    message = str(caught.value)
    assert message.startswith("--kv-model=")
    assert "\n" not in message
    assert all(word in message for word in words)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"not a \.gguf"):
        resolve_model(str(file))


def test_import_loads_no_torch() -> None:
    code = (
        "import sys; from kvsuite.models import resolve_model; import kvsuite.models.load, kvsuite.workloads.corpus;"
        "resolve_model('dummy:tiny'); assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)


def test_several_models_are_several_runs() -> None:
    with pytest.raises(
        UserError, match="--kv-model=smollm2,dummy:tiny: one model a run; start a run for each"
    ) as caught:
        resolve_model("smollm2,dummy:tiny")
    assert "kvsuite compare" in str(caught.value)
