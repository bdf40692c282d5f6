"""LongBench's rules, by values worked out by hand from the published ones."""

from __future__ import annotations

import pytest

from kvsuite.suites.retrieval.published.longbench import DATASETS, prompt_formats
from kvsuite.suites.retrieval.published.longbench_scores import (
    classification_score,
    code_similarity,
    count_score,
    qa_f1,
    qa_f1_zh,
    retrieval_score,
    retrieval_score_zh,
    rouge_l,
    rouge_l_zh,
)


@pytest.mark.parametrize(
    ("output", "right", "score"),
    [
        ("The Black Forest.", "black forest", 1.0),
        # two of three words, and both of the right ones
        ("black forest hills", "the Black Forest", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("a river, a river", "river", 2 / 3),
        ("the", "a", 0.0),
        ("", "river", 0.0),
    ],
)
def test_f1_of_words_knows_no_case_no_signs_and_no_articles(output: str, right: str, score: float) -> None:
    assert qa_f1(output, right) == pytest.approx(score)


@pytest.mark.parametrize(
    ("output", "right", "classes", "score"),
    [
        ("Type: Animal", "Animal", ["Animal", "Color"], 1.0),
        ("Animal or Color", "Animal", ["Animal", "Color"], 0.5),
        ("Color", "Animal", ["Animal", "Color"], 0.0),
        ("", "Animal", ["Animal", "Color"], 0.0),
        # a part of the right name is none of its own
        ("Other animal", "Other animal", ["Other", "Color", "Other animal"], 1.0),
        # as published: the list shrinks while it is walked through, so that the second of two such parts stays
        ("Other animal", "Other animal", ["Other", "animal", "Other animal"], 0.5),
    ],
)
def test_classes_that_an_output_names(output: str, right: str, classes: list[str], score: float) -> None:
    assert classification_score(output, right, classes) == score


def test_numbers_of_an_output() -> None:
    assert count_score("There are 7, no, 8", "7") == 0.5
    assert count_score("seven", "7") == 0.0
    assert retrieval_score("Paragraph 12", "Paragraph 12") == 1.0
    assert retrieval_score("Paragraph 1 or 12 or 3 or 4", "Paragraph 12") == 0.25
    assert retrieval_score_zh("\u6bb5\u843d3", "\u6bb5\u843d3") == 1.0


def test_likeness_of_code_looks_at_the_first_line_that_is_neither_comment_nor_fence() -> None:
    assert code_similarity("\n# next\n```python\nreturn x + 1\nreturn y", "return x + 1") == 1.0
    # 2 * 4 equal signs of 8 + 4: in whole hundredths
    assert code_similarity("abcdefgh", "abcd") == 0.67
    assert code_similarity("# only a comment", "return x") == 0.0


def test_summaries_are_scored_by_the_package_that_longbench_uses() -> None:
    pytest.importorskip("rouge", reason="rouge is not installed: pip install 'kvsuite[longbench]'")
    assert rouge_l("the river ends in a delta", "the river ends in a delta") == pytest.approx(1.0, abs=1e-6)
    # three of four words on one side, three of six on the other
    assert rouge_l("river ends in delta", "the river ends in the sea") == pytest.approx(
        2 * 3 / 4 * 3 / 5 / (3 / 4 + 3 / 5), abs=1e-6
    )
    assert rouge_l("", "the river") == 0.0


def test_chinese_texts_are_cut_into_words() -> None:
    pytest.importorskip("jieba", reason="jieba is not installed: pip install 'kvsuite[longbench]'")
    pytest.importorskip("rouge", reason="rouge is not installed: pip install 'kvsuite[longbench]'")
    same, more = "\u6211\u6765\u5230\u5317\u4eac", "\u6211\u6765\u5230\u5317\u4eac\u3002"
    assert qa_f1_zh(more, same) == 1.0
    assert qa_f1_zh("\u4e0a\u6d77", same) == 0.0
    assert rouge_l_zh(same, same) == pytest.approx(1.0, abs=1e-6)


def test_every_data_set_has_a_prompt_whose_question_stands_behind_its_context() -> None:
    formats = prompt_formats()
    assert set(formats) == set(DATASETS)
    assert len(formats) == 21
    for text in formats.values():
        assert text.count("{context}") == 1
        assert text.count("{") == 1 + text.count("{input}")
        assert text.index("{context}") < text.find("{input}") or "{input}" not in text
