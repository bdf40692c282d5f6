from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from kvsuite.errors import UserError
from kvsuite.reporting.figures.perplexity import build_figures, draw_perplexity
from kvsuite.reporting.perplexity_csv import COLUMNS, read_rows

SAMPLE = Path(__file__).parents[1] / "data" / "perplexity_original.csv"


def row(ppl: float, **fields: Any) -> dict[str, Any]:
    common = {"hf_model": "smollm2", "device": "cpu", "max_length": 2048, "stride": 512, "split": "test", "ppl": ppl}
    common |= {
        "load_in_4bit": 0,
        "load_in_8bit": 0,
        "fake_q3bit": 0,
        "dataset": "wikitext2",
        "text_sha256": "c5b5caea5b",
    }
    common |= {"num_targets": 4999, "dtype": "float32", "protocol": "hf-strided", "perplexity_se": 0.5, "bos": "none"}
    return dict.fromkeys(COLUMNS) | common | fields


def bars(axes: Axes) -> dict[str, float]:
    labels = [text.get_text() for text in axes.get_xticklabels()]
    return dict(zip(labels, (patch.get_height() for patch in axes.containers[0]), strict=True))


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def whiskers(axes: Axes) -> list[tuple[float, float, float]]:
    """(x, low, high) of each error bar."""
    found = [c for c in axes.containers if type(c).__name__ == "ErrorbarContainer"]
    return [(s[0][0], s[0][1], s[1][1]) for c in found for s in c.lines[2][0].get_segments()]


def caption(figure: Any) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def original(dataset: str) -> list[dict[str, Any]]:
    return [each | {"dataset": dataset} for each in read_rows(SAMPLE)]


def test_the_originals_figure() -> None:
    figures = build_figures(original("wikitext2"))
    assert list(figures) == ["wikitext2"]
    figure = figures["wikitext2"]
    (axes,) = figure.axes
    assert figure.get_suptitle() == "wikitext2 PPL vs quantization"
    assert axes.get_ylabel() == "PPL (wikitext2)"
    assert axes.get_xlabel() == "quantization"
    assert bars(axes) == {"fp16": 5.463742232026599, "fake_q3": 15.250324658841208, "4bit": 5.825128408723714}
    assert words(axes) == ["5.46", "15.25", "5.83"]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {30.0}
    title = axes.get_title()
    for fact in ("meta-llama/Meta-Llama-3-8B", "2048/512", "test split", "original program and formula"):
        assert fact in title.replace("\n", " ")
    assert whiskers(axes) == []
    assert "no standard error" in caption(figure)


def test_wikitext103_is_never_a_second_result() -> None:
    figures = build_figures(original("wikitext2") + original("wikitext103"))
    assert list(figures) == ["wikitext2"]
    (axes,) = figures["wikitext2"].axes
    assert len(bars(axes)) == 3
    assert "wikitext103 (test): same text as wikitext2, one result." in caption(figures["wikitext2"])
    alone = build_figures(original("wikitext103"))
    assert list(alone) == ["wikitext103"]
    assert "Same text as wikitext2" in caption(alone["wikitext103"])


@pytest.mark.parametrize("names", [("wikitext2", "wikitext103"), ("wikitext103", "wikitext2"), ("mine", "copy")])
def test_equal_hashes_are_one_text(names: tuple[str, str]) -> None:
    figures = build_figures([row(20.0, dataset=names[0]), row(20.0, dataset=names[1])])
    (dataset,) = figures
    assert dataset == ("wikitext2" if "wikitext2" in names else names[0])
    assert len(bars(figures[dataset].axes[0])) == 1
    assert "same text as" in caption(figures[dataset])


def test_other_texts_are_other_figures() -> None:
    figures = build_figures([row(20.0), row(30.0, dataset="pg19", text_sha256="aa"), *original("c4")])
    assert list(figures) == ["wikitext2", "pg19", "c4"]
    # the training split of wikitext103 is a text of its own
    trained = [each | {"split": "train"} for each in original("wikitext103")]
    assert list(build_figures(original("wikitext2") + trained)) == ["wikitext2", "wikitext103"]


