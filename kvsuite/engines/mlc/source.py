"""What a model is before MLC has touched it: a Hugging Face folder, and what identifies every byte of it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvsuite.case import digest
from kvsuite.errors import UserError
from kvsuite.models.hub import require_hub
from kvsuite.models.load import load_model
from kvsuite.models.resolve import ModelSpec
from kvsuite.models.smollm2 import smollm2_folder

MLC_CONFIG = "mlc-chat-config.json"
#: what of a hub repository MLC reads
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "merges.txt")
_READ_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.tiktoken", "*.txt", "*.gguf")
MANIFEST = "kvsuite.json"
#: raised when folders are made in another way
BUILDER = 3
_BYTES = 256


def built_once(folder: Path, facts: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """A cached folder, built if this is the first use: it appears by one rename, and of two processes one waits.

    Parameters
    ----------
    folder
        Where it is or will be; its name carries the key of ``facts``.
    facts
        What it was made of and with, in JSON types; written beside the content.
    build
        Fills the folder that it is given.

    Raises
    ------
    UserError
        If the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    from filelock import FileLock

    temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
                shutil.rmtree(leftover)
            if not folder.is_dir():
                temporary.mkdir()
                build(temporary)
                (temporary / MANIFEST).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                temporary.replace(folder)
    except OSError as error:
        raise UserError(
            f"--kv-cache-dir={folder.parent.parent}: {folder.name} cannot be written ({error.strerror or error}); choose "
            "another"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def short_key(facts: dict[str, Any]) -> str:
    """A piece of a folder's name that stands for ``facts``, and for the way in which folders are made."""
    return digest({"builder": BUILDER, **facts}).removeprefix("sha256:")[:16]


def content_key(spec: ModelSpec, seed: int) -> str:
    """What identifies a model's weights, configuration and tokenizer, every byte of local files included.

    `ModelSpec.revision` looks at the ends of large files only: enough to tell runs apart, too little for a cache whose hit
    replaces the model.
    """
    if spec.kind == "dummy":
        return f"{spec.revision}:{seed}"
    path = Path(spec.source)
    if spec.kind in ("smollm2", "hub") or not path.exists():
        return str(spec.revision or spec.source)
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(_read_files(path)):
        state = file.stat()
        total.update(f"{file.name}\0{_file_hash(str(file), state.st_size, state.st_mtime_ns)}\0".encode())
    return "sha256:" + total.hexdigest()


def source_folder(spec: ModelSpec, root: Path, seed: int, cache_dir: Path | None) -> Path:
    """The model as a Hugging Face folder for ``mlc_llm gen_config`` and ``convert_weight``.

    A GGUF file, and a dummy's random weights, are saved once under ``root``; so is a configuration that MLC would read wrongly,
    with links to the folder's other files. Other folders are taken as they are.

    Raises
    ------
    UserError
        If the model cannot be had.
    """
    if spec.kind == "smollm2":
        return _readable(smollm2_folder(cache_dir), spec, root, seed)
    if spec.kind == "local":
        return _readable(Path(spec.source), spec, root, seed)
    if spec.kind == "hub":
        from huggingface_hub import snapshot_download

        offline = not require_hub("--kv-model", spec.request, repo_id=spec.source)
        found = snapshot_download(spec.source, allow_patterns=list(_HUB_FILES), local_files_only=offline)
        return _readable(Path(found), spec, root, seed)
    facts = {"model": spec.label, "content": content_key(spec, seed), "dtype": "float16"}
    saved = built_once(
        root / f"source-{spec.label}-{short_key(facts)}", facts, lambda folder: _save(spec, seed, cache_dir, folder)
    )
    return _readable(saved, spec, root, seed)


def rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotation of a ``config.json`` by the names that MLC reads, ``{}`` where it has them, or has none.

    transformers 5 writes ``rope_parameters``. MLC reads ``rope_theta`` and ``rope_scaling`` and, if they are not there, rotates
    with a base of 10000 without a word.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or "rope_theta" in config:
        return {}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {"rope_theta": rope["rope_theta"]} | (
        {} if scaling.get("rope_type", "default") == "default" else {"rope_scaling": scaling}
    )


def _readable(folder: Path, spec: ModelSpec, root: Path, seed: int) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    fields = rope_fields(config)
    if not fields:
        return folder
    facts = {"folder": str(folder.resolve()), "content": content_key(spec, seed), "fields": fields}

    def link(place: Path) -> None:
        for file in folder.iterdir():
            if file.name not in (path.name, MANIFEST):
                (place / file.name).symlink_to(file.resolve())
        (place / path.name).write_text(json.dumps(config | fields, indent=2), encoding="utf-8")

    return built_once(root / f"source-{spec.label}-{short_key(facts)}", facts, link)


def _save(spec: ModelSpec, seed: int, cache_dir: Path | None, folder: Path) -> None:
    loaded = load_model(spec, device="cpu", dtype="float16", seed=seed, cache_dir=cache_dir)
    loaded.model.save_pretrained(folder)
    # MLC wants a tokenizer, and random weights have none
    (loaded.tokenizer or tokenizer_of_random_weights(loaded.model.config.vocab_size)).save_pretrained(folder)


def tokenizer_of_random_weights(vocabulary: int) -> Any:
    """A tokenizer whose first tokens are the bytes, and every other one a word of its own.

    MLC samples among the tokens that the tokenizer has, and sends a token when its text is whole UTF-8: so a model with random
    weights samples from its whole vocabulary, and nearly all of its tokens are chunks of their own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == _BYTES
    # the alphabet of bytes writes a space so
    words = [f"\u0120{index}" for index in range(_BYTES, vocabulary)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*alphabet, *words])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _read_files(folder: Path) -> Iterator[Path]:
    for pattern in _READ_FILES:
        yield from (path for path in folder.glob(pattern) if path.is_file())


@functools.lru_cache(maxsize=256)
def _file_hash(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
