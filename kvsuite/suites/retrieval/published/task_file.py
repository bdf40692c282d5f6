"""Local files of RULER and LongBench: JSON lines in their published form, of which a broken one is named by its number."""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.case import digest
from kvsuite.engines.questions import Asked, Question
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.suites.retrieval.samples import first_tokens

from .published_task import Asking, PublishedTask, ScoredTask

OPTION = "--kv-tasks-path"


@dataclass(frozen=True)
class Prompt:
    """One sample as text.

    Parameters
    ----------
    context
        What is prefilled and treated.
    question
        What follows it, the begin of the answer included.
    right
        Right answers.
    line
        Number in the file, from 1.
    """

    context: str
    question: str
    right: Sequence[str]
    line: int


@dataclass(frozen=True)
class FittedPrompt:
    """One prompt in tokens, and how many of them were cut out of its middle."""

    context: list[int]
    question: list[int]
    cut: int = 0


class TaskFile(PublishedTask):
    """The samples of one file.

    Parameters
    ----------
    name
        In cases.
    path
        Of the file.
    prompts
        Its samples.
    new_tokens
        Tokens that are generated, at most.
    """

    in_one_piece = False

    def __init__(self, name: str, path: Path, prompts: Sequence[Prompt], new_tokens: int) -> None:
        self.name, self.path = name, path
        self._prompts, self._new_tokens = prompts, new_tokens

    @abstractmethod
    def judge(self, output: str, prompt: Prompt) -> float:
        """Score of an output, from 0 to 1."""

    @abstractmethod
    def fit(self, fitted: FittedPrompt, most: int) -> FittedPrompt:
        """A prompt of no more than ``most`` tokens; returned as it is where the benchmark shortens none."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """Name of the scoring rule."""

    def ends(self, tokenizer: Any, output: Sequence[int]) -> bool:
        """Whether an output is complete."""
        return bool(output[-1] == tokenizer.eos_token_id)

    def size(self, count: int) -> tuple[int, int]:
        used = self._prompts[:count]
        return len(used), sum(len(one.context) + len(one.question) for one in used)

    def score(self, asking: Asking, count: int, full: ScoredTask | None = None) -> ScoredTask:
        prompts, most = self._prompts[:count], asking.most_tokens
        fitted = [_tokens(asking.tokenizer, prompt) for prompt in prompts]
        if most is not None:
            fitted = [self.fit(one, most - self._new_tokens) for one in fitted]
        asked = [self._asked(asking, one) for one in fitted]
        answers = [found[0] for found in asking.answers(asked)]
        texts = [str(asking.tokenizer.decode(one.output, skip_special_tokens=True)) for one in answers]
        scores = [self.judge(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        cut = [one.cut for one in fitted if one.cut]
        rows = [
            {
                "sample": index,
                "line": prompt.line,
                "right": list(prompt.right),
                "answer": text,
                "score": score,
                "context_tokens": len(one.context),
                "question_tokens": len(one.question),
                "cut_tokens": one.cut,
                "kept": answer.kept,
            }
            for index, (prompt, one, answer, text, score) in enumerate(
                zip(prompts, fitted, answers, texts, scores, strict=True)
            )
        ]
        return ScoredTask(
            scores=scores,
            rows=rows,
            hashes=[
                digest([one.context, one.question, list(prompt.right)])
                for prompt, one in zip(prompts, fitted, strict=True)
            ],
            contexts=[len(one.context) for one in asked],
            kept=[one.kept for one in answers],
            longest=list(max(asked, key=lambda one: len(one.context)).context),
            facts={
                "file": self.path.name,
                "score": self.rule,
                "max_new_tokens": self._new_tokens,
                "samples": len(prompts),
                "samples_of": len(self._prompts),
                "prompts_cut": len(cut),
            },
            warnings=[
                f"{len(cut)} of {len(prompts)} prompts are longer than the {most - self._new_tokens} tokens that the model's "
                f"{most} leave beside {self._new_tokens} of output: up to {max(cut)} tokens were cut out of their middle, as "
                "LongBench does"
            ]
            if cut and most is not None
            else [],
        )

    def _asked(self, asking: Asking, fitted: FittedPrompt) -> Asked:
        ends = functools.partial(self.ends, asking.tokenizer)
        context, question = fitted.context, fitted.question
        if asking.question_seen:
            context, question = [*context, *question[:-1]], question[-1:]
        return Asked(context, (Question(question, (), self._new_tokens, ends),))


def _tokens(tokenizer: Any, prompt: Prompt) -> FittedPrompt:
    """Tokens of a prompt, split where the question begins.

    Where the tokenizer joins the end of the context and the begin of the question they are split each by itself: the context is
    prefilled before the question is known.
    """
    context = _ids(tokenizer, prompt.context)
    whole = _ids(tokenizer, prompt.context + prompt.question)
    question = whole[len(context) :] if whole[: len(context)] == context else _ids(tokenizer, prompt.question)
    if not context or not question:
        raise CaseInvalid(f"{OPTION}: line {prompt.line} has no context or no question; mend the file")
    return FittedPrompt([*first_tokens(tokenizer), *context], question)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(one) for one in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSON-lines file with the numbers of their lines; empty lines are none.

    Raises
    ------
    UserError
        Naming file and line of what is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise refused(path, number, f"is no JSON ({error})") from error
                if not isinstance(found, dict):
                    raise refused(path, number, f"is a JSON {type(found).__name__} and no object")
                yield number, found
    except UnicodeDecodeError as error:
        raise UserError(
            f"{OPTION}={path}: is no UTF-8 text ({error.reason} at byte {error.start}); give JSON lines"
        ) from error
    except OSError as error:
        raise UserError(f"{OPTION}={path}: cannot be read ({error.strerror}); give a file of JSON lines") from error


def refused(path: Path, line: int, reason: str) -> UserError:
    """The error for one line of a file."""
    return UserError(f"{OPTION}={path}: line {line} {reason}; mend the line, or give another file")


def text_of(path: Path, line: int, found: Mapping[str, Any], key: str) -> str:
    """The text of a field that every line has."""
    value = found.get(key)
    if not isinstance(value, str):
        raise refused(path, line, f"has no text {key!r}" if value is None else f"has {key!r} that is no text")
    _require_encodable(path, line, key, value)
    return value


def texts_of(path: Path, line: int, found: Mapping[str, Any], key: str) -> list[str]:
    """The texts of a field that every line has, one or more."""
    value = found.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise refused(path, line, f"has no list of texts {key!r}")
    for one in value:
        _require_encodable(path, line, key, one)
        if not one.strip():
            # part of every output, so that every cache would be right
            raise refused(path, line, f"has an empty text in {key!r}")
    return value


def _require_encodable(path: Path, line: int, key: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise refused(path, line, f"has half a character (\\u{code:04x}) in {key!r}") from error
