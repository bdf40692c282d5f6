"""Every option is in --help, with its default, both spellings, an ini twin and an environment twin."""

from __future__ import annotations

import re

import pytest
from pytest_runs import run_pytest

from kvsuite.options.groups import all_options, refused_names
from kvsuite.options.option import Option
from kvsuite.quantization.registry import QUANTIZATIONS

OPTIONS = all_options()


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Help entries by the first word."""
    run = run_pytest(tmp_path_factory.mktemp("help"), "--help", COLUMNS="4000")
    assert run.code == 0
    found = re.split(r"\n  (?=\S)", run.out)
    return {entry.split(maxsplit=1)[0].rstrip(","): " ".join(entry.split()) for entry in found}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_option_is_listed_with_its_default(option: Option, entries: dict[str, str]) -> None:
    flag = option.is_flag
    entry = entries[f"--kv-{option.name}" + ("" if flag else "=VALUE")]
    listed = set(re.findall(r"--kv[-_][\w-]+", entry.partition(option.help)[0]))
    names = [f"--kv-{name}" for name in (option.name, *option.aliases)]
    assert listed == {*names, *("--" + name[2:].replace("-", "_") for name in names)}
    assert f"{option.help} Default: {option.default or 'none'}." in entry
    assert ("With --kv-preset=original:" in entry) == (option.original is not None)


def test_every_weight_format_is_listed(entries: dict[str, str]) -> None:
    listed = re.split(r"[ ,()]+", entries["--kv-quantization=VALUE"].partition(" e.g. ")[0])
    assert set(QUANTIZATIONS) <= set(listed)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_option_has_an_ini_and_an_environment_twin(option: Option, entries: dict[str, str]) -> None:
    assert f"as an environment variable {option.dest.upper()}" in entries[option.dest]


@pytest.mark.parametrize("name", refused_names())
def test_options_that_are_refused_name_what_does_the_job(name: str, entries: dict[str, str]) -> None:
    entry = entries[f"--kv-{name}=[VALUE]"]
    assert f"--kv_{name.replace('-', '_')}" in entry
    assert "Refused: " in entry
    assert "use --kv-" in entry
