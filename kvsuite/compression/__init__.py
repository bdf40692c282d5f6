"""Cache policies by name. A new policy is one new file in this folder and one line in the test matrix."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

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
    if _POLICIES.setdefault(policy.name, policy) is not policy:
        raise ValueError(f"policy {policy.name!r} is already registered")
    return policy


def list_policies() -> list[str]:
    """Names of the registered policies, sorted."""
    return sorted(_POLICIES)


def find_policy(name: str) -> type[Policy]:
    """The class of policy ``name``.

    Raises
    ------
    UserError
        For an unknown name; the message lists the known ones.
    """
    if name in REPLACEMENTS:
        raise UserError(f"--kv-method={name}: not part of kvsuite; use {REPLACEMENTS[name]}")
    if name not in _POLICIES:
        raise UserError(f"--kv-method={name}: unknown policy; known: {', '.join(list_policies())}, kvpress:<Name>")
    return _POLICIES[name]


def get_policy(name: str, **parameters: Any) -> Policy:
    """Build the policy ``name``.

    Raises
    ------
    UserError
        For an unknown name (listing the known ones) or bad parameters.
    """
    return find_policy(name)(**parameters)


def _discover() -> None:
    """Register every policy that a module of this folder defines; none of them imports torch to be defined."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("kvpress"):
            continue
        for member in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(member, type) and issubclass(member, Policy) and hasattr(member, "name"):
                register_policy(member)


_discover()

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
