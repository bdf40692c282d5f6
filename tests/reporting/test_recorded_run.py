"""A run that an earlier version measured and drew: what is read from it, drawn from it and called by its names stays.

``tests/data/recorded_run`` is the run's folder as that version left it: all three suites on SmolLM2, a few tokens and two
rounds a case, one design point that breaks a rule, one that is another's twin. ``terminal.txt`` is what pytest printed at the
end; of the figures, which would take ten times the room, ``figures.json`` has hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from coarse_figures import as_fine_as_asked

from kvsuite.__main__ import main
from kvsuite.case import Case
from kvsuite.options.resolve import default_options
from kvsuite.reporting.noise import MARK, MEANING
from kvsuite.suites.registry import cases_of

RECORDED = Path(__file__).parents[1] / "data" / "recorded_run"
#: what draws the figures, and the hash of each: of a PNG's pixels, of an SVG's text
FIGURES: dict[str, Any] = json.loads((RECORDED / "figures.json").read_text())
DATA = sorted(path.name for path in RECORDED.iterdir() if path.suffix in (".csv", ".json") and path.stem != "figures")
#: what is shown under another name since
_RENAMED = {"hf-strided, window": "strided (original program), window"}
_WORD = re.compile(r"[^\s│┃|]+")
_RULE = re.compile(r"[-=_─━═┄┈┼╇┬┴╪+\s]+")


@dataclass
class Redrawn:
    """What ``python -m kvsuite report`` wrote and printed."""

    folder: Path
    said: str


def run_main(*arguments: object) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return main([str(argument) for argument in arguments]), said.getvalue()


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory: pytest.TempPathFactory) -> Redrawn:
    folder = tmp_path_factory.mktemp("redrawn")
    with as_fine_as_asked():
        code, said = run_main("report", RECORDED, "--out", folder)
    assert code == 0
    return Redrawn(folder, said)


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run, *rows = map(json.loads, (RECORDED / "records.jsonl").read_text().splitlines())
    return run, rows


def cells(text: str) -> list[list[str]]:
    """The words of every line, without the lines between them."""
    for before, now in _RENAMED.items():
        text = text.replace(before, now)
    # differences inside their noise are marked since, and a line says how
    text = "\n".join(line.replace(MARK, "") for line in text.splitlines() if line != MEANING)
    # times that vary are one warning since, whatever by how much
    text = "\n".join(line for line in text.splitlines() if not line.startswith("warning: unstable: "))
    return [_WORD.findall(line) for line in text.splitlines() if line.strip() and not _RULE.fullmatch(line)]


def digest_of(figure: Path) -> str:
    from PIL import Image

    if figure.suffix == ".svg":
        return hashlib.sha256(figure.read_bytes()).hexdigest()
    with Image.open(figure) as image:
        return f"{image.width}x{image.height} {hashlib.sha256(image.convert('RGBA').tobytes()).hexdigest()}"


def test_the_same_files_are_written(redrawn: Redrawn) -> None:
    assert {path.name for path in redrawn.folder.iterdir()} == {*DATA, *FIGURES["figures"], "table.txt", "report.html"}


@pytest.mark.parametrize("name", DATA)
def test_csv_and_json_are_the_same_bytes(name: str, redrawn: Redrawn) -> None:
    assert (redrawn.folder / name).read_bytes() == (RECORDED / name).read_bytes()


def test_the_tables_have_the_same_cells(redrawn: Redrawn) -> None:
    table = cells((RECORDED / "table.txt").read_text())
    assert ["streaming_16", "0.1503", "0.0524"] in [line[:3] for line in table]
    assert cells((redrawn.folder / "table.txt").read_text()) == table
    assert cells(redrawn.said)[: len(table)] == table


def test_the_terminal_showed_these_tables(redrawn: Redrawn) -> None:
    title, *lines = cells((RECORDED / "terminal.txt").read_text())
    assert "kvsuite" in title
    table = cells((redrawn.folder / "table.txt").read_text())
    assert lines[: len(table)] == table
    assert [line[0] for line in lines[len(table) :]] == ["records", "report:"]


@pytest.mark.parametrize("name", sorted(FIGURES["figures"]))
def test_figures_have_the_same_pixels(name: str, redrawn: Redrawn) -> None:
    drawn_by = {"matplotlib": matplotlib.__version__, "machine": platform.machine()}
    if drawn_by != FIGURES["drawn_by"]:
        pytest.skip(f"the recorded figures were drawn by {FIGURES['drawn_by']}, these are by {drawn_by}")
    assert digest_of(redrawn.folder / name) == FIGURES["figures"][name]


def test_compared_with_itself_nothing_changed(tmp_path: Path) -> None:
    code, said = run_main(
        "compare", RECORDED / "records.jsonl", RECORDED / "report.json", "--json", tmp_path / "comparison.json"
    )
    assert code == 0
    assert "23 cases compared: " in said
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    # two rounds are too few to say of a time that it is the same
    assert comparison["counts"].keys() <= {"same", "information", "unstable"}
    assert comparison["counts"]["same"] > 300
    assert [row for row in comparison["rows"] if row["base"] != row["now"]] == []


def test_the_command_still_means_these_cases(recorded: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    run, rows = recorded
    typed = dict(re.findall(r"^--kv-([a-z-]+)(?:=(.*))?$", "\n".join(run["command"]), re.MULTILINE))
    options = default_options(**{name.replace("-", "_"): value or "true" for name, value in typed.items()})
    # there are more options since
    assert options.to_dict() | run["options"] == options.to_dict()
    cases = {
        f"test_{suite}[{case.id}]": case
        for suite in ("compression", "perplexity", "dse")
        for case in cases_of(suite, options)
    }
    assert len(rows) == run["cases"] == 23
    for row in rows:
        assert cases[row["id"].partition("::")[2]].to_dict() == row["case"]


def test_identities_are_computed_as_they_were(recorded: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    for row in recorded[1]:
        # a point that breaks a rule is refused before anything is loaded
        text = None if row["dataset"] is None else row["dataset"]["tokens_hash"]
        key = Case(**row["case"]).key(model_revision=row["model"].get("revision"), dataset_revision=text)
        assert key == row["case_key"]
