"""Case: the identity of what is measured."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_OUTSIDE = re.compile(r"[^A-Za-z0-9_.-]+")


def canonical_json(value: Any) -> str:
    """Serialise ``value`` the same way on every host: sorted keys, no spaces, no NaN.

    Raises
    ------
    ValueError
        If the value holds NaN or an infinity.
    TypeError
        If the value holds anything but JSON types.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return ``sha256:<hex>`` of the canonical JSON of ``value``."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()


def id_token(text: str) -> str:
    """Turn any text into a piece of a pytest id: letters, digits, ``_ . -`` only, never ``=``.

    ``fix32_keep_low_kr=0.5`` becomes ``fix32_keep_low_kr0.5``: ``-k`` cannot parse ``=``.
    """
    return _OUTSIDE.sub("_", text.replace("=", "")).strip("_")


def model_tag(model: str) -> str:
    """A model as a piece of a file name, by the rule of the design-space CSVs.

    ``HF://mlc-ai/Llama-3-8B-Instruct-q4f16_1-MLC`` is ``Llama-3-8B-Instruct-q4f16_1-MLC``.

    ``scheme://`` and slashes at the end are dropped, the last component stays, and each run of characters outside
    ``A-Za-z0-9._-`` becomes one ``_``. A tag is its own tag.
    """
    path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", model).rstrip("/")
    return _OUTSIDE.sub("_", path.rpartition("/")[2])


@dataclass(frozen=True)
class Case:
    """One fully resolved configuration: everything that decides *what* is measured, nothing about *how often*.

    Parameters
    ----------
    suite
        Suite name, for example ``"compression"``.
    engine
        Resolved engine name (``"hf"``), never ``"auto"``.
    model
        The model as the user asked for it.
    name
        Name of the variant inside its suite; unique there, and what figures and tables show.
    device, dtype
        As requested, resolved: ``"cpu"``, ``"cuda:0"``; ``"float32"``, ``"bfloat16"``.
    quantization
        Weight format by its MLC or Hugging Face name; ``None`` means as loaded.
    policy
        Cache policy name, ``None`` for the full cache.
    policy_params
        The policy's parameters, JSON types only.
    workload
        Protocol, prompt and output lengths, corpus; JSON types only.
    params
        Other axes of the suite's space, JSON types only.
    partition
        Requested SM partition, ``None`` for the whole device.
    shows_engine
        Whether the engine stands in the id; no part of what is measured.
    """

    suite: str
    engine: str
    model: str
    name: str
    device: str
    dtype: str
    quantization: str | None = None
    policy: str | None = None
    policy_params: Mapping[str, Any] = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    partition: Mapping[str, Any] | None = None
    shows_engine: bool = field(default=True, compare=False)

    def __hash__(self) -> int:
        return hash(digest(self.to_dict()))

    @property
    def id(self) -> str:
        """The pytest id of the case: the engine first, so that ``-k "compression and hf"`` works."""
        name = id_token(self.name)
        return f"{self.engine}-{name}" if self.shows_engine else name

    @property
    def device_kind(self) -> str:
        """``cuda`` for ``cuda:1``."""
        return self.device.partition(":")[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the case as JSON types."""
        return {
            "suite": self.suite,
            "engine": self.engine,
            "model": self.model,
            "name": self.name,
            "quantization": self.quantization,
            "policy": self.policy,
            "policy_params": dict(self.policy_params),
            "workload": dict(self.workload),
            "device": self.device,
            "dtype": self.dtype,
            "params": dict(self.params),
            "partition": None if self.partition is None else dict(self.partition),
        }

    def key(self, *, model_revision: str | None, dataset_revision: str | None) -> str:
        """Hash that names the case across hosts, commits and runs.

        The device index is left out (``cuda:0`` and ``cuda:1`` are the same case), its kind is in.

        Parameters
        ----------
        model_revision
            What identifies the weights (commit, file digest, preset and seed), ``None`` if it could not be known.
        dataset_revision
            Hash of the scored text, ``None`` where no text is scored.
        """
        identity = self.to_dict()
        identity["device"] = self.device_kind
        identity["model_revision"] = model_revision
        identity["dataset_revision"] = dataset_revision
        return digest(identity)
