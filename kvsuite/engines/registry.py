"""Engines by name, and the loaded session that cases of one model share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvsuite.case import Case
from kvsuite.errors import CaseSkipped, UserError

from .engine import Engine, EngineSettings, Session

ENGINES = ("hf", "nano", "mlc")


def get_engine(name: str, **settings: Any) -> Engine:
    """Build engine ``name`` with settings of its own; imports its runtime only then."""
    if name == "hf":
        try:
            from .hf.engine import HfEngine
        except ImportError as error:
            raise CaseSkipped(f"engine hf: {error}; pip install kvsuite") from error

        return HfEngine()
    if name == "nano":
        try:
            from .nano.engine import NanoEngine
        except ImportError as error:
            raise CaseSkipped(f"engine nano: {error}; pip install kvsuite") from error

        return NanoEngine()
    if name == "mlc":
        from .mlc.engine import MlcEngine

        return MlcEngine(**settings)
    raise UserError(f"--kv-engine={name}: unknown engine; use auto, {', '.join(ENGINES)}")


class SessionPool:
    """Keeps one session alive: consecutive cases of one model, device and dtype share it.

    Parameters
    ----------
    mlc
        Settings of engine `mlc` (`kvsuite.engines.mlc.engine.MlcEngine`).
    settings
        Fields of `EngineSettings`, for `Engine.load`.
    """

    def __init__(self, *, mlc: Mapping[str, Any] | None = None, **settings: Any) -> None:
        self._own = {"mlc": dict(mlc or {})}
        self._settings = EngineSettings(**settings)
        self._key: tuple[Any, ...] | None = None
        self._session: Session | None = None

    def get(self, case: Case) -> Session:
        """Session for ``case``, loaded if need be.

        Raises
        ------
        CaseSkipped
            If the engine cannot use the device here.
        """
        key = (case.engine, case.model, case.quantization, case.device, case.dtype)
        if self._session is None or self._key != key:
            self.close()
            self._session, self._key = self.beside(case), key
        return self._session

    def beside(self, case: Case, **overrides: Any) -> Session:
        """A session of its own for ``case``, which the caller closes: a second model beside the shared one.

        Raises
        ------
        CaseSkipped
            If the engine cannot use the device here.
        """
        engine = get_engine(case.engine, **self._own.get(case.engine, {}))
        reason = engine.unavailable(case.device)
        if reason:
            raise CaseSkipped(reason)
        return engine.load(case, replace(self._settings, **overrides))

    @property
    def current(self) -> Session | None:
        """The session that is up."""
        return self._session

    def close(self) -> None:
        """Close the session, if there is one."""
        if self._session is not None:
            self._session.close()
        self._session = self._key = None
