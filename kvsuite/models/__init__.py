"""Models: what ``--kv-model`` may name, and how a named model becomes a loaded one. Importing this loads no torch."""

from __future__ import annotations

from .resolve import ModelSpec, resolve_model

__all__ = ["ModelSpec", "resolve_model"]
