"""The `mlc` engine: where it runs, and loading a session."""

from __future__ import annotations

from typing import Any, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.errors import CaseSkipped

from .install import MlcInstall, find_install, missing_device
from .session import MlcSession


class MlcEngine(Engine):
    """Serves models that MLC-LLM compiled, in processes of their own.

    Parameters
    ----------
    python
        Interpreter that has mlc_llm, ``None`` for this one.
    settings
        Of its sessions: ``model_lib``, ``timeout_s``, ``compile_timeout_s``.
    """

    name: ClassVar[str] = "mlc"

    def __init__(self, *, python: str | None = None, **settings: Any) -> None:
        self._python, self._settings = python, settings
        self._install: MlcInstall | None = None

    def unavailable(self, device: str) -> str | None:
        try:
            return missing_device(self._find(), device)
        except CaseSkipped as skip:
            return str(skip)

    def load(self, case: Case, settings: EngineSettings) -> MlcSession:
        return MlcSession(case, self._find(), settings, **self._settings)

    def _find(self) -> MlcInstall:
        if self._install is None:
            self._install = find_install(self._python)
        return self._install
