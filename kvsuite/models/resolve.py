"""What ``--kv-model`` names: a request becomes a `ModelSpec`. Nothing is loaded and no weights are downloaded."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvsuite.case import id_token
from kvsuite.errors import UserError
from kvsuite.options.paths import NO_HOME, expanded

from . import smollm2
from .hub import cached_commit
from .presets import preset_name

Kind = Literal["smollm2", "hub", "local", "gguf", "mlc", "dummy"]

_DEFAULT_NAMES = {"smollm2", "smollm2-135m", "default"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "params_shard_*.bin")
_MIB = 1 << 20
_MLC_NOTE = "MLC weights: only the mlc engine can load them"


@dataclass(frozen=True)
class ModelSpec:
    """A model as asked for, and what it is.

    Parameters
    ----------
    request
        What the user typed.
    kind
        ``smollm2`` (the default), ``hub``, ``local`` (folder), ``gguf``, ``mlc`` (MLC weights) or ``dummy``.
    label
        Short name, safe in file names and pytest ids.
    source
        Path, hub id or preset name, by kind.
    revision
        What identifies the weights: a hub commit, ``sha256:<hex>`` of local files (`files_digest`; of the whole GGUF
        for ``smollm2``), ``dummy:<preset>``; ``None`` for a hub model that is not in the local cache yet.
    notes
        What a reader of a result must know about the weights.
    """

    request: str
    kind: Kind
    label: str
    source: str
    revision: str | None
    notes: tuple[str, ...] = ()

    @property
    def is_dummy(self) -> bool:
        """Whether the weights are random, so that quality means nothing."""
        return self.kind == "dummy"

    @property
    def title(self) -> str:
        """Name for people: the label, and for the default what its weights are."""
        return f"{smollm2.NAME} (Q4_1 weights)" if self.kind == "smollm2" else self.label


def resolve_model(request: str, *, cache_dir: Path | None = None) -> ModelSpec:
    """Find out what a model request means.

    Parameters
    ----------
    request
        ``smollm2`` (also ``SmolLM2-135M``, ``default``), ``dummy:<preset>``, a ``.gguf`` file, a local folder, or a
        hub id ``org/name``, with or without ``HF://``. A text that starts with ``.``, ``/`` or ``~``, ends in
        ``.gguf``, holds more than one path separator, or exists on disk is a path and never a hub id.
    cache_dir
        Where the default model is or will be converted to; see `kvsuite.models.smollm2.cache_root`.

    Raises
    ------
    UserError
        If the request is none of these, or the path is not a model.
    """
    request = request.strip()
    if "," in request and not Path(request).expanduser().exists():
        raise UserError(
            f"--kv-model={request}: one model a run; start a run for each, and set them side by side with "
            "python -m kvsuite compare RUN RUN, or python -m kvsuite figures for their CSVs"
        )
    if request.lower() in _DEFAULT_NAMES:
        return ModelSpec(
            request=request,
            kind="smollm2",
            label=f"{smollm2.NAME}-Q4_1",
            source=str(smollm2.converted_path(cache_dir)),
            revision=f"sha256:{smollm2.GGUF_SHA256}",
            notes=("Q4_1 weights dequantised; computed in the requested dtype, not an fp16 baseline",),
        )
    prefix, colon, rest = request.partition(":")
    if prefix.lower() == "dummy" and colon:
        preset = preset_name(rest)
        return ModelSpec(request, "dummy", f"dummy-{preset}", preset, f"dummy:{preset}", ("random weights",))
    is_url = request.lower().startswith("hf://")
    name = request[len("hf://") :] if is_url else request
    if not is_url and _is_path(name):
        return _resolve_path(request)
    if _HUB_ID.fullmatch(name):
        is_mlc = name.endswith("-MLC")
        return ModelSpec(
            request=request,
            kind="mlc" if is_mlc else "hub",
            label=id_token(name.partition("/")[2]),
            source=name,
            revision=cached_commit(name),
            notes=(_MLC_NOTE,) if is_mlc else (),
        )
    raise UserError(
        f"--kv-model={request}: not a model; give smollm2, dummy:tiny, a local folder, a .gguf file "
        "or a hub id such as EleutherAI/pythia-2.8b"
    )


def files_digest(folder: Path, config: Path | None, weights: list[Path]) -> str:
    """Digest of local weights: quick to compute, and different for different models in practice.

    SHA-256 over the bytes of the configuration file and, for each weight file in name order, its name, its size, and
    its first and last MiB. Weights that differ only in the middle of a file are *not* told apart.
    """
    digest = hashlib.sha256(config.read_bytes() if config else b"")
    for path in sorted(weights):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_MIB))
            if size > _MIB:
                stream.seek(max(_MIB, size - _MIB))
                digest.update(stream.read())
    return "sha256:" + digest.hexdigest()


def _is_path(text: str) -> bool:
    separators = sum(text.count(sep) for sep in {os.sep, os.altsep or os.sep})
    return text.startswith((".", "/", "~")) or separators > 1 or text.endswith(".gguf") or os.path.exists(text)


def _resolve_path(request: str) -> ModelSpec:
    try:
        path = expanded(request).absolute()
    except UserError as error:
        raise UserError(f"--kv-model={request}: {NO_HOME}") from error
    # "." and ".." are legitimate requests without a usable name of their own
    label = id_token(path.resolve().name.removesuffix(".gguf")) or "model"
    try:
        if path.is_file() and path.suffix == ".gguf":
            return ModelSpec(request, "gguf", label, str(path), files_digest(path.parent, None, [path]))
        weights = [file for pattern in _WEIGHTS for file in path.glob(pattern)]
        for config, kind, notes in (("config.json", "local", ()), ("mlc-chat-config.json", "mlc", (_MLC_NOTE,))):
            if (path / config).is_file():
                revision = files_digest(path, path / config, weights)
                return ModelSpec(request, kind, label, str(path), revision, notes)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"--kv-model={request}: cannot be read ({error.strerror}); check the permissions") from error
    if not path.exists():
        raise UserError(f"--kv-model={request}: no such file or folder; check the path (a hub id looks like org/name)")
    if path.is_dir():
        raise UserError(
            f"--kv-model={request}: no config.json in the folder; give a Hugging Face model folder or a .gguf"
        )
    raise UserError(f"--kv-model={request}: not a .gguf file; give a .gguf or the folder that holds config.json")