def test_whiskers_are_one_standard_error_where_known() -> None:
    rows = [row(20.0), row(25.0, quantization="4bit", perplexity_se=None), row(30.0, quantization="fake_q3")]
    figure = build_figures(rows)["wikitext2"]
    assert whiskers(figure.axes[0]) == [(0, 19.5, 20.5), (2, 29.5, 30.5)]
    assert "1 standard error" in caption(figure)
    assert "No whisker" in caption(figure)


def test_the_last_row_of_a_case_counts() -> None:
    figure = build_figures([row(20.0), row(25.0, quantization="4bit"), row(21.0)])["wikitext2"]
    assert bars(figure.axes[0]) == {"float32": 21.0, "4bit": 25.0}
    assert "3 rows, the last one of each case drawn" in caption(figure)


def test_models_and_protocols_have_panels_of_their_own_with_one_scale() -> None:
    rows = [
        row(20.0),
        row(40.0, protocol="disjoint", stride=2048),
        row(10.0, hf_model="other"),
        row(9.0, max_length=512),
    ]
    axes = build_figures(rows)["wikitext2"].axes
    titles = [each.get_title().replace("\n", " ") for each in axes]
    assert [list(bars(each).values()) for each in axes] == [[20.0], [40.0], [10.0], [9.0]]
    assert "smollm2 hf-strided, 2048/512 test split, 4,999 scored tokens" in titles[0]
    assert "disjoint, 2048 test" in titles[1]
    assert titles[2].startswith("other ")
    assert len({each.get_ylim() for each in axes}) == 1
    assert axes[0].get_ylim()[0] == 0
    assert axes[0].get_ylim()[1] > 40.5


def test_what_differs_in_dtype_or_device_is_told_apart() -> None:
    rows = [
        row(20.0),
        row(20.1, device="cuda:0"),
        row(22.0, quantization="q4f16_1"),
        row(22.1, quantization="q4f16_1", dtype="bfloat16"),
    ]
    labels = list(bars(build_figures(rows)["wikitext2"].axes[0]))
    assert labels == ["float32 (cpu)", "float32 (cuda)", "q4f16_1 (float32)", "q4f16_1 (bfloat16)"]


def test_a_format_has_one_colour_in_all_panels() -> None:
    rows = [row(20.0), row(25.0, quantization="4bit"), row(30.0, quantization="8bit", hf_model="b")]
    rows.append(row(31.0, quantization="4bit", hf_model="b"))
    first, second = build_figures(rows)["wikitext2"].axes
    colours = [[to_hex(patch.get_facecolor()) for patch in axes.containers[0]] for axes in (first, second)]
    assert colours[0][1] == colours[1][1]
    assert len({colours[0][0], colours[0][1], colours[1][0]}) == 3


def test_names_are_not_formulas() -> None:
    figure = build_figures([row(20.0, hf_model="a$b$_c", dataset="d$x$")])["d$x$"]
    assert not figure.axes[0].title.get_parse_math()
    assert not figure.axes[0].yaxis.label.get_parse_math()


def test_files_are_written_and_repeat(tmp_path: Path) -> None:
    rows = [row(20.0), row(25.0, quantization="4bit", hf_model="other")]
    paths = draw_perplexity(rows, tmp_path)
    assert [path.name for path in paths] == ["wikitext2_ppl_vs_quant.png", "wikitext2_ppl_vs_quant.svg"]
    before = [path.read_bytes() for path in paths]
    draw_perplexity(rows, tmp_path)
    assert [path.read_bytes() for path in paths] == before
    png = before[0]
    place = png.index(b"pHYs") + 4
    dots_per_metre, _ = struct.unpack(">II", png[place : place + 8])
    assert round(dots_per_metre * 0.0254) == 200


def test_nothing_to_draw() -> None:
    with pytest.raises(UserError, match="no perplexity row to draw"):
        build_figures([])
