"""Methods with parameters as they are typed on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.compression import find_policy
from kvsuite.compression.base import CacheView, Policy
from kvsuite.compression.method_text import MethodText, parameter_types
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.suites.compression.cases import compression_cases

NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)


def variants(typed: str) -> list[dict[str, Any]]:
    method = MethodText.parse(typed)
    return list(method.variants(parameter_types(find_policy(method.name))))


def test_a_list_is_swept_and_lists_are_multiplied() -> None:
    assert variants("snapkv(window=[16,32],keep_ratio=[0.2,0.5])") == [
        {"window": 16, "keep_ratio": 0.2},
        {"window": 16, "keep_ratio": 0.5},
        {"window": 32, "keep_ratio": 0.2},
        {"window": 32, "keep_ratio": 0.5},
    ]
    assert variants("tova") == [{}]
    assert variants("expected_attention(covariance=false, epsilon=1)") == [{"covariance": False, "epsilon": 1.0}]


@given(values=st.dictionaries(NAMES, st.lists(st.integers(-999, 999), min_size=1, max_size=4), max_size=4))
def test_what_is_written_is_read(values: dict[str, list[int]]) -> None:
    typed = "mine(" + ",".join(f"{name}=[{','.join(map(str, each))}]" for name, each in values.items()) + ")"
    method = MethodText.parse(typed)
    assert {name: [int(one) for one in each] for name, each in method.values.items()} == values
    found = list(method.variants(dict.fromkeys(values, int)))
    assert len(found) == len({tuple(one.values()) for one in found}) or any(
        len(set(v)) < len(v) for v in values.values()
    )
    assert all(set(one) == set(values) for one in found)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "snapkv(windw=3)",
            "snapkv has no parameter windw; did you mean window? it has factor, rounding, keep_ratio, window, kernel",
        ),
        ("snapkv(window=a)", "window=a is not a whole number"),
        ("snapkv(window=1.5)", "window=1.5 is not a whole number"),
        ("snapkv(window=1_000)", "window=1_000 is not a whole number"),
        ("snapkv(window=+5)", "window=+5 is not a whole number"),
        ("snapkv(keep_ratio=nan)", "keep_ratio=nan is not a number"),
        ("snapkv(window=true)", "window=true is not a whole number"),
        ("expected_attention(covariance=2)", "covariance=2 is not true or false"),
        ("snapkv(keep_ratio=[0.2,x])", "keep_ratio=x is not a number"),
        ("snapkv(window=8", "is no method with parameters"),
        ("snapkv(window=[8)", "the list of window is not closed"),
        ("snapkv(window=[])", "the list of window is empty"),
        ("snapkv(window=8,window=9)", "window is given twice"),
        ("snapkv(8)", "'8' is no parameter with its value"),
        ("snapkv=3", "is no method with parameters"),
    ],
)
def test_bad_input_is_one_line_that_names_it(typed: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        variants(typed)
    assert str(caught.value).startswith(f"--kv-method={typed}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(kw_only=True, eq=False)
class Mine(Policy):
    name: ClassVar[str] = "mine"

    size: int = 8
    share: float = 0.5

    def size_after(self, length: int) -> int:
        return min(length, self.size)

    def keep(self, view: CacheView) -> Any:
        raise NotImplementedError


class ByHand(Mine):
    def __init__(self, *, window=3, **common):  # type: ignore[no-untyped-def]
        super().__init__(**common)
        self.window = window


def test_parameters_of_own_policies_are_their_fields_or_arguments() -> None:
    assert parameter_types(Mine) == {"size": int, "share": float}
    assert parameter_types(ByHand) == {"window": int}
    assert Mine(size=3).to_dict() == {"size": 3, "share": 0.5, "positions": "original", "skip_layers": []}


def test_cases_of_a_run() -> None:
    def names(method: str, **options: str) -> list[str]:
        return [case.name for case in compression_cases(default_options(method=method, **options))][1:]

    assert names("snapkv(window=32,keep_ratio=[0.2,0.5]),tova", keep_ratios="0.3") == [
        "snapkv_window=32_kr=0.2",
        "snapkv_window=32_kr=0.5",
        "tova_kr=0.3",
    ]
    assert names("kvpress:SnapKV(window_size=[16,32],keep_ratio=0.5)") == [
        "SnapKV_window_size=16_kr=0.5",
        "SnapKV_window_size=32_kr=0.5",
    ]
    # what acts at the end of a prompt is scored behind a prompt
    protocols = {
        method: {case.workload["protocol"] for case in compression_cases(default_options(method=method))}
        for method in ("streaming_llm", "h2o", "kvpress:TOVA")
    }
    assert protocols == {
        "streaming_llm": {"streaming-decode"},
        "h2o": {"prefix-continuation"},
        "kvpress:TOVA": {"prefix-continuation"},
    }
    with pytest.raises(UserError, match=r"--kv-protocol=streaming-decode: knorm_kr=0.8 compresses a prefilled prompt"):
        compression_cases(default_options(method="knorm", protocol="streaming-decode"))
