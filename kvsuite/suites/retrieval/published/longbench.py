"""LongBench's files: Bai et al. 2023, LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvsuite.errors import CaseInvalid, UserError

from .longbench_scores import (
    classification_score,
    code_similarity,
    count_score,
    paragraph_number,
    qa_f1,
    qa_f1_zh,
    retrieval_score,
    retrieval_score_zh,
    rouge_l,
    rouge_l_zh,
)
from .task_file import OPTION, FittedPrompt, Prompt, TaskFile, refused, text_of, texts_of

INSTALL = "pip install 'kvsuite[longbench]'"
#: score of an output by one right answer, told all classes
Rule = Callable[[str, str, Sequence[str]], float]


@dataclass(frozen=True)
class Dataset:
    """How one data set is asked and scored, as published.

    Parameters
    ----------
    new_tokens
        Tokens that are generated, at most.
    rule
        Scores an output.
    needs
        Packages that the rule comes from.
    first_line
        Whether the first line of an output alone counts.
    marker
        What stands before the number of a paragraph in a right answer.
    """

    new_tokens: int
    rule: Rule
    needs: tuple[str, ...] = ()
    first_line: bool = False
    marker: str = ""


_QA, _QA_ZH, _SUMMARY, _SUMMARY_ZH = qa_f1, qa_f1_zh, rouge_l, rouge_l_zh
DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset(128, _QA),
    "qasper": Dataset(128, _QA),
    "multifieldqa_en": Dataset(64, _QA),
    "multifieldqa_zh": Dataset(64, _QA_ZH, ("jieba",)),
    "hotpotqa": Dataset(32, _QA),
    "2wikimqa": Dataset(32, _QA),
    "musique": Dataset(32, _QA),
    "dureader": Dataset(128, _SUMMARY_ZH, ("rouge", "jieba")),
    "gov_report": Dataset(512, _SUMMARY, ("rouge",)),
    "qmsum": Dataset(512, _SUMMARY, ("rouge",)),
    "multi_news": Dataset(512, _SUMMARY, ("rouge",)),
    "vcsum": Dataset(512, _SUMMARY_ZH, ("rouge", "jieba")),
    "trec": Dataset(64, classification_score, first_line=True),
    "triviaqa": Dataset(32, _QA, first_line=True),
    "samsum": Dataset(128, _SUMMARY, ("rouge",), first_line=True),
    "lsht": Dataset(64, classification_score, first_line=True),
    "passage_count": Dataset(32, count_score),
    "passage_retrieval_en": Dataset(32, retrieval_score, marker="Paragraph "),
    "passage_retrieval_zh": Dataset(32, retrieval_score_zh, marker="段落"),
    "lcc": Dataset(64, code_similarity),
    "repobench-p": Dataset(64, code_similarity),
}


class LongBenchFile(TaskFile):
    """One data set of LongBench.

    Parameters
    ----------
    dataset
        LongBench's name.
    classes
        All classes of each line, by its number; empty where there are none.
    """

    kind: ClassVar[str] = "longbench"

    def __init__(
        self, name: str, path: Path, prompts: Sequence[Prompt], dataset: str, classes: dict[int, list[str]]
    ) -> None:
        self._dataset, self._how, self._classes = dataset, DATASETS[dataset], classes
        super().__init__(name, path, prompts, self._how.new_tokens)

    @property
    def rule(self) -> str:
        return self._how.rule.__name__

    def judge(self, output: str, prompt: Prompt) -> float:
        given = output.lstrip("\n").split("\n")[0] if self._how.first_line else output
        return max(self._how.rule(given, one, self._classes[prompt.line]) for one in prompt.right)

    def ends(self, tokenizer: Any, output: Sequence[int]) -> bool:
        # as published: else a model goes on with dialogues of its own
        return super().ends(tokenizer, output) or (
            self._dataset == "samsum" and len(output) > 1 and "\n" in tokenizer.decode([output[-1]])
        )

    def fit(self, fitted: FittedPrompt, most: int) -> FittedPrompt:
        """Cut out of the middle, so that as much is left of the begin as of the end: the published way."""
        whole = [*fitted.context, *fitted.question]
        if len(whole) <= most:
            return fitted
        half = most // 2
        left = half - len(fitted.question)
        if left < 0:
            raise CaseInvalid(
                f"{OPTION}={self.path}: a question of {len(fitted.question)} tokens is longer than half of the {most} that the "
                f"model's {most + self._new_tokens} leave beside {self._new_tokens} of output; give a model with a longer "
                "context"
            )
        end = len(fitted.context) - left
        return FittedPrompt([*fitted.context[:half], *fitted.context[end:]], fitted.question, cut=end - half)


@functools.cache
def prompt_formats() -> dict[str, str]:
    """LongBench's prompts by data set, with places for ``{context}`` and ``{input}`` (THUDM/LongBench, MIT licence)."""
    found: dict[str, str] = json.loads((Path(__file__).parent / "longbench_prompts.json").read_text(encoding="utf-8"))
    return found


def is_longbench(found: dict[str, Any]) -> bool:
    """Whether a line is LongBench's."""
    return {"input", "context", "answers", "dataset", "all_classes"} <= set(found)


def read_longbench(path: Path, lines: Sequence[tuple[int, dict[str, Any]]]) -> LongBenchFile:
    """One file's data set.

    Raises
    ------
    UserError
        If it is none of LongBench's, a line is of another one or has another schema, or a package for its rule is missing.
    """
    typed = text_of(path, lines[0][0], lines[0][1], "dataset")
    dataset = typed.removesuffix("_e")
    if dataset not in DATASETS:
        raise refused(
            path, lines[0][0], f"is of data set {typed!r}, which is none of LongBench's: {', '.join(DATASETS)}"
        )
    missing = [name for name in DATASETS[dataset].needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{OPTION}={path}: scoring {dataset} needs {' and '.join(missing)}; run: {INSTALL}")
    before, _, behind = prompt_formats()[dataset].partition("{context}")
    prompts, classes = [], {}
    for number, found in lines:
        if found.get("dataset") != typed:
            raise refused(path, number, f"is of data set {found.get('dataset')!r}, the first one of {typed!r}")
        context, asked = text_of(path, number, found, "context"), text_of(path, number, found, "input")
        right = texts_of(path, number, found, "answers")
        if DATASETS[dataset].rule is classification_score:
            classes[number] = texts_of(path, number, found, "all_classes")
        else:
            classes[number] = []
        marker = DATASETS[dataset].marker
        if marker and not all(paragraph_number(marker, one) for one in right):
            raise refused(path, number, f"has an answer that names no paragraph as {marker!r} and a number does")
        prompts.append(Prompt(before + context, behind.replace("{input}", asked), right, number))
    return LongBenchFile(f"longbench_{typed}", path, prompts, dataset, classes)
