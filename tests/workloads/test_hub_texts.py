from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvsuite.errors import UserError
from kvsuite.workloads.corpus import NAMES, check_corpus, load_corpus
from kvsuite.workloads.hub_texts import HUB

ROOT = Path(__file__).parents[2]
ROWS = ["short", "a text that is long enough", "x" * 100, "y" * 200]
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
PRELUDE = """
import json
from kvsuite.errors import UserError
from kvsuite.workloads.corpus import load_corpus

def show(name, **settings):
    try:
        c = load_corpus(name, num_texts=settings.pop("count", 1), **settings)
    except UserError as error:
        print(json.dumps(str(error)))
    else:
        print(json.dumps([c.texts, c.revision, c.notes, c.text_hash, c.source, c.join_rule]))

"""


def run(code: str, home: Path, **environment: str) -> list[list[object] | str]:
    """Run code in a fresh interpreter with a hub cache of its own, offline unless told; return what it shows."""
    environment = {"HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], cwd=ROOT, env={**os.environ, "HF_HOME": str(home), **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_offline_answer_asks_nobody_and_names_the_mend(
    tmp_path: Path, hub: tuple[str, list[str], dict[str, bytes]]
) -> None:
    address, asked, _ = hub
    shown = run(f"for name in {tuple(HUB)}: show(name, option='--kv-dataset')", tmp_path, HF_ENDPOINT=address)
    assert asked == []
    for name, message in zip(HUB, shown, strict=True):
        assert isinstance(message, str)
        assert message.startswith(f"--kv-dataset={name}: offline mode is set (HF_HUB_OFFLINE) and {HUB[name].repo_id}")
        assert ".parquet" in message


def jsonl_gz(rows: Sequence[str]) -> bytes:
    return gzip.compress("".join(json.dumps({"text": row, "url": "u"}) + "\n" for row in rows).encode())


def hub_dataset(home: Path, repo: str, files: Mapping[str, list[str]]) -> None:
    """Lay out a hub cache as huggingface_hub does after a download."""
    import pyarrow as pa
    from pyarrow import parquet

    repository = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, rows in files.items():
        path = repository / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            parquet.write_table(pa.table({"text": rows}), path)
        else:
            path.write_bytes(jsonl_gz(rows))


def test_named_corpora_come_out_of_the_local_hub_cache(tmp_path: Path) -> None:
    wiki = ["", " = A = \n", " words \n"]
    names = [
        f"wikitext-{size}-raw-v1/{split}-00000-of-00001.parquet" for size in (2, 103) for split in ("test", "train")
    ]
    hub_dataset(tmp_path, "Salesforce/wikitext", dict.fromkeys(names, wiki))
    hub_dataset(tmp_path, "emozilla/pg19", {"data/test-00000-of-00001-29a571947c0b5ccc.parquet": ROWS})
    code = """
show("wikitext2")
show("wikitext103", split="test")
show("wikitext103", split="train")
show("wikitext2", drop_blank=True)
show("pg19", count=2, min_chars=50)
"""
    first, second, train, dropped, books = run(code, tmp_path)
    assert first[0] == ["\n\n = A = \n\n\n words \n"]
    assert first[1:3] == [COMMIT, []]
    assert first[5] == r"all rows, blank ones too, joined by \n\n"
    assert second[3] == first[3], "equal text, equal hash"
    assert "same text" in second[2][0]
    assert train[2] == [], "the train splits differ"
    assert dropped[0] == [" = A = \n\n\n words \n"]
    assert dropped[5] == r"non-blank rows joined by \n\n"
    assert books[0] == ROWS[2:]
    assert books[4] == "emozilla/pg19:test"


def test_split_that_the_local_hub_cache_lacks(tmp_path: Path) -> None:
    hub_dataset(tmp_path, "emozilla/pg19", {"data/test-00000-of-00001.parquet": ROWS})
    hub_dataset(tmp_path, "allenai/c4", {"en/c4-validation.00000-of-00008.json.gz": ROWS})
    for message in run("for name in ('pg19', 'c4'): show(name, split='train')", tmp_path):
        assert isinstance(message, str)
        assert "the local hub cache has no train split" in message


def test_c4_is_a_sample_of_its_first_shard(tmp_path: Path) -> None:
    documents = [f"document {i}\nof\r\nlines" for i in range(1200)]
    files = {"en/c4-validation.00000-of-00008.json.gz": documents, "en/c4-train.00000-of-01024.json.gz": documents[50:]}
    hub_dataset(tmp_path, "allenai/c4", files)
    validation, train = run("show('c4'); show('c4', split='train')", tmp_path)
    texts = [document.replace("\r\n", "\n") for document in documents]
    assert validation[0] == [" ".join(texts[:1100])]
    assert train[0] == [" ".join(texts[50:1150])]
    assert validation[1] == COMMIT
    assert validation[4] == "allenai/c4:validation (en/c4-validation.00000-of-00008.json.gz alone)"
    rule = "sample: the first 1,100 documents, joined by single spaces, as GPTQ's evaluation does"
    assert validation[5] == train[5] == rule


@pytest.mark.parametrize("ask", [load_corpus, check_corpus])
def test_splits_that_a_data_set_has(ask: object) -> None:
    more = {"num_texts": 1} if ask is load_corpus else {}
    assert callable(ask)
    with pytest.raises(UserError) as caught:
        ask("c4", split="test", option="--kv-dataset", **more)
    assert str(caught.value) == (
        "--kv-dataset=c4: no split 'test'; c4 has validation, train, for example --kv-split=validation"
    )
    with pytest.raises(
        UserError, match=r"--kv-corpus=wikitext2: no split 'dev'; wikitext2 has train, validation, test"
    ):
        ask("wikitext2", split="dev", **more)
    check_corpus("c4", split="train")
    assert {"c4", "wikitext2", "default"} <= set(NAMES)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str], dict[str, bytes]]]:
    """A small hub: address, what was asked of it, and the files that it has (by the end of their address)."""
    asked: list[str] = []
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            content = next((files[name] for name in files if self.path.endswith(name)), None)
            found = content is not None or self.path == "/"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked, files
        server.shutdown()
        thread.join(60)


def test_c4_is_downloaded_without_listing_its_repository(
    tmp_path: Path, hub: tuple[str, list[str], dict[str, bytes]]
) -> None:
    address, asked, files = hub
    files["/datasets/allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz"] = jsonl_gz(ROWS)
    (online,) = run("show('c4')", tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert online[:2] == [[" ".join(ROWS)], COMMIT]
    assert not [path for path in asked if "tree" in path or "revision" in path]
    (offline,) = run("show('c4')", tmp_path)
    assert offline == online


def test_hub_that_lacks_the_data_set(tmp_path: Path, hub: tuple[str, list[str], dict[str, bytes]]) -> None:
    shown = run(f"for name in {tuple(HUB)}: show(name)", tmp_path, HF_ENDPOINT=hub[0], HF_HUB_OFFLINE="0")
    for name, message in zip(HUB, shown, strict=True):
        assert isinstance(message, str)
        assert message.startswith(f"--kv-corpus={name}: {HUB[name].repo_id} cannot be downloaded (")
        assert "give a local file" in message
        assert "\n" not in message
