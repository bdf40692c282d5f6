"""Numbers and paths as people type them: read, or refused before anything is made of that size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from resolved_values import value_of

from kvsuite.comparison.limits import parse_limit
from kvsuite.errors import UserError
from kvsuite.memory_model.design_point import AXES, DesignPoint
from kvsuite.memory_model.fit import parse_card
from kvsuite.memory_model.space_text import parse_space
from kvsuite.options.groups import all_options
from kvsuite.options.numbers import decimal, whole
from kvsuite.options.option import Option
from kvsuite.options.resolve import default_options

#: spellings of a number that Python reads and a command line should not hold
FOREIGN = ("+5", "1_000", "٥", "５", "5\u00a05", "0x10", "1__0", "²", "5.", "5e0")
NUMBERS = ("prompt-tokens", "rounds", "num-warmup", "seed", "max-new-tokens", "num-samples", "max-length", "threads",
           "context-window-size", "max-batch-size", "sliding-window-size", "eval-tokens", "mlc-timeout", "fix-kv-sizes",
           "skip-layers")  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("name", NUMBERS)
def test_only_plain_digits_are_a_whole_number(name: str, text: str) -> None:
    with pytest.raises(UserError, match="whole number"):
        default_options(**{name.replace("-", "_"): text})


@pytest.mark.parametrize("text", ["1_0", "+0.5", "٠.٥", "1e-320", "1e-400", "0.0_5", "1e-7", " 0.5 0"])
@pytest.mark.parametrize("name", ["keep-ratios", "prompt-share", "timeout"])
def test_only_a_plain_number_that_is_not_nothing_is_one(name: str, text: str) -> None:
    with pytest.raises(UserError, match=rf"--kv-{name}="):
        default_options(**{name.replace("-", "_"): text})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["9" * 26, "9" * 5000, "-" + "9" * 5000], ids=["26", "5000", "-5000"])
def test_no_size_is_without_bounds(name: str, text: str) -> None:
    with pytest.raises(UserError, match=r"must be at (most|least) -?[0-9]+;") as caught:
        default_options(**{name.replace("-", "_"): text})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "most"),
    [("seed", 2**64 - 1), ("prompt_tokens", 10_000_000), ("max_batch_size", 65_536), ("rounds", 100_000)],
)
def test_the_largest_value_is_taken_and_the_next_is_not(name: str, most: int) -> None:
    assert value_of(default_options(**{name: str(most)}), name) == most
    with pytest.raises(UserError, match=f"must be at most {most}"):
        default_options(**{name: str(most + 1)})


@given(st.integers(-(10**30), 10**30), st.integers(-100, 100), st.integers(0, 10**12))
def test_a_whole_number_comes_back_or_the_bound_is_named(value: int, least: int, width: int) -> None:
    most = least + width
    if least <= value <= most:
        assert whole(str(value), least, most) == value
        return
    with pytest.raises(ValueError, match=f"must be at (least {least}|most {most})"):
        whole(str(value), least, most)


@given(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False))
@example(0.0)
def test_a_number_comes_back(value: float) -> None:
    assert decimal(repr(value).replace("e+", "e")) == value


@pytest.mark.parametrize("text", ["1e999", "-1e999", "9" * 400, "nan", "inf", "1e99999999"])
def test_a_number_is_finite(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        decimal(text)


@given(st.sampled_from(all_options()), st.text(st.characters(categories=["Nd", "No", "Po", "Sm", "Pd"]), min_size=1))
def test_a_value_of_strange_digits_is_refused_or_is_text(option: Option, text: str) -> None:
    try:
        value = option.parse(text)
    except ValueError:
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert text.strip().isascii()
        assert math.isfinite(value)


@pytest.mark.parametrize(
    "text", ["9" * 400 + "GiB", "1e5GiB", "٢GiB", "0GiB", "0.0000000001B", "+2GiB", "9" * 16 + "GiB"]
)
def test_a_card_that_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match=r"--kv-plan-card=.*no size of a card; use GiB, such as 24GiB"):
        default_options(plan_card=text)


def test_a_card_that_can_be() -> None:
    assert parse_card("0.5GiB", 1.0).bytes == 1 << 29
    assert parse_card("80GB", 1.0).bytes == 80 * 10**9


@pytest.mark.parametrize("text", ["ctx=1_000", "ctx=٥", "ctx=" + "9" * 26, "batch=100000000", "ctx=" + "9" * 5000])
def test_a_space_has_bounds(text: str) -> None:
    with pytest.raises(UserError, match="must be a whole number of at least 1 and at most") as caught:
        parse_space(text)
    assert len(str(caught.value)) < 800


def test_a_point_has_bounds() -> None:
    for axis in AXES:
        values = {"context_window_size": 4, "prefill_chunk_size": 4, "max_batch_size": 1, axis.name: 10**26}
        with pytest.raises(UserError, match=axis.name):
            DesignPoint("q4f16_1", **values)
    with pytest.raises(UserError, match="no id of a design point"):
        DesignPoint.from_id(f"q4f16_1-ctx{'9' * 26}-pc1024-bs16-swoff-sink0")


@pytest.mark.parametrize("text", ["+٢%", "+1_0%"])
def test_a_limit_has_plain_digits(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no (limit|unit)"):
        parse_limit(text)


# paths

PATHS = ("report_dir", "cache_dir", "resume", "compare", "mlc_python", "model_lib")
PLACES = ("model", "corpus", "dataset", "dataset_path")


@pytest.mark.parametrize("name", PATHS)
def test_the_home_folder_takes_the_place_of_its_sign(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert value_of(default_options(**{name: "~/x"}), name) == "/home/somebody/x"


@pytest.mark.parametrize("name", PLACES)
def test_what_is_measured_keeps_its_name(name: str) -> None:
    value = value_of(default_options(**{name: "~/x"}), name)
    assert value in ("~/x", ("~/x",))


@pytest.mark.parametrize("name", [*PATHS, *PLACES])
@pytest.mark.parametrize("text", ["~no-such-user/x", "~no-such-user"])
def test_an_unknown_home_is_one_line(name: str, text: str) -> None:
    with pytest.raises(UserError, match=f"--kv-{name.replace('_', '-')}={text}: no home folder is known for it"):
        default_options(**{name: text})


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without a home, as in a container under a number of its own."""
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [*PATHS, *PLACES])
def test_without_a_home_its_sign_is_refused(name: str, homeless: Path) -> None:
    with pytest.raises(UserError, match="no home folder is known for it; give the whole path"):
        default_options(**{name: "~/x"})
    assert default_options(**{name: "x"})


def test_without_a_home_the_cache_folder_has_to_be_named(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvsuite.models.smollm2 import cache_root

    monkeypatch.delenv("KVSUITE_CACHE", raising=False)
    with pytest.raises(UserError, match="no home folder is known for it; give the whole path with --kv-cache-dir"):
        cache_root()
    assert cache_root(homeless / "cache") == homeless / "cache"
    monkeypatch.setenv("KVSUITE_CACHE", "~no-such-user")
    with pytest.raises(UserError, match=r"\$KVSUITE_CACHE=~no-such-user"):
        cache_root()
    assert list(homeless.iterdir()) == []
