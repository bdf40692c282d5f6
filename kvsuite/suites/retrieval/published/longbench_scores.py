"""LongBench's scoring rules, as published: an output beside one right answer, from 0 to 1.

Every rule takes the output, the right answer and all classes, which classification alone reads.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_PUNCTUATION = frozenset(string.punctuation)
# of Chinese texts, full width signs and quotation marks
_PUNCTUATION_ZH = _PUNCTUATION | frozenset(
    "\uff01\uff1f\uff61\u3002\uff02\uff03\uff04\uff05\uff06\uff07\uff08\uff09\uff0a\uff0b\uff0c\uff0d\uff0f\uff1a\uff1b\uff1c\uff1d"
    "\uff1e\uff20\uff3b\uff3c\uff3d\uff3e\uff3f\uff40\uff5b\uff5c\uff5d\uff5e\uff5f\uff60\uff62\uff63\uff64\u3001\u3003\u300b\u300c"
    "\u300d\u300e\u300f\u3010\u3011\u3014\u3015\u3016\u3017\u3018\u3019\u301a\u301b\u301c\u301d\u301e\u301f\u3030\u303e\u303f\u2013"
    "\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026\u2027\ufe4f."
)


def qa_f1(output: str, right: str, classes: Sequence[str] = ()) -> float:
    """F1 of words, without case, punctuation and articles."""
    return _f1(_words(output), _words(right))


def qa_f1_zh(output: str, right: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words that jieba finds, without case and punctuation."""
    return _f1(_words_zh(output), _words_zh(right))


def rouge_l(output: str, right: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L by package ``rouge``; 0 where it cannot read one of the texts, as an empty one."""
    from rouge import Rouge

    try:
        return float(Rouge().get_scores([output], [right], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_l_zh(output: str, right: str, classes: Sequence[str] = ()) -> float:
    """The same of the words that jieba finds."""
    return rouge_l(" ".join(_cut(output)), " ".join(_cut(right)))


def classification_score(output: str, right: str, classes: Sequence[str]) -> float:
    """1 / classes that the output names, if the right one is among them; parts of the right name are none."""
    named = [one for one in classes if one in output]
    # as published: the list shrinks while it is walked through, so that of two such parts in a row one stays
    for one in named:
        if one in right and one != right:
            named.remove(one)
    return 1 / len(named) if right in named else 0.0


def count_score(output: str, right: str, classes: Sequence[str] = ()) -> float:
    """Share of the output's numbers that are the right one."""
    numbers = _NUMBER.findall(output)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def retrieval_score(output: str, right: str, classes: Sequence[str] = ()) -> float:
    """Share of the output's numbers that are the right paragraph's."""
    return count_score(output, paragraph_number("Paragraph ", right) or "")


def retrieval_score_zh(output: str, right: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese texts."""
    return count_score(output, paragraph_number("\u6bb5\u843d", right) or "")


def paragraph_number(marker: str, right: str) -> str | None:
    """The number of the paragraph that a right answer names, ``None`` if it names none."""
    found = re.search(re.escape(marker) + r"(\d+)", right)
    return found[1] if found else None


def code_similarity(output: str, right: str, classes: Sequence[str] = ()) -> float:
    """Likeness of the first line that is neither comment nor fence, in hundredths: ``ratio`` of package fuzzywuzzy."""
    lines = output.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(sign in one for sign in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, right).ratio()) / 100


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    same = (Counter(given) & Counter(right)).total()
    return 2 * same / (len(given) + len(right)) if same else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", "".join(sign for sign in text.lower() if sign not in _PUNCTUATION)).split()


def _words_zh(text: str) -> list[str]:
    found = [
        "".join("".join(sign for sign in one.lower() if sign not in _PUNCTUATION_ZH).split()) for one in _cut(text)
    ]
    return [one for one in found if one]


def _cut(text: str) -> list[str]:
    import jieba

    return [str(one) for one in jieba.cut(text, cut_all=False)]
