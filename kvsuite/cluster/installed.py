"""What workers can know: suites and policies of packages, and none that a conftest of the controller brings in."""

from __future__ import annotations

from collections.abc import Iterable

from kvsuite.case import Case
from kvsuite.compression import list_policies
from kvsuite.entry_points import POLICIES, SUITES, find
from kvsuite.errors import UserError


def require_installed(cases: Iterable[Case], address: str) -> None:
    """Refuse suites and policies that are known in this process alone.

    Raises
    ------
    UserError
        Naming the first, and how workers would know it.
    """
    suites, policies = set(), set()
    for case in cases:
        suites.add(case.suite)
        policies.add(str(case.policy))
    for kind, group, names in (("suite", SUITES, suites), ("policy", POLICIES, policies & set(list_policies()))):
        for name in sorted(names - find(group).keys()):
            raise UserError(
                f"--kv-cluster={address}: {kind} {name} comes from a conftest or a hook, which workers do not read; bring it "
                f"in by an entry point of the group {group}"
            )
