"""The library: its version, its layouts, and that its log stays inside."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from llamacpp_sessions import needs_library

from kvsuite.engines.llamacpp.declarations import DECLARATIONS
from kvsuite.engines.llamacpp.engine import LlamacppEngine
from kvsuite.engines.llamacpp.library import INSTALL, PACKAGE, Library, library
from kvsuite.engines.llamacpp.model import Model
from kvsuite.errors import UserError


def test_another_version_is_refused_with_the_line_that_installs_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2026.9.11063")
    reason = LlamacppEngine().unavailable("cpu")
    assert reason is not None
    assert "2026.9.11063 is installed" in reason
    assert reason.endswith(INSTALL)


def test_where_it_is_not_installed_the_reason_is_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert str(LlamacppEngine().unavailable("cpu")).endswith(INSTALL)


def test_it_runs_on_the_cpu_alone() -> None:
    assert str(LlamacppEngine().unavailable("cuda:0")).endswith("use --kv-device=cpu")


def shared_object() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    return next(Path(next(iter(spec.submodule_search_locations or []))).glob("*.so"))


@needs_library
@pytest.mark.parametrize(
    ("declared", "instead", "noticed"),
    [
        ("uint32_t n_ubatch;", "uint64_t n_ubatch;", "llama_context_params"),
        ("float rope_freq_base;", "double rope_freq_base;", "llama_context_params"),
        ("int32_t type_v;", "int64_t type_v;", "llama_context_params"),
        ("    uint32_t n_rs_seq;\n", "", "llama_context_params"),
        ("int32_t lazy_mode;", "float lazy_mode;", "llama_model_params"),
        ("size_t ggml_type_size(int32_t type);", "uint8_t ggml_blck_size_of(int32_t type);", "lacks a function"),
    ],
)
def test_a_wrong_declaration_is_noticed_before_anything_is_computed(declared: str, instead: str, noticed: str) -> None:
    assert declared in DECLARATIONS
    with pytest.raises(UserError, match=noticed) as caught:
        Library(shared_object(), DECLARATIONS.replace(declared, instead))
    assert str(caught.value).startswith("--kv-engine=llamacpp: ")
    assert str(caught.value).endswith(INSTALL)


@needs_library
def test_a_file_that_is_no_model_is_one_line_and_nothing_reaches_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"^--kv-model=broken.gguf: llama.cpp cannot load .*; give another file$"):
        Model(library(), path, "broken.gguf")
    assert capfd.readouterr() == ("", "")
