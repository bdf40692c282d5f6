"""The model hub: is it there, and if not, does the local hub cache hold what was asked for?"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

from kvsuite.errors import UserError

_MENDS = {
    "model": "give a local folder, a .gguf file, dummy:<preset> or smollm2, or fetch it on a connected machine first",
    "dataset": "give a local file (.txt, .jsonl, .parquet, .arrow), a local copy with --kv-dataset-path, pydoc or default",
}


@functools.cache
def hub_reachable(timeout_s: float = 2.0) -> bool:
    """Whether the hub answers; asked once per process.

    One HEAD request through huggingface_hub's own client, so that ``HF_ENDPOINT``, proxies and certificates count as
    they do for a download. It runs in a thread because name resolution knows no timeout. Without it transformers and
    datasets retry for 20 to 50 s before they give up.

    Parameters
    ----------
    timeout_s
        Longest wait in seconds, all in all.
    """
    if _offline_by_choice():
        return False
    answered = threading.Event()

    def probe() -> None:
        from huggingface_hub import constants, get_session

        try:
            response = get_session().head(constants.ENDPOINT, timeout=timeout_s)
        except Exception:  # the client library and its error types differ between the supported versions
            return
        if response.status_code < 500:
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answered.is_set()


def cached_commit(repo_id: str, repo_type: str = "model") -> str | None:
    """Commit of the repository's main branch in the local hub cache, ``None`` if no snapshot of it is there."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return commit if (folder / "snapshots" / commit).is_dir() else None


def require_hub(option: str, value: str, *, repo_id: str | None = None, repo_type: str = "model") -> bool:
    """Make sure that a hub repository can be had, from the hub or from the local hub cache.

    Parameters
    ----------
    option, value
        What the user typed, for the message.
    repo_id
        The repository behind it; ``value`` itself if left out.
    repo_type
        ``"model"`` or ``"dataset"``.

    Returns
    -------
    bool
        True if the hub answers; False if only local files may be used (``local_files_only=True``).

    Raises
    ------
    UserError
        If the hub does not answer and the cache has no snapshot of the repository.
    """
    if hub_reachable():
        return True
    repo_id = repo_id or value
    if cached_commit(repo_id, repo_type) is None:
        reason = "offline mode is set (HF_HUB_OFFLINE)" if _offline_by_choice() else "the hub cannot be reached"
        raise UserError(f"{option}={value}: {reason} and {repo_id} is not in the local hub cache; {_MENDS[repo_type]}")
    return False


def _offline_by_choice() -> bool:
    from huggingface_hub import constants

    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return bool(constants.HF_HUB_OFFLINE) or asked.upper() in {"1", "ON", "YES", "TRUE"}
