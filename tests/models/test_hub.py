from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> tuple[str, float]:
    """Run code in a fresh interpreter, because the hub library reads its environment once; give output and seconds."""
    kept = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"}}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - started


LOAD = """
from kvsuite.errors import UserError
from kvsuite.models import resolve_model
from kvsuite.models.load import load_model
import time, transformers
started = time.perf_counter()
try:
    load_model(resolve_model("EleutherAI/pythia-2.8b"), device="cpu", dtype=None)
except UserError as error:
    print(error)
print(time.perf_counter() - started)
"""


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_answer_is_quick_and_names_the_mend(tmp_path: Path, environment: dict[str, str]) -> None:
    output, _ = run(LOAD, HF_HOME=str(tmp_path), **environment)
    message, seconds = output.splitlines()
    assert message.startswith("--kv-model=EleutherAI/pythia-2.8b: ")
    assert "local folder" in message
    # transformers' own retries take 20 s and more
    assert float(seconds) < 18


def test_silent_host_costs_no_more_than_the_timeout(tmp_path: Path) -> None:
    """A port that accepts and never answers, as behind a filter."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import time; import huggingface_hub; from huggingface_hub import get_session; get_session();"
            "from kvsuite.models.hub import hub_reachable; t = time.perf_counter();"
            "print(hub_reachable(1.0), hub_reachable(1.0), time.perf_counter() - t)"
        )
        output, _ = run(code, HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}", HF_HOME=str(tmp_path))
    first, second, seconds = output.split()
    assert (first, second) == ("False", "False")
    assert float(seconds) < 3


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
    output, _ = run(code, HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
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
    output, _ = run(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert output.split() == [commit, "None", commit, "213568", "1"]
