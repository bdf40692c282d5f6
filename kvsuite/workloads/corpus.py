"""Corpora: the texts that perplexity is measured on, normalised, hashed, and cut by a rule that the record can name."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, islice
from pathlib import Path

from kvsuite.errors import UserError

from .text_files import SUFFIXES, text_rows

_OPTION = "--kv-corpus"
_LOCAL = f"give a local file ({', '.join(SUFFIXES)}), pydoc or default"
# the test texts as parquet, read without any dataset script; data sets by name, from the hub
_HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1/{split}-*.parquet"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1/{split}-*.parquet"),
    "pg19": ("emozilla/pg19", "data/{split}-*.parquet"),
}
_NAMES = ("default", "pydoc", *_HUB)
_SPLITS = ("train", "validation", "test")
_WHOLE = "each file is one text"
_ROWS = "each row is one text; the first rows that are long enough"


@dataclass(frozen=True)
class Corpus:
    """Texts to score.

    Parameters
    ----------
    name
        Short name: the request, or a file's name without its folder.
    texts
        Normalised: UTF-8 without a byte order mark, CRLF turned into LF, nothing else changed.
    source
        Where the texts come from.
    revision
        Commit of the data set or version of the source, ``None`` for local files; `text_hash` identifies every corpus.
    text_hash
        ``sha256:<hex>`` over the normalised texts, joined by a NUL character.
    join_rule
        How texts were made of rows, articles or files.
    notes
        What a reader of a result must know.
    """

    name: str
    texts: tuple[str, ...]
    source: str
    revision: str | None
    text_hash: str
    join_rule: str
    notes: tuple[str, ...] = ()


def check_corpus(request: str) -> None:
    """Find out what can be known about a request without reading it or asking the hub.

    Raises
    ------
    UserError
        If it is neither a known name nor an existing path.
    """
    if request not in _NAMES and not Path(request).expanduser().exists():
        raise UserError(
            f"{_OPTION}={request}: no such corpus or file; check the path, or choose one of {', '.join(_NAMES)}"
        )


def load_corpus(request: str, *, num_texts: int, min_chars: int = 0, split: str = "test") -> Corpus:
    """Load a corpus.

    Parameters
    ----------
    request
        ``default`` (articles shipped with kvsuite), ``pydoc`` (the language reference inside every CPython), a path
        (``.txt``, ``.raw``, ``.jsonl``, ``.json``, ``.parquet``, ``.arrow``, or a folder made by
        ``Dataset.save_to_disk``), or ``pg19``, ``wikitext2``, ``wikitext103`` from the hub. Rows hold their text in the
        column ``text`` or in their only column of strings.
    num_texts
        Number of texts wanted. ``default`` and ``pydoc`` are cut into as many contiguous parts of about equal length,
        at article boundaries (1: the whole text); WikiText and a text file are one text; of everything else the first
        ``num_texts`` rows *that qualify* are taken.
    min_chars
        A text qualifies if it has at least so many characters; a blank text never does.
    split
        Split of a data set: ``train``, ``validation`` or ``test``. Files have none.

    Raises
    ------
    UserError
        If the corpus is unknown, missing, unreadable, not reachable, or has fewer qualifying texts than asked.
    """
    if num_texts < 1:
        raise UserError(f"{_OPTION}={request}: {num_texts} texts asked; ask for at least 1")
    notes: tuple[str, ...] = ()
    revision: str | None = None
    name = request
    candidates: Iterable[str]
    if request == "default":
        articles = split_articles(_embedded())
        source, join_rule = "kvsuite/workloads/encyclopedia.txt", _parts_rule(num_texts)
        candidates = contiguous_parts(articles, num_texts)
    elif request == "pydoc":
        source, revision, join_rule = "pydoc_data.topics", f"python-{platform.python_version()}", _parts_rule(num_texts)
        candidates = contiguous_parts(_pydoc(), num_texts)
    elif request in _HUB:
        rows, revision = _hub_rows(request, split)
        source = f"{_HUB[request][0]}:{split}"
        if request == "pg19":
            candidates, join_rule = rows, _ROWS
        else:
            candidates, join_rule = [join_rows(rows)], r"all rows, blank ones too, joined by \n\n"
        if request == "wikitext103" and split != "train":
            notes = (f"the {split} split of wikitext103 is the same text as that of wikitext2",)
    else:
        check_corpus(request)
        path = Path(request).expanduser()
        candidates = text_rows(path, option=f"{_OPTION}={request}", split=split)
        join_rule = _WHOLE if path.suffix.lower() in {".txt", ".raw"} else _ROWS
        name, source = path.name, str(path)
    qualifying = (text for text in map(normalise, candidates) if text.strip() and len(text) >= min_chars)
    texts = tuple(islice(qualifying, num_texts))
    if len(texts) < num_texts:
        raise UserError(
            f"{_OPTION}={request}: only {len(texts)} text(s) with at least {min_chars} characters, {num_texts} asked; "
            "ask for fewer or shorter texts, or give another corpus"
        )
    return Corpus(name, texts, source, revision, hash_texts(texts), join_rule, notes)


def normalise(text: str) -> str:
    """Turn CRLF into LF, so that a file copied through Windows is the same text. Nothing else is touched."""
    return text.replace("\r\n", "\n")


def hash_texts(texts: Sequence[str]) -> str:
    """Return ``sha256:<hex>`` over the texts joined by NUL; of a single text, simply its own digest."""
    return "sha256:" + hashlib.sha256("\0".join(texts).encode()).hexdigest()


def join_rows(rows: Iterable[str], *, drop_blank: bool = False) -> str:
    r"""Join the rows of WikiText by ``"\n\n"``, as the Hugging Face documentation does.

    Parameters
    ----------
    rows
        Rows as the data set has them, each with its own final newline.
    drop_blank
        Leave blank rows out, as the original perplexity script did; another text, and another perplexity.
    """
    return "\n\n".join(normalise(row) for row in rows if row.strip() or not drop_blank)


def split_articles(text: str) -> list[str]:
    """Cut a text at its titles: paragraphs of one line, at most 60 characters, without a full stop at the end."""
    articles: list[list[str]] = []
    for paragraph in text.strip().split("\n\n"):
        title = "\n" not in paragraph and len(paragraph) <= 60 and not paragraph.endswith(".")
        if title or not articles:
            articles.append([])
        articles[-1].append(paragraph)
    return ["\n\n".join(paragraphs) for paragraphs in articles]


def contiguous_parts(articles: Sequence[str], count: int) -> list[str]:
    """Join articles to ``count`` contiguous parts of about equal length; to fewer if there are too few articles."""
    count = min(count, len(articles))
    total = sum(map(len, articles))
    parts: list[list[str]] = [[]]
    done = 0
    for place, article in enumerate(articles):
        enough = done + len(article) / 2 > total * len(parts) / count
        must = len(articles) - place <= count - len(parts)
        if parts[-1] and len(parts) < count and (enough or must):
            parts.append([])
        parts[-1].append(article)
        done += len(article)
    return ["\n\n".join(part) for part in parts]


def _parts_rule(count: int) -> str:
    return "whole text" if count == 1 else f"{count} contiguous parts of about equal length, cut at article boundaries"


def _embedded() -> str:
    return resources.files("kvsuite.workloads").joinpath("encyclopedia.txt").read_text(encoding="utf-8")


def _pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _hub_rows(name: str, split: str) -> tuple[Iterable[str], str]:
    from huggingface_hub import snapshot_download

    from kvsuite.models.hub import require_hub

    if split not in _SPLITS:
        raise UserError(f"{_OPTION}={name}: no split {split!r}; choose one of {', '.join(_SPLITS)}")
    repo_id, pattern = _HUB[name]
    online = require_hub(_OPTION, name, repo_id=repo_id, repo_type="dataset")
    pattern = pattern.format(split=split)
    try:
        # datasets.load_dataset would fetch every split (11 GB of PG-19), and offline retry for 20 s; this is the same
        # cache that it downloads to
        folder = Path(
            snapshot_download(repo_id, repo_type="dataset", allow_patterns=[pattern], local_files_only=not online)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{_OPTION}={name}: {repo_id} cannot be downloaded ({reason}); {_LOCAL}") from error
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"{_OPTION}={name}: the local hub cache has no {split} split of {repo_id}; {_LOCAL}")
    rows = chain.from_iterable(text_rows(file, option=f"{_OPTION}={name}", split=split) for file in files)
    return rows, folder.name
