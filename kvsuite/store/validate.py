"""Validation against the JSON Schemas of the package, offline."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from kvsuite.errors import UserError
from kvsuite.record import schema

from .shapes import is_record

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator


def validate(kind: str, document: object, where: str) -> None:
    """Check ``document`` against one of the package's JSON Schemas.

    Parameters
    ----------
    kind
        ``"record"``, ``"run"`` or ``"report"``.
    document
        Parsed JSON.
    where
        What the message calls the document, usually its path.

    Raises
    ------
    UserError
        Naming the place inside the document and what is wrong with it.
    """
    records = document.get("records") if kind == "report" and isinstance(document, dict) else None
    if isinstance(document, dict) and isinstance(records, list):
        _validate(kind, document | {"records": []}, where)
        for index, record in enumerate(records):
            if not is_record(record):
                _validate("record", record, where, of=kind, below=("records", index))
    elif kind != "record" or not is_record(document):
        _validate(kind, document, where)


def _validate(kind: str, document: object, where: str, *, of: str | None = None, below: tuple[Any, ...] = ()) -> None:
    """By the schema, which is slow; ``below`` is the place of the document in a larger one of the kind ``of``."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator(kind).iter_errors(document))
    if error is not None:
        place = "/".join(str(part) for part in (*below, *error.absolute_path)) or "top level"
        raise UserError(
            f"{where}: not a valid {of or kind}, at {place}: {_shorten(error.message)}; correct or re-run the case"
        )


@cache
def _validator(kind: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    parts = [schema(name) for name in ("record", "run", "report")]
    registry: Registry[Any] = Registry().with_resources(
        [(part["$id"], Resource.from_contents(part)) for part in parts],
    )
    return Draft202012Validator(schema(kind), registry=registry)


def _shorten(text: str, width: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
