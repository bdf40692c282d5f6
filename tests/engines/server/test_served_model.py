"""Under which names a server may serve a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvsuite.engines.server.endpoint import Endpoint
from kvsuite.engines.server.failure import ServerFailed
from kvsuite.engines.server.served_model import find_model
from kvsuite.models.resolve import resolve_model

GGUF = "/opt/models/SmolLM2-135M-Instruct.Q4_1.gguf"


class Listed(Endpoint):
    """An endpoint with a list of models that no server gave."""

    def __init__(self, *names: str) -> None:
        self.url, self._key, self._names = "http://there", "", names

    def get_json(self, path: str) -> object:
        return {"data": [{"id": name, "aliases": [f"{name}-alias"]} for name in self._names]}


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ("smollm2", GGUF),
        ("smollm2", "smollm2-135m-instruct"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("HF://Qwen/Qwen3-8B", "qwen3-8b"),
        ("dummy:tiny", "dummy-tiny"),
    ],
)
def test_its_names(asked: str, served: str, tmp_path: Path) -> None:
    spec = resolve_model(asked, cache_dir=tmp_path)
    found = find_model(Listed("other", served), spec, None)
    assert (found.id, found.names) == (served, (served, f"{served}-alias"))


@pytest.mark.parametrize("served", ["Qwen/Qwen3-8B-FP8", "Qwen3-80B", "q", ""])
def test_one_that_is_like_it_is_another(served: str, tmp_path: Path) -> None:
    spec = resolve_model("Qwen/Qwen3-8B", cache_dir=tmp_path)
    with pytest.raises(ServerFailed, match="serves another model"):
        find_model(Listed(served), spec, None)


def test_the_name_that_the_user_gives_has_to_be_there(tmp_path: Path) -> None:
    spec = resolve_model("smollm2", cache_dir=tmp_path)
    assert find_model(Listed("a", "b"), spec, "b-alias").id == "b"
    with pytest.raises(
        ServerFailed, match=r"--kv-server-model=c: the server at http://there serves another model: a, b;"
    ):
        find_model(Listed("a", "b"), spec, "c")
