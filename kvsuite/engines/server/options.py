"""Options of engine `server`."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated
from urllib.parse import urlsplit

from kvsuite.errors import UserError
from kvsuite.options.option import Option, OptionGroup, text, whole_number


def server_url(typed: str) -> str:
    """The address before ``/v1``: ``http://host:8000``."""
    try:
        parts = urlsplit(typed.strip())
        known = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        known = False
    if known and (parts.username is not None or parts.password is not None or parts.query or parts.fragment):
        # what was typed may hold a key, and is not repeated
        raise UserError(
            "--kv-server-url: has a user, a password or a query in it; give the address alone, and a key in the environment "
            "variable KV_SERVER_KEY"
        )
    if not known:
        raise ValueError("no address of a server")
    return typed.strip().rstrip("/").removesuffix("/v1").rstrip("/")


class ServerOptions(OptionGroup, frozen=True, kw_only=True):
    """Where the server is, what it calls the model, and how long it may take."""

    # fmt: off
    server_url: Annotated[str | None, Option(
        server_url, "",
        "Address of a server that speaks OpenAI's protocol (vLLM, llama.cpp, SGLang, ...): engine server. A key is read from "
        "the environment variable KV_SERVER_KEY.",
        example="http://localhost:8000",
    )]
    server_model: Annotated[str | None, Option(
        text, "",
        "What the server calls the model of --kv-model, where that is another name: engine server.",
        example="my-llama",
    )]
    server_timeout: Annotated[int, Option(
        whole_number(1, 10**7), "300",
        "Seconds that a request waits for its first or next token, or an answer, before the server is taken for hanging and "
        "the case fails: engine server.",
    )]
    # fmt: on
