from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.workloads.prompts import FIRST_BLOCK, make_prompts


def heads(prompts: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(prompt[:FIRST_BLOCK]) for prompt in prompts}


@given(
    count=st.integers(1, 20), length=st.integers(2, 80), vocab_size=st.integers(8, 200), seed=st.integers(0, 2**32 - 1)
)
def test_random_prompts(count: int, length: int, vocab_size: int, seed: int) -> None:
    prompts = make_prompts(count=count, length=length, vocab_size=vocab_size, seed=seed, token_pool=None)
    assert [len(prompt) for prompt in prompts] == [length] * count
    assert all(type(token) is int and 0 <= token < vocab_size for prompt in prompts for token in prompt)
    assert len(heads(prompts)) == count
    assert make_prompts(count=count, length=length, vocab_size=vocab_size, seed=seed, token_pool=None) == prompts


@given(pool=st.lists(st.integers(0, 3), max_size=60), count=st.integers(1, 12), length=st.integers(1, 30))
def test_pool_prompts_are_windows_of_the_text(pool: list[int], count: int, length: int) -> None:
    windows = [pool[offset : offset + length] for offset in range(len(pool) - length + 1)]
    if len(heads(windows)) < count:
        with pytest.raises(UserError, match=r"--kv-prompt-tokens=.*--kv-corpus"):
            make_prompts(count=count, length=length, vocab_size=4, seed=1, token_pool=pool)
        return
    prompts = make_prompts(count=count, length=length, vocab_size=4, seed=1, token_pool=pool)
    assert len(prompts) == len(heads(prompts)) == count
    assert all(prompt in windows for prompt in prompts)
    assert make_prompts(count=count, length=length, vocab_size=4, seed=1, token_pool=pool) == prompts


def test_seed_decides() -> None:
    pool = list(range(1000))
    for source in (pool, None):
        first, second = (
            make_prompts(count=4, length=32, vocab_size=1000, seed=seed, token_pool=source) for seed in (1, 2)
        )
        assert first != second


def test_every_id_may_occur() -> None:
    (prompt,) = make_prompts(count=1, length=400, vocab_size=8, seed=0, token_pool=None)
    assert set(prompt) == set(range(8))


def test_all_prompts_of_a_small_vocabulary_are_found() -> None:
    prompts = make_prompts(count=9, length=2, vocab_size=3, seed=0, token_pool=None)
    assert sorted(prompts) == [[a, b] for a in range(3) for b in range(3)]


@pytest.mark.parametrize(
    ("count", "length", "vocab_size", "pool"),
    [(0, 4, 8, None), (1, 0, 8, None), (10, 2, 3, None), (2, 4, 8, [1, 2, 3, 4]), (1, 5, 8, [1, 2, 3]), (1, 1, 8, [])],
)
def test_impossible_wishes(count: int, length: int, vocab_size: int, pool: list[int] | None) -> None:
    with pytest.raises(UserError, match=rf"--kv-prompt-tokens={length}"):
        make_prompts(count=count, length=length, vocab_size=vocab_size, seed=0, token_pool=pool)
