"""A misspelt name is told with the one that was probably meant."""

from __future__ import annotations

import pytest

from kvsuite.options.misspelt import misspelt_options, misspelt_variables


@pytest.mark.parametrize(
    ("name", "meant"),
    [("KV_ROUNDZ", "KV_ROUNDS"), ("KV_METHODS", "KV_METHOD"), ("kv_rounds", "KV_ROUNDS"), ("KV_NUM_RUNS", "KV_ROUNDS")],
)
def test_a_variable_that_nothing_reads(name: str, meant: str) -> None:
    assert misspelt_variables([name, "HOME"]) == [
        f"{name} in the environment is read by nothing; did you mean {meant}?"
    ]


@pytest.mark.parametrize("name", ["KV_ROUNDS", "KV_STORE_URL", "KVSUITE_CACHE", "ROUNDS", "KV_"])
def test_a_variable_of_ours_or_of_somebody_else(name: str) -> None:
    assert misspelt_variables([name]) == []


def test_an_option_that_is_none() -> None:
    found = misspelt_options(
        ["benchmarks", "--kv-methd=x", "--kv_rouns", "3", "--kv-method=y", "--kv-zzz", "--", "--kv-seeed"]
    )
    assert found == ["--kv-methd: did you mean --kv-method?", "--kv_rouns: did you mean --kv_rounds?"]
