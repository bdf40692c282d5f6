"""Whose software the nodes of a cluster must have, so that all rows of a run were measured with the same."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvsuite.survival.settings import known_machine, software_differences

#: what the controller has as well, though it measures nothing
_SHARED = ("torch", "transformers")


@dataclass(frozen=True)
class Reference:
    """An environment that others must agree with.

    Parameters
    ----------
    name
        Whose it is, in words.
    environment
        What is known of it; packages that are not named there are no difference.
    is_build_free
        Whether builds of one version (``2.11.0+cpu``, ``2.11.0+cu128``) are the same: the controller may have no GPU.
    """

    name: str
    environment: Mapping[str, Any]
    is_build_free: bool = False

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """In what the software of the environment ``found`` differs."""
        own, its = dict(self.environment), dict(found)
        if self.is_build_free:
            own["packages"] = its["packages"] | own["packages"]
            own["packages"], its["packages"] = _without_build(own["packages"]), _without_build(its["packages"])
        return software_differences(own, its)

    def with_engines(self, found: Mapping[str, Any]) -> Reference:
        """With the engines of ``found`` that this one lacks."""
        engines = found["engines"] | self.environment["engines"]
        return replace(self, environment={**self.environment, "engines": engines})


def of_earlier(run: Mapping[str, Any]) -> Reference:
    """The run that ``--kv-resume`` goes on with, by its run line."""
    return Reference("the run that goes on", known_machine(run))


def of_controller() -> Reference:
    """The process that sends its code to the nodes, as far as it has what measures."""
    packages = {}
    for name in _SHARED:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Reference("the controller", {"python": platform.python_version(), "packages": packages}, is_build_free=True)


def _without_build(packages: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: found.partition("+")[0] if name in _SHARED and isinstance(found, str) else found
        for name, found in packages.items()
    }
