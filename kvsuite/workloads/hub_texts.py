"""Rows of text of the data sets known by name, from the hub or the local hub cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from kvsuite.errors import UserError

from .text_files import SUFFIXES, text_rows

SPLITS = ("train", "validation", "test")
_LOCAL = f"give a local file ({', '.join(SUFFIXES)}), pydoc or default"


@dataclass(frozen=True)
class HubText:
    """A data set on the hub, read as files, without any dataset script.

    Parameters
    ----------
    repo_id
        The repository.
    files
        Of each split the pattern of its files, or the name of the one file that is read.
    """

    repo_id: str
    files: Mapping[str, str]

    @property
    def usual_split(self) -> str:
        """The split that is scored unless another is asked for: test, where there is one."""
        return "test" if "test" in self.files else "validation"

    def place(self, split: str) -> str:
        """What is read of the repository, for the record: the split, and where it is one file of many, that file."""
        return split if "*" in self.files[split] else f"{split} ({self.files[split]} alone)"


HUB = {
    "wikitext2": HubText("Salesforce/wikitext", {split: f"wikitext-2-raw-v1/{split}-*.parquet" for split in SPLITS}),
    "wikitext103": HubText(
        "Salesforce/wikitext", {split: f"wikitext-103-raw-v1/{split}-*.parquet" for split in SPLITS}
    ),
    "pg19": HubText("emozilla/pg19", {split: f"data/{split}-*.parquet" for split in SPLITS}),
    "c4": HubText(
        "allenai/c4",
        {"validation": "en/c4-validation.00000-of-00008.json.gz", "train": "en/c4-train.00000-of-01024.json.gz"},
    ),
}


def check_split(name: str, split: str, *, typed: str) -> None:
    """Make sure that a data set of `HUB` has a split.

    Raises
    ------
    UserError
        If not; ``typed``, option and value, stands in front.
    """
    has = HUB[name].files
    if split not in has:
        raise UserError(
            f"{typed}: no split {split!r}; {name} has {', '.join(has)}, for example --kv-split={next(iter(has))}"
        )


def hub_rows(name: str, split: str, *, typed: str) -> tuple[Iterable[str], str]:
    """Rows of one split, one by one, and the commit they come from.

    Parameters
    ----------
    name
        A key of `HUB`.
    split
        A key of its files.
    typed
        Option and value, for messages: ``"--kv-corpus=pg19"``.

    Raises
    ------
    UserError
        If neither the hub nor the local hub cache has them.
    """
    from kvsuite.models.hub import require_hub

    check_split(name, split, typed=typed)
    repo_id, pattern = HUB[name].repo_id, HUB[name].files[split]
    option, _, value = typed.partition("=")
    online = require_hub(option, value, repo_id=repo_id, repo_type="dataset")
    try:
        folder = _fetch(repo_id, pattern, online=online)
    except Exception as error:  # the hub's client library and its error types differ between the supported versions
        if not online:
            raise _not_cached(typed, split, repo_id) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{typed}: {repo_id} cannot be downloaded ({reason}); {_LOCAL}") from error
    files = sorted(folder.glob(pattern))
    if not files:
        raise _not_cached(typed, split, repo_id)
    return chain.from_iterable(text_rows(file, typed=typed, split=split) for file in files), folder.name


def _fetch(repo_id: str, pattern: str, *, online: bool) -> Path:
    """Folder of the repository's snapshot, in the cache that datasets downloads to."""
    from huggingface_hub import hf_hub_download, snapshot_download

    # datasets.load_dataset would fetch every split (11 GB of PG-19), and offline retry for 20 s
    if "*" in pattern:
        return Path(
            snapshot_download(repo_id, repo_type="dataset", allow_patterns=[pattern], local_files_only=not online)
        )
    # one file by its name: a snapshot lists the repository first, and that of C4 has many thousands of files
    file = hf_hub_download(repo_id, pattern, repo_type="dataset", local_files_only=not online)
    return Path(file).parents[len(Path(pattern).parts) - 1]


def _not_cached(typed: str, split: str, repo_id: str) -> UserError:
    return UserError(f"{typed}: the local hub cache has no {split} split of {repo_id}; {_LOCAL}")
