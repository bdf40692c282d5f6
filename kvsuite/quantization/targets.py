"""Which modules of a model a format converts, and what it leaves alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvsuite.errors import UserError

# mlc_llm does not quantise vision towers either
_VISION = frozenset({"vision_tower", "vision_model", "visual"})


@dataclass(frozen=True)
class Target:
    """A module to convert.

    Parameters
    ----------
    path
        Where it is in the model.
    is_table
        Whether it is an embedding.
    shares
        Path of an earlier target whose weight this one shares, ``None`` if it has its own.
    """

    path: str
    is_table: bool
    shares: str | None = None


def find_targets(model: Any, *, ends: bool) -> list[Target]:
    """Return the plain `nn.Linear` and, with ``ends``, `nn.Embedding` modules that can be converted, in model order.

    A weight is converted only if all modules that use it can be: otherwise a tied table would be kept twice. Without
    ``ends`` embeddings and the final layer stay. Subclasses stay, because their forward pass is their own.
    """
    head = model.get_output_embeddings()
    owners: dict[int, list[str]] = {}
    stays: set[int] = set()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
            fits = _is_plain(module, path) and (ends or (type(module) is nn.Linear and module is not head))
            if not fits or parameter is not module.weight:
                stays.add(id(parameter))
    found = []
    for path, module in modules.items():
        weight = getattr(module, "weight", None)
        if _is_plain(module, path) and id(weight) not in stays:
            first = owners[id(weight)][0]
            found.append(Target(path, type(module) is nn.Embedding, None if first == path else first))
    return found


def require_most(model: Any, targets: list[Target], name: str) -> None:
    """Refuse a model of whose matrices, embeddings and final layer aside, the format converts less than half.

    Raises
    ------
    UserError
        Naming the kind of module that holds most of the rest.
    """
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    converted = {target.path for target in targets}
    rest: Counter[str] = Counter()
    done = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or _in_vision(path):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in ends:
                continue
            if path in converted:
                done += parameter.numel()
            else:
                rest[type(module).__name__] += parameter.numel()
    if done < sum(rest.values()):
        kind, amount = rest.most_common(1)[0]
        raise UserError(
            f"--kv-quantization={name}: converts linear layers only, and this model keeps {amount} of its "
            f"{done + rest.total()} matrix weights in {kind} modules; use none or a model of linear layers"
        )


def count_kinds(model: Any, paths: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Count modules with parameters of their own by kind: those in ``paths``, and the others."""
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            (inside if path in paths else outside)[type(module).__name__] += 1
    return dict(inside), dict(outside)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` where ``path`` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _is_plain(module: nn.Module, path: str) -> bool:
    if _in_vision(path):
        return False
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def _in_vision(path: str) -> bool:
    return not _VISION.isdisjoint(path.split("."))
