"""What a published task gives: a score of every sample, by its own rules, behind a cache that was treated first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.engines.capabilities import AnswersQuestions
from kvsuite.errors import CaseInvalid

if TYPE_CHECKING:
    from kvsuite.case import Case
    from kvsuite.engines.engine import Session
    from kvsuite.engines.questions import Answer, Asked
    from kvsuite.engines.results import TokenProgress


@dataclass(frozen=True)
class ScoredTask:
    """A task's samples behind one kind of cache.

    Parameters
    ----------
    scores
        Of every sample, from 0 to 1 and better when higher; ``None`` where the task has no such score.
    rows
        What was answered, a row a sample, in JSON types.
    hashes
        Of each sample: what was asked and what is right.
    contexts
        Tokens of each context that was prefilled and treated.
    kept
        Positions that a layer held of each of them once it was treated, mean over layers.
    longest
        Token ids of the longest context.
    facts
        Of the task and its run, in JSON types, for the record.
    warnings
        What a reader must know.
    reason
        Why there are no scores.
    """

    scores: list[float] | None
    rows: list[dict[str, Any]]
    hashes: list[str]
    contexts: list[int]
    kept: list[float]
    longest: list[int]
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    reason: str = ""


class PublishedTask(ABC):
    """One task by somebody else's rules."""

    #: whose task it is, in cases and records
    kind: ClassVar[str]
    #: whether context and question come in one piece, so that the question is inside what is compressed
    in_one_piece: ClassVar[bool]
    #: in cases, unique in a run
    name: str

    @abstractmethod
    def size(self, count: int) -> tuple[int, int]:
        """Samples of the first ``count`` that there are, and characters of all their prompts."""

    @abstractmethod
    def score(self, asking: Asking, count: int, full: ScoredTask | None = None) -> ScoredTask:
        """Ask the first ``count`` samples, and score what comes back.

        Parameters
        ----------
        asking
            Session and cache.
        count
            Samples at most.
        full
            What the full cache scored, whose rule is taken; ``None`` where it is the full cache that is asked.

        Raises
        ------
        CaseInvalid
            If the model cannot be asked: too long a prompt, or a request that no cache can be compressed for.
        """


class Asking:
    """A session that answers through one kind of cache.

    Parameters
    ----------
    session
        With capability `kvsuite.engines.capabilities.AnswersQuestions`.
    case
        What is done to the cache.
    full
        Whether the full cache in the model's dtype is asked in its place.
    question_seen
        Whether a question is part of what is compressed, all but its last token.
    progress
        Called with contexts done and in all.
    """

    def __init__(
        self,
        session: Session,
        case: Case,
        *,
        full: bool = False,
        question_seen: bool = False,
        progress: TokenProgress | None = None,
    ) -> None:
        self.session = session
        self.tokenizer = session.tokenizer
        self.full = full
        self.question_seen = question_seen
        self._case = case
        self._progress = progress

    @property
    def most_tokens(self) -> int | None:
        """Tokens of prompt and output that the model was trained for, ``None`` if nobody says."""
        trained = self.session.model["trained_length"]
        return None if trained is None else int(trained)

    def answers(self, asked: Sequence[Asked]) -> list[list[Answer]]:
        """Answers to every question, in order; the session is prepared for as long a text as comes.

        Raises
        ------
        CaseInvalid
            If a context is longer than the model takes.
        """
        assert isinstance(self.session, AnswersQuestions)
        longest, steps = max(len(one.context) for one in asked), max(one.steps for one in asked)
        most = self.most_tokens
        over = [len(one.context) + one.steps for one in asked if most and len(one.context) + one.steps > most]
        if over:
            raise CaseInvalid(
                f"task {self._case.workload['task']}: {len(over)} of {len(asked)} prompts are, with what follows them, up to "
                f"{max(over)} tokens long, and the model takes {most}; give a model with a longer context, or a file of "
                "shorter prompts"
            )
        spoken = {"prompt_tokens": longest, "max_new_tokens": steps + 1}
        self.session.prepare(replace(self._case, workload=dict(self._case.workload) | spoken))
        return self.session.answer(asked, full=self.full, progress=self._progress)
