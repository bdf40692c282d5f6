from __future__ import annotations

import struct
from typing import Any

import pytest
from coarse_figures import as_fine_as_asked
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from perplexity_samples import drawn_row as row
from perplexity_samples import original

from kvsuite.errors import UserError
from kvsuite.quantization.registry import QUANTIZATIONS, label
from kvsuite.suites.perplexity.figure import COLOURS, build_figures, render_perplexity


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
    for fact in ("meta-llama/Meta-Llama-3-8B", "2048/512", "test split", "strided (original program), its own formula"):
        assert fact in title.replace("\n", " ")
    assert whiskers(axes) == []
    assert "no standard error" in caption(figure)


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
    assert "smollm2 strided (original program), 2048/512 test split, 4,999 scored tokens" in titles[0]
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


def test_files_repeat() -> None:
    rows = [row(20.0), row(25.0, quantization="4bit", hf_model="other")]
    with as_fine_as_asked():
        files = render_perplexity(rows)
        assert list(files) == ["wikitext2_ppl_vs_quant.png", "wikitext2_ppl_vs_quant.svg"]
        assert render_perplexity(rows) == files
    png = files["wikitext2_ppl_vs_quant.png"]
    place = png.index(b"pHYs") + 4
    dots_per_metre, _ = struct.unpack(">II", png[place : place + 8])
    assert round(dots_per_metre * 0.0254) == 200


def test_nothing_to_draw() -> None:
    with pytest.raises(UserError, match="no perplexity row to draw"):
        build_figures([])


def test_a_device_of_a_row_without_dtype_is_a_bar_of_its_own() -> None:
    rows = [row(20.0, dtype=None, quantization="fp16"), row(21.0, dtype="fp16", quantization="fp16")]
    assert bars(build_figures(rows)["wikitext2"].axes[0]) == {"fp16 (dtype not in the file)": 20.0, "fp16": 21.0}


def colours_of(formats: list[str]) -> list[str]:
    figure = build_figures([row(20.0 + at, quantization=name) for at, name in enumerate(formats)])["wikitext2"]
    return [to_hex(patch.get_facecolor()) for patch in figure.axes[0].containers[0]]


def test_every_known_format_has_a_colour_of_its_own() -> None:
    loaded = [label("none", dtype) for dtype in ("float32", "bfloat16", "float16")]
    formats = [*loaded, *(name for name in QUANTIZATIONS if name != "none")]
    assert set(formats) <= set(COLOURS)
    assert len(formats) >= 12
    colours = colours_of(formats)
    assert len(set(colours)) == len(formats)
    # whatever else is in the figure
    assert colours_of(formats[::-1]) == colours[::-1]
    for colour in colours[:3]:
        assert colour[1:3] == colour[3:5] == colour[5:7]
    assert colours_of(["float32"])[0] == colours[0]


def test_unknown_formats_do_not_share_colours() -> None:
    colours = colours_of([f"format {index}" for index in range(24)])
    assert len(set(colours) | set(COLOURS.values())) == 24 + len(set(COLOURS.values()))


def test_a_logarithmic_axis_where_a_linear_one_would_hide_bars() -> None:
    rows = [row(20.0), row(1e6, quantization="fake_q3", hf_model="other")]
    first, second = build_figures(rows)["wikitext2"].axes
    assert first.get_yscale() == second.get_yscale() == "log"
    assert first.get_ylabel() == "PPL (wikitext2), logarithmic axis"
    assert first.get_ylim()[0] == 1
    assert first.get_ylim()[1] > 1e6
    (_, low), (_, high) = (first.transData.transform((0, value)) for value in (1, 20.0))
    assert high - low > 0.1 * first.bbox.height
    assert words(second) == ["1e+06"]
    first.figure.canvas.draw()
    assert [tick.get_text() for tick in first.get_yticklabels()][1:4] == ["1", "10", "100"]


@pytest.mark.parametrize(("ppl", "scale"), [(979.0, "linear"), (1000.0, "log")])
def test_the_axis_turns_at_fifty_to_one(ppl: float, scale: str) -> None:
    (axes,) = build_figures([row(20.0), row(ppl, quantization="fake_q3")])["wikitext2"].axes
    assert axes.get_yscale() == scale


def test_the_largest_numbers_are_drawn() -> None:
    largest = row(1.7e308, quantization="fake_q3", perplexity_se=1.7e308)
    render_perplexity([row(1.0, perplexity_se=5.0), largest])
    (axes,) = build_figures([largest])["wikitext2"].axes
    assert words(axes) == ["↑ 1.7e+308\noff scale"]


def test_a_bar_beyond_the_axis_ends_at_its_top_and_says_so() -> None:
    rows = [row(20.0), row(1e12, quantization="4bit", perplexity_se=1e300), row(1e300, quantization="fake_q3")]
    (axes,) = build_figures(rows)["wikitext2"].axes
    assert words(axes) == ["20.00", "1e+12", "↑ 1e+300\noff scale"]
    top = axes.get_ylim()[1]
    assert bars(axes) == {"float32": 20.0, "4bit": 1e12, "fake_q3": top}
    assert top > 1e12
    # a whisker that would be cut off has no end in the figure, and a bar that is has none
    assert [(x, high > top) for x, _, high in whiskers(axes)] == [(0, False), (1, True)]
    assert b"off scale" in render_perplexity(rows)["wikitext2_ppl_vs_quant.svg"]


def test_file_names_of_data_sets_stay_in_the_folder() -> None:
    names = ["../up", "a/b", "a_b", "wikitext2"]
    rows = [row(20.0, dataset=name, text_sha256=str(at)) for at, name in enumerate(names)]
    files = render_perplexity(rows)
    assert len(files) == 8
    assert not any("/" in name or name.startswith(".") for name in files)
    assert [figure.get_suptitle() for figure in build_figures(rows).values()] == [
        f"{name} PPL vs quantization" for name in names
    ]
