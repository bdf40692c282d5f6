"""What some engines can do and others cannot: a session has a capability if it has its members.

A suite asks with `lacking` before it uses one; what is missing is a reason in the record, never another method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvsuite.errors import CaseInvalid
from kvsuite.meters.quality import TokenScores
from kvsuite.models.images import ImagePixels, ImageShape
from kvsuite.workloads.windows import Window

from .questions import Answer, Asked
from .results import Served, ServeRequest, TakeRow, TokenProgress, WholeScores, WindowProgress, WindowScores

if TYPE_CHECKING:
    from kvsuite.meters.divergence import TokenDivergence

    from .engine import Session


@runtime_checkable
class AppliesPolicy(Protocol):
    """Applies a cache policy or a press: `Session.prepare` takes cases that name one."""

    @property
    def ratio_requested(self) -> float | None:
        """Fraction removed that the prepared case asks for, ``None`` where it asks for sizes."""
        ...


@runtime_checkable
class ScoresThroughCache(Protocol):
    """Gives teacher-forced losses of a text through the cache as the prepared case treats it."""

    def score(
        self, tokens: Sequence[int], protocol: str, prefix: int, progress: TokenProgress | None = None
    ) -> TokenScores:
        """Losses of ``tokens`` by ``protocol`` (docs/protocols.md), of which the first ``prefix`` are its prompt."""
        ...

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        """Losses of the same tokens from position ``first`` on by one teacher-forced forward with the full cache."""
        ...


@runtime_checkable
class GivesLogits(Protocol):
    """Hands out the logits behind the losses of `ScoresThroughCache`, of the prepared case or of the full cache."""

    def score_rows(
        self,
        tokens: Sequence[int],
        protocol: str,
        prefix: int,
        take: TakeRow,
        *,
        full: bool,
        progress: TokenProgress | None = None,
    ) -> TokenScores:
        """As `ScoresThroughCache.score`; ``take`` is told each scored row: its index from 0, and logits ``[1, vocab]``.

        Parameters
        ----------
        full
            Through the full cache in the model's dtype, served in the same way, in the place of the case's.
        """
        ...


@runtime_checkable
class AnswersQuestions(Protocol):
    """Answers questions from the cache of a context: prefill, then the prepared case's method, then the question."""

    def answer(
        self, asked: Sequence[Asked], *, full: bool, progress: TokenProgress | None = None
    ) -> list[list[Answer]]:
        """Answers to every question, in order.

        Parameters
        ----------
        asked
            Contexts and their questions. The method goes on acting as in decoding while a question is fed.
        full
            Through the full cache in the model's dtype, in the place of the case's.
        progress
            Called with contexts done and in all.
        """
        ...


@runtime_checkable
class ScoresInOnePass(Protocol):
    """Gives losses of a text by one forward pass whose attention reads what the cache of the case stores."""

    def score_whole(self, tokens: Sequence[int], take: TakeRow, *, full: bool) -> WholeScores:
        """Losses of ``tokens[1:]``; ``take`` is told each row: its index from 0, and logits ``[1, vocab]``.

        Parameters
        ----------
        full
            Through the full cache in the model's dtype, in the place of the case's.
        """
        ...

    def planned_whole_bytes(self, tokens: int) -> int:
        """Bytes that the cache of the prepared case takes of a text of so many tokens, as predicted."""
        ...


