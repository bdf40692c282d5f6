"""The shared object of the pinned wheel: found, checked, and its log caught."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.cache_formats.ggml_format import GGML_TYPES
from kvsuite.errors import UserError

from .declarations import CONTEXT_DEFAULTS, DECLARATIONS, MODEL_DEFAULTS, TYPE_NUMBERS

PACKAGE, VERSION = "xllamacpp", "2026.10.11549"
INSTALL = f"pip install {PACKAGE}=={VERSION} cffi"
# of enum ggml_log_level
_DEBUG, _ERROR = 1, 4


def missing_library() -> str | None:
    """Why llama.cpp cannot be used here, with the line that installs it; ``None`` if it can. Nothing is loaded."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"engine llamacpp needs llama.cpp's wheel; {INSTALL}"
    if found != VERSION:
        return f"engine llamacpp knows the C interface of {PACKAGE} {VERSION}, and {found} is installed; {INSTALL}"
    if importlib.util.find_spec("cffi") is None:
        return f"engine llamacpp calls C through cffi; {INSTALL}"
    return None


@dataclass(frozen=True)
class LogLine:
    """What llama.cpp said.

    Parameters
    ----------
    is_error
        Whether it says that something failed.
    text
        Without the end of the line.
    """

    is_error: bool
    text: str


class Library:
    """llama.cpp's functions, behind declarations that are compared with what it does.

    Parameters
    ----------
    path
        Of the shared object.
    declarations
        Of its functions and structs.

    Attributes
    ----------
    c
        The functions.
    ffi
        Makes and reads C values.

    Raises
    ------
    UserError
        If it cannot be loaded, lacks a function, or a declared struct or type is not what it has.
    """

    def __init__(self, path: Path, declarations: str = DECLARATIONS) -> None:
        import cffi

        self.ffi: Any = cffi.FFI()
        self.ffi.cdef(declarations)
        try:
            self.c: Any = self.ffi.dlopen(str(path))
        except OSError as error:
            raise UserError(f"--kv-engine=llamacpp: {path} cannot be loaded ({error}); {INSTALL}") from error
        self._lines: list[LogLine] = []
        # kept as long as the library: llama.cpp calls it from any thread
        self._callback = self.ffi.callback("ggml_log_callback", self._heard)
        try:
            self.c.llama_log_set(self._callback, self.ffi.NULL)
            self._check_layouts()
            self.c.llama_backend_init()
        except AttributeError as error:
            raise UserError(f"--kv-engine=llamacpp: {path} lacks a function ({error}); {INSTALL}") from error

    @contextmanager
    def logged(self) -> Iterator[list[LogLine]]:
        """What llama.cpp says meanwhile; nothing of it reaches the terminal, then or later."""
        lines: list[LogLine] = []
        self._lines = lines
        # somebody else who uses the wheel in this process has a callback of his own
        self.c.llama_log_set(self._callback, self.ffi.NULL)
        yield lines

    def _heard(self, level: int, text: Any, user_data: Any) -> None:
        # of a single context it tells thousands of debug lines
        if level != _DEBUG and len(self._lines) < 10_000:
            said = self.ffi.string(text).decode(errors="replace").strip()
            if said:
                self._lines.append(LogLine(level == _ERROR, said))

    def _check_layouts(self) -> None:
        """Compare structs with their defaults and types with their names: a field of another width moves all behind it."""
        for struct, expected, found in (
            ("llama_context_params", CONTEXT_DEFAULTS, self.c.llama_context_default_params()),
            ("llama_model_params", MODEL_DEFAULTS, self.c.llama_model_default_params()),
        ):
            self._check_struct(struct, expected, found)
        for name, number in TYPE_NUMBERS.items():
            said = self.ffi.string(self.c.ggml_type_name(number)).decode(errors="replace")
            block = int(self.c.ggml_blck_size(number)), int(self.c.ggml_type_size(number))
            if (said, block) != (name, GGML_TYPES[name]):
                raise _other(f"its type {number} is {said} with blocks {block}, not {name} with {GGML_TYPES[name]}")

    def _check_struct(self, struct: str, expected: Mapping[str, float], found: Any) -> None:
        for name, kind in self.ffi.typeof(f"struct {struct}").fields:
            if kind.type.kind == "array":
                continue
            value = getattr(found, name)
            is_right = value == expected[name] if kind.type.kind == "primitive" else value == self.ffi.NULL
            if not is_right:
                raise _other(f"{struct}.{name} is {value} by default, not {expected.get(name, 'NULL')}")


@functools.cache
def library() -> Library:
    """llama.cpp, loaded once.

    Raises
    ------
    UserError
        If it is not there, is another version, or is not what is declared.
    """
    if reason := missing_library():
        raise UserError(f"--kv-engine=llamacpp: {reason}")
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        for path in sorted(Path(folder).glob(f"{PACKAGE}*.so")):
            return Library(path)
    raise UserError(f"--kv-engine=llamacpp: {PACKAGE} {VERSION} holds no shared object here; {INSTALL}")


def failure(lines: list[LogLine]) -> str:
    """What llama.cpp said was wrong, the first of it."""
    errors = [line.text for line in lines if line.is_error]
    told = [text for text in errors if "failed to load model" not in text] or errors
    return told[0] if told else "llama.cpp does not say why"


def _other(what: str) -> UserError:
    return UserError(f"--kv-engine=llamacpp: the library is not {PACKAGE} {VERSION}: {what}; {INSTALL}")
