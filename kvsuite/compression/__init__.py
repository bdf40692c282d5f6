"""Cache policies by name: from the entry-point group ``kvsuite.policies``, ours by the same way, or `register_policy`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

from kvsuite.entry_points import OURS, POLICIES, described, find, load, package
from kvsuite.errors import UserError

from .base import CacheView, Policy, Positions, Schedule
from .fix_size_l2 import FixSizeL2
from .l2_compress import L2Compress
from .recent_only import RecentOnly
from .streaming_llm import StreamingLLM

_POLICIES: dict[str, type[Policy]] = {}

# the originals' methods that kvsuite does not run, and what does the job
REPLACEMENTS = {
    "head_aware": "kvpress:AdaKV",
    "h2o_l2": "fix_size_l2 (or kvpress:ObservedAttention for attention-based heavy hitters)",
    "snapkv_lite": "kvpress:SnapKV",
    "pyramid_kv": "kvpress:PyramidKV",
    "adaptive_l2": "fix_size_l2",
}


def register_policy(policy: type[Policy]) -> type[Policy]:
    """Make ``policy`` known under its name; a taken name is an error."""
    known = find_policy(policy.name) if policy.name in list_policies() else policy
    if known is not policy:
        raise ValueError(f"policy {policy.name!r} is already registered")
    _POLICIES[policy.name] = policy
    return policy


def list_policies() -> list[str]:
    """Names of the known policies, sorted; none is imported for it."""
    return sorted({*_POLICIES, *_installed()})


def find_policy(name: str) -> type[Policy]:
    """The class of policy ``name``; its module is imported only now.

    Raises
    ------
    UserError
        For an unknown name (the message lists the known ones), or an entry point that names no policy: with package,
        object and mend.
    """
    if name in REPLACEMENTS:
        raise UserError(f"--kv-method={name}: not part of kvsuite; use {REPLACEMENTS[name]}")
    if name not in _POLICIES:
        if name not in _installed():
            raise UserError(f"--kv-method={name}: unknown policy; known: {', '.join(list_policies())}, kvpress:<Name>")
        _POLICIES[name] = _checked(_installed()[name])
    return _POLICIES[name]


def get_policy(name: str, **parameters: Any) -> Policy:
    """Build the policy ``name``.

    Raises
    ------
    UserError
        For an unknown name (listing the known ones) or bad parameters.
    """
    return find_policy(name)(**parameters)


def _installed() -> Mapping[str, EntryPoint]:
    entries = find(POLICIES)
    if not any(package(entry) == OURS for entry in entries.values()):
        raise UserError("kvsuite: its entry points are not those of this version; install it again (pip install -e .)")
    return entries


def _checked(entry: EntryPoint) -> type[Policy]:
    found = load(entry)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UserError(f"{described(entry)}: is no subclass of kvsuite.compression.Policy; name one")
    if missing := sorted(found.__abstractmethods__):
        raise UserError(f"{described(entry)}: lacks {', '.join(missing)}; a policy has all members of Policy")
    if getattr(found, "name", None) != entry.name:
        raise UserError(f"{described(entry)}: the name of the class is another one; write name = {entry.name!r} there")
    return found


__all__ = [
    "REPLACEMENTS",
    "CacheView",
    "FixSizeL2",
    "L2Compress",
    "Policy",
    "Positions",
    "RecentOnly",
    "Schedule",
    "StreamingLLM",
    "find_policy",
    "get_policy",
    "list_policies",
    "register_policy",
]
