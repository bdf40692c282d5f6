"""Whether a server serves the model that was asked for: by its list of models, and by its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from kvsuite.errors import UserError
from kvsuite.models import smollm2
from kvsuite.models.resolve import ModelSpec

from .endpoint import Endpoint
from .failure import Refused, ServerFailed

MODELS = "/v1/models"
#: plain enough for every tokenizer to agree with its own other versions
_PROBE = "The quick brown fox jumps over 13 lazy dogs, twice."


@dataclass(frozen=True)
class ServedModel:
    """A model as a server lists it.

    Parameters
    ----------
    id
        Its name there.
    names
        All its names: answers carry one of them.
    owner
        Who says that it serves it (``vllm``, ``llamacpp``, ...), ``None`` where nobody does.
    facts
        What else the server says of it.
    """

    id: str
    names: tuple[str, ...]
    owner: str | None
    facts: Mapping[str, Any]


def find_model(endpoint: Endpoint, spec: ModelSpec, named: str | None) -> ServedModel:
    """The model on the server: the one that has the name, or one of the names of ``spec``.

    Raises
    ------
    ServerFailed
        If it serves others, or its answer is no list of models.
    """
    listed = _listed(endpoint)
    if named is not None:
        found = [one for one in listed if named in one.names]
    else:
        wanted = {_plain(name) for name in _names_of(spec)}
        found = [one for one in listed if wanted & {_plain(name) for name in one.names}]
    if not found:
        served = endpoint.shown(", ".join(one.id for one in listed)) or "none"
        asked = f"--kv-model={spec.request}" if named is None else f"--kv-server-model={named}"
        raise ServerFailed(
            f"{asked}: the server at {endpoint.url} serves another model: {served}; name the model that it serves, or, if it "
            "is the same under another name, give that as --kv-server-model"
        )
    return found[0]


def any_model(endpoint: Endpoint) -> ServedModel:
    """The first model on the list, whichever it is; errors as of `find_model`."""
    found = _listed(endpoint)
    if not found:
        raise ServerFailed(f"{endpoint.url}{MODELS}: no model is served")
    return found[0]


def require_tokenizer(endpoint: Endpoint, model: ServedModel, tokenizer: Any) -> str:
    """Compare the server's tokenizer with the model's on a probe; in words, what came out.

    Raises
    ------
    ServerFailed
        If they make different tokens: it is another model.
    """
    if tokenizer is None:
        return "not compared: the model has no tokenizer here"
    body = {"model": model.id, "prompt": _PROBE, "content": _PROBE, "add_special": False, "add_special_tokens": False}
    try:
        tokens = endpoint.post("/tokenize", body)["tokens"]
    except (Refused, ServerFailed, KeyError, TypeError):
        return "not compared: the server does not tokenize"
    ours = [int(token) for token in tokenizer(_PROBE, add_special_tokens=False)["input_ids"]]
    if tokens != ours:
        raise ServerFailed(
            f"the server at {endpoint.url} makes other tokens of a text than the tokenizer of --kv-model: {model.id} is "
            "another model; name the one that it serves"
        )
    return "the same tokens of a probe"


def software(endpoint: Endpoint, model: ServedModel) -> str:
    """What serves, with its version where it tells one."""
    for path, field in (("/version", "version"), ("/props", "build_info")):
        with contextlib.suppress(Refused, ServerFailed, KeyError, TypeError):
            return endpoint.shown(f"{model.owner or 'server'} {endpoint.get_json(path)[field]}")
    return endpoint.shown(f"{model.owner or 'server'} of unknown version")


def _listed(endpoint: Endpoint) -> list[ServedModel]:
    try:
        return [_model(entry) for entry in endpoint.get_json(MODELS)["data"]]
    except Refused as refused:
        raise ServerFailed(
            f"{endpoint.url}{MODELS}: {refused}; is it a server that speaks OpenAI's protocol?"
        ) from None
    except (KeyError, TypeError, AttributeError):
        raise ServerFailed(f"{endpoint.url}{MODELS}: the answer is no list of models") from None


def _model(entry: Mapping[str, Any]) -> ServedModel:
    name, aliases = str(entry["id"]), [str(one) for one in entry.get("aliases") or ()]
    owner = entry.get("owned_by")
    return ServedModel(name, tuple(dict.fromkeys([name, *aliases])), None if owner is None else str(owner), dict(entry))


def _names_of(spec: ModelSpec) -> Sequence[str]:
    own = [smollm2.GGUF_NAME, smollm2.NAME] if spec.kind == "smollm2" else []
    with contextlib.suppress(UserError):
        own += [PurePath(spec.source).name]
    return [spec.request, spec.label, spec.source, *own]


def _plain(name: str) -> str:
    """A name without what differs from place to place: folders, the organisation, the ending, case, signs."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold().removesuffix(".gguf")
    return "".join(sign for sign in last if sign.isalnum())
