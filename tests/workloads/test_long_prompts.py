from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import CaseInvalid, UserError
from kvsuite.workloads.long_prompts import clipped_context, fill_token, output_tokens, pattern_ids, repeated
from tests.tiny_checkpoint import byte_tokenizer


class Knows:
    """A tokenizer that knows some texts and special tokens only."""

    def __init__(self, texts: dict[str, list[int]], unk: int | None = None, eos: int | None = None) -> None:
        self.texts, self.unk_token_id, self.eos_token_id = texts, unk, eos

    def __call__(self, text: str, **asked: Any) -> dict[str, list[int]]:
        assert asked["add_special_tokens"] is False
        return {"input_ids": self.texts.get(text, [])}


@pytest.mark.parametrize(("context", "output", "prompt"), [(4096, 128, 3968), (3072, 512, 3072), (4096, 512, 3584)])
def test_contexts_of_the_original(context: int, output: int, prompt: int) -> None:
    assert clipped_context(context, output, max_model_len=4096, typed="--kv-synthetic-output") == prompt


@pytest.mark.parametrize(
    ("asked", "longest", "tokens"), [(0, 4096, 512), (-1, 4096, 512), (0, 1024, 256), (0, 3, 1), (700, 4096, 700)]
)
def test_output(asked: int, longest: int, tokens: int) -> None:
    assert output_tokens(asked, max_model_len=longest) == tokens


def test_nothing_left() -> None:
    with pytest.raises(UserError, match=r"^--kv-synthetic-output=64: 64 output .*at most 64.*fewer, or raise"):
        clipped_context(100, 64, max_model_len=64, typed="--kv-synthetic-output=64")
    with pytest.raises(UserError, match=r"^--kv-synthetic-context=0: "):
        clipped_context(0, 1, max_model_len=64, typed="--kv-synthetic-output=1")


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        (Knows({" Hello": [5, 6], " hello": [7]}, unk=1, eos=2), 5),
        (Knows({" a": [9], " test": [8]}, unk=1, eos=2), 8),
        (Knows({}, unk=1, eos=2), 1),
        (Knows({}, eos=2), 2),
        (Knows({}, unk=0, eos=2), 0),
        (Knows({}), 0),
        (None, 0),
    ],
)
def test_fill_token(tokenizer: Any, token: int) -> None:
    assert fill_token(tokenizer) == token


def test_a_pattern_has_no_tokens_around_it() -> None:
    plain = pattern_ids("Hello", byte_tokenizer(), typed="--kv-synthetic-token=Hello")
    assert len(plain) == len("Hello")
    assert pattern_ids("Hello", byte_tokenizer(adds_bos=True), typed="--kv-synthetic-token=Hello") == plain
    with pytest.raises(UserError, match=r"^--kv-synthetic-token=x: gives no token"):
        pattern_ids("x", Knows({}), typed="--kv-synthetic-token=x")
    with pytest.raises(CaseInvalid, match=r"^--kv-synthetic-token=x: the model has no tokenizer"):
        pattern_ids("x", None, typed="--kv-synthetic-token=x")


@given(pattern=st.lists(st.integers(0, 99), min_size=1, max_size=9), length=st.integers(1, 60))
def test_repeated(pattern: list[int], length: int) -> None:
    found = repeated(pattern, length)
    assert len(found) == length
    assert all(token == pattern[at % len(pattern)] for at, token in enumerate(found))
