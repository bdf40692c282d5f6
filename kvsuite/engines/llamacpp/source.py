"""From what ``--kv-model`` names to a GGUF file: the one there is, or one that is written once."""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.memory_model.config import architecture_of
from kvsuite.models.load import load_model, load_tokenizer, tokenizer_hash
from kvsuite.models.resolve import ModelSpec, resolve_model
from kvsuite.models.smollm2 import cache_root, find_gguf

from .memory_model import FAMILIES
from .model import refused_family

# of what is written: another layout is another file
_WRITER = 1


@dataclass(frozen=True)
class Source:
    """A GGUF file, and what belongs to it.

    Parameters
    ----------
    path
        The file.
    spec
        What was asked for.
    tokenizer
        ``None`` for dummies.
    tokenizer_hash
        As `kvsuite.models.load.LoadedModel` has it.
    notes
        What a reader of a result must know.
    """

    path: Path
    spec: ModelSpec
    tokenizer: Any
    tokenizer_hash: str | None
    notes: list[str]


def gguf_source(request: str, kind: str, *, seed: int, cache_dir: Path | None) -> Source:
    """The file of a model, written if need be.

    Parameters
    ----------
    request
        As ``--kv-model`` takes it.
    kind
        Type of the weights that are written.
    seed
        Of a dummy's weights.
    cache_dir
        Where converted models lie.

    Raises
    ------
    UserError
        If there is no such model, or it is none that can be written.
    """
    spec = resolve_model(request, cache_dir=cache_dir)
    if spec.kind in ("gguf", "smollm2"):
        # of the default model the tokenizer is that of the converted folder: every engine has the same tokens
        path = Path(spec.source) if spec.kind == "gguf" else find_gguf()
        return _with_tokenizer(path, spec, ["weights as they are in the file"], cache_dir)
    family = architecture_of(request, cache_dir=cache_dir).model_type
    if family not in FAMILIES:
        raise refused_family(request, family)
    path = _written(spec, kind, seed=seed, cache_dir=cache_dir)
    return _with_tokenizer(path, spec, [*spec.notes, f"weights written to GGUF in {kind}"], cache_dir)


def _with_tokenizer(path: Path, spec: ModelSpec, notes: list[str], cache_dir: Path | None) -> Source:
    tokenizer = load_tokenizer(spec, cache_dir=cache_dir)
    return Source(path, spec, tokenizer, None if tokenizer is None else tokenizer_hash(tokenizer), notes)


def _written(spec: ModelSpec, kind: str, *, seed: int, cache_dir: Path | None) -> Path:
    from filelock import FileLock

    from .write_gguf import write_gguf

    weights = f"{spec.revision or spec.source} {seed if spec.is_dummy else ''} {_WRITER}"
    digest = hashlib.sha256(weights.encode()).hexdigest()[:12]
    path = cache_root(cache_dir) / "gguf" / f"{spec.label}-{digest}-{kind}.gguf"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.is_file():
                return path
            loaded = load_model(spec, device="cpu", dtype="float32", seed=seed, cache_dir=cache_dir)
            temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
            try:
                write_gguf(loaded.model, loaded.text_config, temporary, kind, spec.request)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--kv-cache-dir={path.parent}: the GGUF cannot be written ({error.strerror or error}); choose another"
        ) from error
    return path
