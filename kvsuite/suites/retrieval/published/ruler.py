"""RULER's files: Hsieh et al. 2024, RULER: What's the Real Context Size of Your Long-Context Language Models?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from kvsuite.errors import UserError

from .task_file import OPTION, FittedPrompt, Prompt, TaskFile, refused, text_of, texts_of

#: tokens that are generated, by the family of a task
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_NAMES = re.compile(r"niah_(?:single|multikey)_\d+|niah_multi(?:value|query)|vt|cwe|fwe|qa_\d+")
# of RULER's chat templates, behind whose last line break no question stands
_TEMPLATE = re.compile(
    r"<\||\[INST\]|<start_of_turn>|\A\s*(?:<s>|<bos>|<BOS_TOKEN>|\[gMASK\])|^\s*(?:assistant|ASSISTANT|Assistant):\s*\Z",
    re.MULTILINE,
)
_CONTROL = re.compile(r"[\x00-\x1f]")


class RulerFile(TaskFile):
    """One task of RULER at one length.

    Parameters
    ----------
    task
        RULER's name, such as ``niah_single_1``.
    """

    kind: ClassVar[str] = "ruler"

    def __init__(self, name: str, path: Path, prompts: Sequence[Prompt], task: str) -> None:
        self._family = task.partition("_")[0]
        super().__init__(name, path, prompts, NEW_TOKENS[self._family])

    @property
    def rule(self) -> str:
        return "string_match_part" if self._family == "qa" else "string_match_all"

    def judge(self, output: str, prompt: Prompt) -> float:
        given = _CONTROL.sub("\n", output.strip()).strip()
        return string_match_part(given, prompt.right) if self._family == "qa" else string_match_all(given, prompt.right)

    def fit(self, fitted: FittedPrompt, most: int) -> FittedPrompt:
        # a RULER of another length is another task
        return fitted


def string_match_all(output: str, right: Sequence[str]) -> float:
    """Share of the right texts that the output has, whatever the case of letters."""
    return sum(one.lower() in output.lower() for one in right) / len(right)


def string_match_part(output: str, right: Sequence[str]) -> float:
    """1 if the output has any of the right texts, whatever the case of letters, else 0."""
    return float(any(one.lower() in output.lower() for one in right))


def is_ruler(found: dict[str, Any]) -> bool:
    """Whether a line is RULER's."""
    return {"index", "input", "outputs"} <= set(found)


def read_ruler(path: Path, lines: Sequence[tuple[int, dict[str, Any]]]) -> RulerFile:
    """One file's task.

    The question is the last line of ``input``; ``answer_prefix``, where a file has it, follows.

    Raises
    ------
    UserError
        If no part of the path names a task of RULER, or a line has another schema.
    """
    parts = [path.stem, *(part.name for part in path.resolve().parents)]
    task = next((part for part in parts if _NAMES.fullmatch(part)), None)
    if task is None:
        raise UserError(
            f"{OPTION}={path}: neither the file nor a folder above it is named after a task of RULER, which says how it is "
            "scored; name it niah_single_1, niah_multivalue, vt, cwe, fwe, qa_1, ..."
        )
    prompts = []
    for number, found in lines:
        if isinstance(found.get("index"), bool) or not isinstance(found.get("index"), int):
            raise refused(path, number, "has no whole number 'index'")
        text = text_of(path, number, found, "input")
        if marker := _TEMPLATE.search(text):
            raise refused(
                path, number,
                f"has {marker[0].strip()!r} of a chat template in 'input', so that its question is not known; make the file "
                "with the base template",
            )  # fmt: skip
        if text.endswith("\n"):
            raise refused(path, number, "ends with a line break in 'input', so that no question stands behind it")
        context, _, question = text.rpartition("\n")
        prefix = text_of(path, number, found, "answer_prefix") if "answer_prefix" in found else ""
        if not context.strip() or not question.strip():
            raise refused(
                path, number, "has no line break in 'input' before its question (made with --remove_newline_tab?)"
            )
        prompts.append(Prompt(context, "\n" + question + prefix, texts_of(path, number, found, "outputs"), number))
    # RULER's own layout; numbers elsewhere in a path are dates and the like
    at_length = parts[1:3] == [task, "data"] and parts[3].isascii() and parts[3].isdigit()
    length = parts[3] if at_length else ""
    return RulerFile("_".join(["ruler", task, *([length] if length else [])]), path, prompts, task)