@runtime_checkable
class ScoresWindows(Protocol):
    """Gives teacher-forced losses of token windows, each a stream of its own."""

    def score_windows(
        self,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> WindowScores:
        """Losses of the targets of ``windows`` (`kvsuite.workloads.windows`).

        Of a prepared design point the limits hold: a token sees what the sliding window and the sinks leave.
        """
        ...


@runtime_checkable
class ComparesWindows(Protocol):
    """Compares two loaded models position by position: that takes the logits of both."""

    def compare_windows(
        self,
        reference: Session,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> TokenDivergence:
        """Losses of this session and of ``reference``, another one of this engine, and their divergence, by position.

        Raises
        ------
        UserError
            If the two do not share a vocabulary.
        """
        ...


@runtime_checkable
class ServesUnderLoad(Protocol):
    """Serves requests that come at their times and share one pool, and tells what became of each."""

    def serve_under_load(self, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served:
        """Serve requests as the prepared case says: through its pool, with its policy.

        Parameters
        ----------
        requests
            In any order. Each enters when its time has come; one that the loop takes up late is late.
        concurrency
            Closed loop: so many requests are under way at a time, and the next one comes when one is over, which is its
            arrival then. The requests' own arrivals must be 0.

        Returns
        -------
        Served
            With `Served.requests` and `Served.steps`.

        Raises
        ------
        RuntimeError
            If a request could not be served to its end.
        """
        ...


@runtime_checkable
class ScoresOutput(Protocol):
    """Serves under load, and gives log-probabilities of output that it chose or that was forced (`ServeRequest.scored`)."""

    def serve_dense(self, requests: Sequence[ServeRequest]) -> Served:
        """Serve the same requests with their full caches: no policy, no arrivals, and the largest pool that they need."""
        ...


@runtime_checkable
class ReadsImages(Protocol):
    """Serves requests with images (`ServeRequest.images`), where its model reads any."""

    @property
    def image_shape(self) -> ImageShape | str:
        """What the model makes of an image, or why it can be given none."""
        ...

    def read_image(self, path: str, *, named: str) -> ImagePixels:
        """An image from a file (`kvsuite.models.image_files.read_image`); ``named`` is the option and its value."""
        ...


#: in words, for reasons
_NAMES: dict[type, str] = {
    AppliesPolicy: "applies no cache policies",
    ScoresThroughCache: "returns no losses of a text through its cache",
    GivesLogits: "hands out no logits of a text through its cache",
    AnswersQuestions: "answers no questions from the cache of a context",
    ScoresInOnePass: "hands out no logits of a text that one forward pass took through its cache",
    ScoresWindows: "returns no losses of a given text",
    ComparesWindows: "returns no logits to compare",
    ScoresOutput: "takes no forced output and returns no losses of it",
    ReadsImages: "takes text alone; images are served by --kv-engine=nano",
    ServesUnderLoad: "serves all requests at once, not by their arrivals; use --kv-engine=nano",
}


def lacking(session: Session, capability: type) -> str | None:
    """Why ``session`` does not have ``capability``, one of the protocols here; ``None`` if it has it."""
    if isinstance(session, capability):
        return None
    return session.lacks.get(capability) or f"this engine {_NAMES.get(capability, f'lacks {capability.__name__}')}"


def refuse_load(requests: Sequence[ServeRequest], engine: str, *, reads_images: bool = False) -> None:
    """Refuse what only a session that serves under load does, and images where the engine takes text alone.

    Raises
    ------
    CaseInvalid
        If a request comes later than at once, its output is forced or scored, or it has images.
    """
    if not reads_images:
        refuse_images(requests, engine)
    if any(one.arrival_s for one in requests):
        raise CaseInvalid(f"engine {engine} serves all requests at once, not by their arrivals; use --kv-engine=nano")
    _refuse_scored(requests, engine)


def require_plain(requests: Sequence[ServeRequest], engine: str, concurrency: int | None) -> None:
    """Refuse what an engine does not serve under load that takes text alone and scores none of it.

    Raises
    ------
    CaseInvalid
        If a request has images, or its output is forced or scored.
    ValueError
        If a closed loop is given arrivals.
    """
    refuse_images(requests, engine)
    _refuse_scored(requests, engine)
    require_loop(requests, concurrency)


def require_loop(requests: Sequence[ServeRequest], concurrency: int | None) -> None:
    """Refuse arrivals in a closed loop (of ``concurrency`` requests at a time), where requests come as others end.

    Raises
    ------
    ValueError
        If a closed loop is given arrivals, or is of no request.
    """
    if concurrency is not None and (concurrency < 1 or any(one.arrival_s for one in requests)):
        raise ValueError(f"concurrency={concurrency}: at least 1, and requests without arrivals of their own")


def refuse_images(requests: Sequence[ServeRequest], engine: str) -> None:
    """Refuse images on an engine that takes text alone.

    Raises
    ------
    CaseInvalid
        If a request has one.
    """
    if any(one.images for one in requests):
        raise CaseInvalid(f"engine {engine} takes text alone, no images; use --kv-engine=nano")


def _refuse_scored(requests: Sequence[ServeRequest], engine: str) -> None:
    if any(one.scored for one in requests):
        raise CaseInvalid(f"engine {engine} takes no forced output and returns no losses of it; use --kv-engine=nano")
