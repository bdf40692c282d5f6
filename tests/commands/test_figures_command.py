from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvsuite.__main__ import main

DATA = Path(__file__).parents[1] / "data" / "dse"
TAG = "Llama-3-8B-Instruct-q4f16_1-MLC"
PLANS = ["mem_kvcache_vs_context", "mem_total_vs_context", "mem_kvcache_vs_sliding"]


def few_rows(*, without_time: bool) -> str:
    """A results CSV of the original of few points, without a window, so that few figures can be drawn."""
    header, *lines = (DATA / f"kv_cache_dse_results_{TAG}.csv").read_text().splitlines()
    chosen = [line.split(",") for line in lines if ",1024,1,-1,0,3," in line]
    time = header.split(",").index("time_s")
    rows = [[*line[:time], "" if without_time else line[time], *line[time + 1 :]] for line in chosen]
    return "\n".join([header, *map(",".join, rows)]) + "\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / f"kv_cache_dse_results_{TAG}.csv"
    path.write_text(few_rows(without_time=True))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_figures_are_written_beside_the_csv(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write_text(few_rows(without_time=False))
    before = results.read_bytes()
    assert main(["figures", "--csv", str(results)]) == 0
    out, err = capsys.readouterr()
    found = names(results.parent / "mem_plots")
    assert {f"{TAG}_{plan}.png" for plan in PLANS} < set(found)
    assert {"kv_cache_quant_compare.png", "chars_throughput_vs_context.png", "dse_pareto.png", "dse_knobs.png"} < set(
        found
    )
    assert out.splitlines()[-1] == f"{len(found)} files"
    assert out.count("wrote ") == len(found)
    assert "note: chars_throughput_vs_sink: not drawn, no row has window on\n" in err
    assert results.read_bytes() == before


def test_the_same_bytes_again_and_as_svg(results: Path, tmp_path: Path) -> None:
    for out in ("a/deep", "b"):
        assert main(["figures", "--csv", str(results), "--out", str(tmp_path / out), "--svg"]) == 0
    found = names(tmp_path / "b")
    assert found == names(tmp_path / "a/deep")
    assert sum(name.endswith(".svg") for name in found) == len(found) // 2
    for name in found:
        assert (tmp_path / "a/deep" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def damaged(path: Path) -> list[str]:
    path.write_text(path.read_text() + "half a row\n")
    return [str(path)]


def only_a_header(path: Path) -> list[str]:
    path.write_text(path.read_text().partition("\n")[0] + "\n")
    return [str(path)]


def no_csv_of_ours(path: Path) -> list[str]:
    path.write_text("a,b\n1,2\n")
    return [str(path)]


def missing(path: Path) -> list[str]:
    return [str(path), str(path.parent / "none.csv")]


def twice(path: Path) -> list[str]:
    return [str(path), str(path.parent / "." / path.name)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "has 1 field, 16 are needed"),
        (only_a_header, "no row to draw in"),
        (no_csv_of_ours, "is no design-space CSV"),
        (missing, "none.csv: cannot be read"),
        (twice, "is given more than once"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, message: str
) -> None:
    assert callable(spoil)
    assert main(["figures", "--csv", *spoil(results), "--out", str(tmp_path / "out")]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert names(tmp_path) == [results.name]


@pytest.mark.parametrize("out", ["x.png", "a_file"])
def test_the_output_is_a_folder(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    (tmp_path / "a_file").touch()
    assert main(["figures", "--csv", str(results), "--out", str(tmp_path / out)]) == 4
    assert f"--out={tmp_path / out}" in capsys.readouterr().err


def test_a_foreign_column_is_said_and_the_rest_drawn(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, *lines = results.read_text().splitlines()
    results.write_text("\n".join([header + ",note", *(line + ",x" for line in lines)]) + "\n")
    assert main(["figures", "--csv", str(results)]) == 0
    assert f"note: {results}: the column 'note' ignored\n" in capsys.readouterr().err
    assert f"{TAG}_mem_total_vs_context.png" in names(results.parent / "mem_plots")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["figures", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "python -m kvsuite figures --csv kv_cache_dse_*.csv --out mem_plots" in out
    with pytest.raises(SystemExit) as caught:
        main(["figures"])
    assert caught.value.code == 2


def test_drawing_needs_neither_torch_nor_pytest_nor_pyplot(results: Path) -> None:
    code = (
        "import sys\n"
        "from kvsuite.__main__ import main\n"
        f"assert main(['figures', '--csv', {str(results)!r}]) == 0\n"
        "loaded = {'torch', 'transformers', 'pytest', 'matplotlib.pyplot', 'pandas'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_csvs_of_several_suites_are_each_drawn_by_their_own(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "renamed.csv"
    other.write_bytes((Path(__file__).parents[1] / "data" / "perplexity_original.csv").read_bytes())
    assert main(["figures", "--csv", str(other), str(results), "--out", str(tmp_path / "out")]) == 0
    assert {"renamed_ppl_vs_quant.png", "dse_knobs.png"} <= set(names(tmp_path / "out"))
    stranger = tmp_path / "stranger.csv"
    stranger.write_text("a,b\n1,2\n")
    for command in (["figures", "--csv", str(stranger)], ["report", str(stranger)]):
        assert main(command) == 4
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line == (
            f"error: {stranger}: is no CSV that a suite draws, by its name or its columns (a, b, ...); give a CSV of kvsuite "
            "or of the original program"
        )
