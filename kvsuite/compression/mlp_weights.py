"""Weights of the MLP compressor: FastCache's checkpoint layout, read without running anything, names and shapes checked."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from kvsuite.errors import UserError
from kvsuite.options.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["specified", "residual"]
FORMS = ("specified", "residual")
#: what the checkpoint calls the MLPs of text keys, text values, image keys and image values
TEXT, IMAGE = ("tk", "tv"), ("ik", "iv")
#: places of the three linear layers among ReLU and Dropout
SLOTS = (0, 3, 6)
_NAME = re.compile(r"compress_(tk|tv|ik|iv)\.(\d{1,4})\.([036])\.(weight|bias)")
# trained with the compressor and not read when it compresses
_UNREAD = re.compile(r"attention\.\d{1,4}\.(weight|bias)")
_FIT = "write weights with: python -m kvsuite fit-compressor"


@dataclass(frozen=True)
class MlpWeights:
    """The MLPs of all layers, stacked.

    Parameters
    ----------
    layers, head_dim, factor
        Layers, width of a head, tokens that become one.
    families
        By ``tk``, ``tv``, ``ik``, ``iv``: of each of the three linear layers its weight ``[layers, in, out]`` and its bias
        ``[layers, 1, out]``, float32 on the CPU.
    form
        What the MLP's output is: the merged vector (``specified``) or what is added to the mean (``residual``); ``None``
        where the file does not say, as the original's do not.
    model, revision
        The model that they were fitted to, ``None`` where the file does not say.
    """

    layers: int
    head_dim: int
    factor: int
    families: Mapping[str, tuple[tuple[Tensor, Tensor], ...]] = field(repr=False)
    form: Form | None = None
    model: str | None = None
    revision: str | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under the names of the checkpoint."""
        return {
            f"compress_{family}.{layer}.{slot}.{kind}": (
                weight[layer].T if kind == "weight" else bias[layer, 0]
            ).contiguous()
            for family, linears in self.families.items()
            for layer in range(self.layers)
            for slot, (weight, bias) in zip(SLOTS, linears, strict=True)
            for kind in ("weight", "bias")
        }

    def write(self, path: Path) -> None:
        """Write them as a checkpoint that `read_weights` reads: whole, or what was there stays.

        Raises
        ------
        OSError
            If there is no room, say.
        """
        import torch

        facts = {"form": self.form, "factor": self.factor, "model": self.model, "revision": self.revision}
        made = io.BytesIO()
        torch.save({"model_state_dict": {"compressor": self.state_dict()}, "kvsuite": facts}, made)
        # a link stays one
        target = path.resolve()
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_bytes(made.getbuffer())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def digest_of(path: str, typed: str) -> str:
    """``sha256:`` and 16 digits of a file of weights, which is part of a case's identity.

    Raises
    ------
    UserError
        If it cannot be read; ``typed``, option and value, stands in front.
    """
    file = _existing(path, typed)
    facts = file.stat()
    return _digest(str(file), facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=32)
def _digest(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def read_weights(path: str, typed: str) -> MlpWeights:
    """Read a checkpoint: a ``.safetensors`` file, or one that ``torch.load(weights_only=True)`` takes.

    The tensors lie at the top, under ``model_state_dict``, or under ``compressor`` in there. Weights of ``attention``, which
    the original trains beside them, are not read.

    Raises
    ------
    UserError
        If it cannot be read, or a name or shape is not that of a compressor; ``typed``, option and value, stands in front.
    """
    import torch

    file = _existing(path, typed)
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                found: Any = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                facts: Any = opened.metadata() or {}
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
            facts = found.get("kvsuite", {}) if isinstance(found, dict) else {}
    except Exception as error:  # a damaged file, or one that would run code, fails in many ways
        raise UserError(
            f"{typed}: holds no weights that can be read without running code ({type(error).__name__}); {_FIT}"
        ) from error
    for key in ("model_state_dict", "compressor"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = (
        {str(name): value for name, value in found.items() if name != "kvsuite"} if isinstance(found, dict) else {}
    )
    foreign = sorted(name for name in tensors if not (_NAME.fullmatch(name) or _UNREAD.fullmatch(name)))
    if not tensors or foreign:
        what = f"{foreign[0]} is no weight of it" if foreign else "there are none"
        raise UserError(f"{typed}: these are not the weights of an MLP compressor ({what}); {_FIT}")
    return _stacked(tensors, facts if isinstance(facts, dict) else {}, typed)


def _stacked(tensors: Mapping[str, Any], facts: Mapping[str, Any], typed: str) -> MlpWeights:
    import torch

    names = [found for found in map(_NAME.fullmatch, tensors) if found is not None]
    present = {name[1] for name in names}
    layers = 1 + max((int(name[2]) for name in names), default=-1)
    for pair in (TEXT, IMAGE):
        if len(missing := set(pair) - present) == 1 or (pair is TEXT and missing):
            raise UserError(f"{typed}: the weights compress_{min(missing)} are missing; {_FIT}")
    first = tensors.get("compress_tk.0.0.weight")
    if not _is_plain(first) or first.dim() != 2 or 0 in first.shape or first.shape[1] % first.shape[0]:
        raise UserError(
            f"{typed}: compress_tk.0.0.weight is {_shape(first)}, where [head_dim, factor * head_dim] is needed; {_FIT}"
        )
    width, factor = first.shape[0], first.shape[1] // first.shape[0]
    families = {}
    for family in sorted(present):
        linears = []
        for slot in SLOTS:
            stacks: dict[str, Tensor] = {}
            for kind, wanted in (("weight", [width, first.shape[1] if slot == 0 else width]), ("bias", [width])):
                own = []
                for layer in range(layers):
                    name = f"compress_{family}.{layer}.{slot}.{kind}"
                    tensor = tensors.get(name)
                    if not _is_plain(tensor) or list(tensor.shape) != wanted:
                        what = "is missing" if tensor is None else f"is {_shape(tensor)}"
                        raise UserError(f"{typed}: {name} {what}, where {wanted} is needed; {_FIT}")
                    if not bool(tensor.isfinite().all()):
                        raise UserError(f"{typed}: {name} holds numbers that are not finite; {_FIT}")
                    own.append(tensor.float())
                stacks[kind] = torch.stack(own)
            linears.append((stacks["weight"].transpose(1, 2).contiguous(), stacks["bias"][:, None]))
        families[family] = tuple(linears)
    form = facts.get("form")
    if form is not None and form not in FORMS:
        raise UserError(f"{typed}: the weights are of form {form!r}, which is none of {', '.join(FORMS)}; {_FIT}")
    model, revision = (facts.get(name) for name in ("model", "revision"))
    return MlpWeights(
        layers, width, factor, families, form,
        model if isinstance(model, str) else None,
        revision if isinstance(revision, str) else None,
    )  # fmt: skip


def _existing(path: str, typed: str) -> Path:
    file = expanded(path)
    if not file.is_file():
        raise UserError(f"{typed}: no such file; check the path, or {_FIT}")
    return file


def _is_plain(tensor: Any) -> TypeGuard[Tensor]:
    import torch

    return (
        isinstance(tensor, torch.Tensor)
        and not tensor.is_nested
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )


def _shape(tensor: Any) -> str:
    """What there is in the place of a tensor."""
    if tensor is None:
        return "missing"
    if not _is_plain(tensor):
        return "no dense tensor of 16, 32 or 64 bit floats"
    return str(list(tensor.shape))
