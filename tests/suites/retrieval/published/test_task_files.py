"""Files of RULER and LongBench: their schemas, what a broken line says, prompts and their split, cuts in the middle, scores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asked_sessions import LONGEST, RECENT, asking, small_model

from kvsuite.case import Case
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.measure.measurement import Measurement
from kvsuite.metrics import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.suites.retrieval.cases import retrieval_cases
from kvsuite.suites.retrieval.published.chosen_tasks import read_task_file
from kvsuite.suites.retrieval.published.longbench import LongBenchFile
from kvsuite.suites.retrieval.published.measure import _put
from kvsuite.suites.retrieval.published.ruler import RulerFile, string_match_all, string_match_part
from kvsuite.suites.retrieval.published.task_file import FittedPrompt
from kvsuite.suites.retrieval.suite import RetrievalSuite

NEEDLE = (
    "A special magic number is hidden within the following text.\nOne of the special magic numbers for {key} is: {value}. The "
    "grass is green.\nWhat is the special magic number for {key} mentioned in the provided text?"
)
PREFIX = " The special magic number for {key} mentioned in the provided text is"


def ruler(**changes: Any) -> dict[str, Any]:
    said = {"key": "wide-river", "value": "7241"}
    line = {
        "index": 0, "input": NEEDLE.format(**said), "outputs": ["7241"], "length": 320, "answer_prefix": PREFIX.format(**said),
    }  # fmt: skip
    return line | changes


def longbench(**changes: Any) -> dict[str, Any]:
    line = {
        "input": "Where does the river rise?", "context": "The river rises in the Black Forest.", "answers": ["Black Forest"],
        "length": 7, "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "1",
    }  # fmt: skip
    return line | changes


def saved(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def cases(**typed: str) -> list[Case]:
    return retrieval_cases(default_options(**({"device": "cpu"} | typed)))


def test_a_prompt_is_split_where_its_question_begins(tmp_path: Path) -> None:
    found = read_task_file(saved(tmp_path / "niah_single_2" / "validation.jsonl", ruler()))
    assert isinstance(found, RulerFile)
    [prompt] = found._prompts
    assert prompt.context.endswith("The grass is green.")
    assert prompt.question.startswith("\nWhat is the special")
    assert prompt.question.endswith(
        "provided text? The special magic number for wide-river mentioned in the provided text is"
    )
    long = read_task_file(saved(tmp_path / "hotpotqa.jsonl", longbench()))
    assert isinstance(long, LongBenchFile)
    [prompt] = long._prompts
    assert prompt.context.endswith("The following are given passages.\nThe river rises in the Black Forest.")
    assert prompt.question.endswith("Question: Where does the river rise?\nAnswer:")


def test_braces_in_a_text_are_no_places(tmp_path: Path) -> None:
    line = longbench(context="{input} {x}", input="{context}?")
    [prompt] = read_task_file(saved(tmp_path / "a.jsonl", line))._prompts
    assert prompt.context.endswith("\n{input} {x}")
    assert "Question: {context}?" in prompt.question


def test_a_question_comes_behind_the_compressed_context_and_inside_it_under_another_name(tmp_path: Path) -> None:
    task = read_task_file(saved(tmp_path / "niah_single_1.jsonl", *(ruler(index=at) for at in range(2))))
    full, ours, seen = (
        task.score(asking(**how), 2) for how in ({}, RECENT, RECENT | {"question_seen": True})
    )  # fmt: skip
    [context] = {row["context_tokens"] for row in full.rows}
    [question] = {row["question_tokens"] for row in full.rows}
    assert context + question == len(ruler()["input"] + ruler()["answer_prefix"])
    assert (full.contexts, full.kept) == ([context] * 2, [context] * 2)
    assert (ours.contexts, ours.kept) == ([context] * 2, [40] * 2)
    # all of the question but its last token is compressed with the context
    assert (seen.contexts, seen.kept) == ([context + question - 1] * 2, [40] * 2)
    built = small_model()
    tokens = built.tokenizer(ruler()["input"] + ruler()["answer_prefix"])["input_ids"]
    for scored, prompt, how in ((full, context, {}), (ours, context, RECENT), (seen, context + question - 1, RECENT)):
        built.prepare(asking(**how)._case)
        output: list[int] = []
        for _ in range(3):
            behind = [*tokens, *output, 0]
            rows: list[Any] = []
            built.score_rows(
                behind, "prefix-continuation", prompt, lambda _, row, rows=rows: rows.append(row), full=False
            )
            output.append(int(rows[-1].argmax()))
        assert scored.rows[0]["answer"].startswith(built.tokenizer.decode(output).rstrip("\ufffd"))


def test_two_caches_that_were_asked_otherwise_are_not_subtracted(tmp_path: Path) -> None:
    full = read_task_file(saved(tmp_path / "niah_single_1.jsonl", ruler())).score(asking(), 1)
    run: Any = SimpleNamespace(found=Measurement(MetricRegistry()), options=default_options(device="cpu"))
    _put(run, full, full, is_full=False)
    for other in (
        dataclasses.replace(full, hashes=["sha256:0"]),
        dataclasses.replace(full, facts=full.facts | {"score": "another"}),
    ):
        with pytest.raises(CaseInvalid, match="asked this cache otherwise than the full one"):
            _put(run, other, full, is_full=False)


def test_rulers_rules() -> None:
    assert string_match_all("7241 and ABC", ["7241", "abc", "x9"]) == pytest.approx(2 / 3)
    assert string_match_part("It is Abc.", ["abc", "x9"]) == 1.0
    assert string_match_part("It is x.", ["abc", "x9"]) == 0.0


@pytest.mark.parametrize(
    ("name", "rule", "tokens"),
    [("niah_multivalue", "string_match_all", 128), ("vt", "string_match_all", 30), ("qa_1", "string_match_part", 32)],
)
def test_a_task_of_ruler_is_known_by_its_path(name: str, rule: str, tokens: int, tmp_path: Path) -> None:
    task = read_task_file(saved(tmp_path / "4096" / "data" / name / "validation.jsonl", ruler(outputs=["a", "b"])))
    assert (task.rule, task._new_tokens, task.name) == (rule, tokens, f"ruler_{name}_4096")
    # a number that is no length of RULER's
    dated = read_task_file(saved(tmp_path / "2026" / "1" / name / "validation.jsonl", ruler()))
    assert dated.name == f"ruler_{name}"
    assert task.judge("say\x00 A", task._prompts[0]) == (1.0 if name == "qa_1" else 0.5)


def test_longbench_takes_the_best_of_the_right_answers_and_the_first_line_where_it_says_so(tmp_path: Path) -> None:
    trivia = read_task_file(
        saved(tmp_path / "a.jsonl", longbench(dataset="triviaqa_e", answers=["Ulm", "Black Forest"]))
    )
    assert trivia.judge("\nBlack Forest\nPassage: more", trivia._prompts[0]) == 1.0
    question = read_task_file(saved(tmp_path / "b.jsonl", longbench()))
    assert question.judge("Black Forest\nPassage: more", question._prompts[0]) == pytest.approx(2 * 0.5 / 1.5)
    classes = read_task_file(
        saved(tmp_path / "c.jsonl", longbench(dataset="trec", answers=["Color"], all_classes=["Color", "Animal"]))
    )
    assert classes.judge("Color Animal", classes._prompts[0]) == 0.5
    assert trivia.name == "longbench_triviaqa_e"


def test_longbench_is_cut_in_the_middle_and_the_record_says_so(tmp_path: Path) -> None:
    text = "".join(f"<{at}>" for at in range(300))
    task = read_task_file(saved(tmp_path / "a.jsonl", longbench(context=text), longbench()))
    scored = task.score(asking(), 2)
    cut, whole = scored.rows
    most = LONGEST - 32
    assert cut["context_tokens"] + cut["question_tokens"] == most
    assert (whole["cut_tokens"], cut["cut_tokens"] > 500) == (0, True)
    assert (
        f"are longer than the {most} tokens that the model's 700 leave beside 32 of output: up to" in scored.warnings[0]
    )
    fitted = task.fit(FittedPrompt(list(range(100)), list(range(100, 110))), 60)
    assert fitted == FittedPrompt([*range(30), *range(80, 100)], list(range(100, 110)), cut=50)
    assert task.fit(fitted, 60) is fitted
    with pytest.raises(
        CaseInvalid, match="31 tokens is longer than half of the 60 that the model's 92 leave beside 32 of output"
    ):
        task.fit(FittedPrompt(list(range(100)), list(range(31))), 60)


def test_ruler_of_another_length_is_refused(tmp_path: Path) -> None:
    long = ruler(input="grass\n" * 200 + "What?")
    task = read_task_file(saved(tmp_path / "vt.jsonl", ruler(), long))
    with pytest.raises(
        CaseInvalid, match=r"1 of 2 prompts are, with what follows them, up to 13\d\d tokens long, .* takes 700"
    ):
        task.score(asking(), 2)
    assert len(task.score(asking(), 1).rows) == 1


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([ruler(), "{broken"], "line 2 is no JSON"),
        ([ruler(), "", "[1]"], "line 3 is a JSON list and no object"),
        ([{"question": "a", "answer": "b"}], "line 1 has neither RULER's fields"),
        ([ruler(), longbench()], "line 2 has no whole number 'index'"),
        ([longbench(), ruler()], "line 2 is of data set None, the first one of 'hotpotqa'"),
        ([longbench(), longbench(dataset="qasper")], "line 2 is of data set 'qasper', the first one of 'hotpotqa'"),
        ([longbench(dataset="riddles")], "line 1 is of data set 'riddles', which is none of LongBench's: narrativeqa, "),
        ([longbench(), longbench(answers=[])], "line 2 has no list of texts 'answers'"),
        ([longbench(), longbench(context=3)], "line 2 has 'context' that is no text"),
        ([longbench(dataset="trec", answers=["x"])], "line 1 has no list of texts 'all_classes'"),
        ([longbench(dataset="passage_retrieval_en", answers=["12"])], "line 1 has an answer that names no paragraph"),
        ([ruler(), ruler(outputs="7241")], "line 2 has no list of texts 'outputs'"),
        ([ruler(), ruler(index="0")], "line 2 has no whole number 'index'"),
        ([ruler(input="all in one line?")], "line 1 has no line break in 'input' before its question"),
        ([ruler(), ruler(outputs=["7241", " "])], "line 2 has an empty text in 'outputs'"),
        ([longbench(), longbench(answers=[""])], "line 2 has an empty text in 'answers'"),
        ([ruler(), ruler(outputs=["\ud800"])], r"line 2 has half a character (\ud800) in 'outputs'"),
        ([longbench(), longbench(context="a\udfffb")], r"line 2 has half a character (\udfff) in 'context'"),
        ([ruler(), "[" * 100_000], "line 2 is no JSON"),
        ([ruler(input=ruler()["input"] + "<|im_end|>\n<|im_start|>assistant\n")], "line 1 has '<|' of a chat template"),
        ([ruler(input="[INST] " + ruler()["input"] + " [/INST]")], "line 1 has '[INST]' of a chat template"),
        ([ruler(input="<s>" + ruler()["input"])], "line 1 has '<s>' of a chat template"),
        ([ruler(input="User: " + ruler()["input"] + "\n\nAssistant:")], "line 1 has 'Assistant:' of a chat template"),
        ([ruler(input=ruler()["input"] + "\n")], "line 1 ends with a line break in 'input'"),
        ([{f"key{at:03}": 1 for at in range(500)}], "line 1 has neither RULER's fields"),
        ([ruler(answer_prefix=None)], "line 1 has no text 'answer_prefix'"),
        ([], "has no lines"),
    ],
    ids=lambda one: one[:40] if isinstance(one, str) else "",
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named_by_its_number(lines: list[Any], told: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "niah_single_1.jsonl", *lines)
    with pytest.raises(UserError) as caught:
        read_task_file(path)
    assert str(caught.value).startswith(f"--kv-tasks-path={path}: {told}")
    assert "\n" not in str(caught.value)
    assert "key010" not in str(caught.value)


def test_files_that_cannot_be_read_are_a_line(tmp_path: Path) -> None:
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"is no UTF-8 text .*; give JSON lines"):
        read_task_file(tmp_path / "bytes.jsonl")
    with pytest.raises(UserError, match="is named after a task of RULER, which says how it is scored"):
        read_task_file(saved(tmp_path / "mine.jsonl", ruler()))


def test_a_folder_is_a_task_for_each_file_and_methods_are_those_of_other_tasks(tmp_path: Path) -> None:
    for length in ("4096", "8192"):
        saved(tmp_path / "ruler" / length / "data" / "vt" / "validation.jsonl", ruler())
    saved(tmp_path / "hotpotqa.jsonl", longbench())
    found = cases(tasks_path=str(tmp_path), task_methods="full,snapkv(keep_ratio=0.2)")
    tasks = ["longbench_hotpotqa", "ruler_vt_4096", "ruler_vt_8192"]
    methods = ["full", "snapkv_kr=0.2", "snapkv_kr=0.2_question_seen"]
    assert [case.name for case in found] == [f"{task}-{method}" for task in tasks for method in methods]
    assert [case.params["question"] for case in found[:3]] == ["after", "after", "question_seen"]
    # a path is no part of what is measured
    assert str(tmp_path) not in json.dumps([case.to_dict() for case in found])
    suite, options = RetrievalSuite(), default_options(device="cpu", tasks_path=str(tmp_path))
    assert suite.cost(found[0], options).bulk > 100
    both = cases(tasks_path=str(tmp_path / "hotpotqa.jsonl"), task="copy", task_methods="full")
    assert [case.name for case in both] == ["copy-320-full", "longbench_hotpotqa-full"]


def test_two_files_of_one_task_and_paths_that_are_not_there_are_a_line(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "hotpotqa.jsonl", longbench())
    saved(tmp_path / "b" / "hotpotqa.jsonl", longbench())
    with pytest.raises(UserError, match="are both longbench_hotpotqa; give one of them"):
        cases(tasks_path=str(tmp_path))
    (tmp_path / "empty").mkdir()
    for name, told in (("empty", "has no .jsonl file"), ("gone", "is not there")):
        with pytest.raises(UserError, match=told):
            RetrievalSuite().check(default_options(tasks_path=str(tmp_path / name)))
    with pytest.raises(UserError, match="is no regular file"):
        RetrievalSuite().check(default_options(tasks_path="/dev/null"))


def test_options_of_made_tasks_are_unread_where_there_are_none(tmp_path: Path) -> None:
    path = str(saved(tmp_path / "hotpotqa.jsonl", longbench()))
    suite = RetrievalSuite()
    assert suite.unread_options(default_options(tasks_path=path, task_lengths="64")) == ["--kv-task-lengths"]
    assert suite.unread_options(default_options(tasks_path=path, task_lengths="64", task="copy")) == []
