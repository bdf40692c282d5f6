"""Engines by name, from the entry-point group ``kvsuite.engines``, and the loaded session that cases of one model share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from kvsuite.case import Case
from kvsuite.entry_points import ENGINES, described, find, load
from kvsuite.errors import CaseSkipped, UserError
from kvsuite.options.resolve import Options

from .engine import Engine, EngineSettings, Session


def engine_names() -> tuple[str, ...]:
    """The installed engines; none is imported."""
    return tuple(find(ENGINES))


def get_engine(name: str, options: Options | None = None) -> Engine:
    """Engine ``name``, with the options of the run or the defaults; its module is imported only now.

    Raises
    ------
    UserError
        If there is no such engine, or what its entry point names is none: with package, object and mend.
    """
    return _engine_class(name)(options)


@cache
def _engine_class(name: str) -> type[Engine]:
    entries = find(ENGINES)
    if name not in entries:
        raise UserError(f"--kv-engine={name}: unknown engine; use auto, {', '.join(entries)}")
    return _checked(entries[name], load(entries[name]))


def _checked(entry: EntryPoint, found: object) -> type[Engine]:
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise UserError(f"{described(entry)}: is no subclass of kvsuite.engines.engine.Engine; name one")
    if missing := sorted(found.__abstractmethods__):
        raise UserError(f"{described(entry)}: lacks {', '.join(missing)}; an engine has all members of Engine")
    if getattr(found, "name", None) != entry.name:
        raise UserError(f"{described(entry)}: the name of the class is another one; write name = {entry.name!r} there")
    return found


class SessionPool:
    """Keeps one session alive: consecutive cases of one model, device and dtype share it.

    Parameters
    ----------
    options
        Of the run: what engines are told, and what they read themselves; the defaults if left out.
    settings
        Fields of `EngineSettings` in the place of the options.
    """

    def __init__(self, options: Options | None = None, **settings: Any) -> None:
        self._options = options
        common = EngineSettings() if options is None else EngineSettings.of(options)
        self._settings = replace(common, **settings)
        self._engines: dict[str, Engine] = {}
        self._key: tuple[Any, ...] | None = None
        self._session: Session | None = None

    def engine(self, name: str) -> Engine:
        """The engine of that name, the same for all cases.

        Raises
        ------
        UserError
            If there is none.
        """
        if name not in self._engines:
            self._engines[name] = get_engine(name, self._options)
        return self._engines[name]

    def versions(self, name: str) -> dict[str, str]:
        """`Engine.version`, with the error in the place of what an engine fails to tell: a record comes out all the same.

        Raises
        ------
        UserError
            If there is no such engine.
        """
        try:
            return self.engine(name).version()
        except UserError:
            raise
        except Exception as error:  # the engine may be somebody else's
            return {"unknown": f"{type(error).__name__}: {error}"}

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
        engine = self.engine(case.engine)
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
