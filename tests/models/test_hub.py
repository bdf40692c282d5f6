from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter, because the hub library reads its environment once; give its output."""
    kept = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"}}
    local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | local | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def hanging_up() -> Iterator[tuple[str, list[str]]]:
    """A host that takes every connection and says nothing but goodbye: its address, and who came."""
    came: list[str] = []

    def answer(server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, address = server.accept()
                came.append(str(address))
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", came
        server.shutdown(socket.SHUT_RDWR)


LOAD = """
from kvsuite.errors import UserError
from kvsuite.models import resolve_model
from kvsuite.models.load import load_model
for _ in range(2):
    try:
        load_model(resolve_model("EleutherAI/pythia-2.8b"), device="cpu", dtype=None)
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(("environment", "connections"), [({"HF_HUB_OFFLINE": "1"}, 0), ({}, 1)])
def test_offline_answer_asks_once_at_most_and_names_the_mend(
    tmp_path: Path, environment: dict[str, str], connections: int
) -> None:
    with hanging_up() as (address, came):
        output = run(LOAD, HF_HOME=str(tmp_path), HF_ENDPOINT=address, **environment)
    for message in output.splitlines():
        assert message.startswith("--kv-model=EleutherAI/pythia-2.8b: ")
        assert "local folder" in message
    # transformers would ask again and again, and wait in between: 20 s and more
    assert len(came) == connections


def test_a_silent_host_is_given_up_and_asked_once(tmp_path: Path) -> None:
    """A port that accepts and never answers, as behind a filter: what waits for it is ended by this test's limit."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = "from kvsuite.models.hub import hub_reachable; print(hub_reachable(1.0), hub_reachable(1.0))"
        output = run(code, HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}", HF_HOME=str(tmp_path))
        server.settimeout(0)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()
    assert output.split() == ["False", "False"]


def test_answering_endpoint_is_reachable(tmp_path: Path) -> None:
    code = """
import http.server, os, threading
asked = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        asked.append(self.path)
        self.send_response(404)
        self.end_headers()
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from kvsuite.models.hub import hub_reachable
print(hub_reachable(10.0), hub_reachable(10.0), len(asked))
"""
    output = run(code, HF_HOME=str(tmp_path))
    assert output.split() == ["True", "True", "1"]


def test_local_hub_cache_serves_offline(tmp_path: Path, tiny_folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--tiny"
    snapshot = shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """
from kvsuite.models import resolve_model
from kvsuite.models.hub import cached_commit
from kvsuite.models.load import load_model
print(resolve_model("some/tiny").revision, cached_commit("some/other"))
loaded = load_model(resolve_model("HF://some/tiny"), device="cpu", dtype=None)
print(loaded.spec.revision, loaded.parameters, loaded.tokenizer("b").input_ids[0])
"""
    output = run(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert output.split() == [commit, "None", commit, "213568", "1"]
