"""What ends a case on a server that does not do what it is asked."""

from __future__ import annotations


class ServerFailed(RuntimeError):
    """The server is not there, hangs, died, answered with an error, with half an answer, or for another model."""


class Refused(Exception):
    """The server answered a request with a status that says that the request is wrong.

    Parameters
    ----------
    status
        400 to 499.
    message
        What it says of it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
