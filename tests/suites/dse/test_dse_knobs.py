from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import pytest
from dse_samples import Q0, Q4, own_sheets, record, sheet
from matplotlib.figure import Figure

from kvsuite.suites.dse.csv_files import CsvSheet
from kvsuite.suites.dse.figures.knobs import _pairs, draw_knobs, elasticities, format_ratios, signed
from kvsuite.suites.dse.figures.points import Sample, samples_of


def read(*sheets: CsvSheet) -> list[Sample]:
    return [sample for each in sheets for sample in samples_of(each)]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_elasticity_of_a_power_law_is_its_power() -> None:
    found = elasticities(read(own_sheets()[3]), "ttft_s")  # context / 2e4 * (64 / chunk) ** 0.2
    assert found["context_window_size"].values == pytest.approx([1.0] * 20)
    assert found["prefill_chunk_size"].values == pytest.approx([-0.2] * 20)
    assert found["max_batch_size"].values == pytest.approx([0.0] * 20)


def test_all_pairs_of_points_that_differ_in_one_axis_alone() -> None:
    rows = [record(context, batch=batch) for context, batch in product((256, 512, 1024), (1, 2))]
    found = elasticities(read(own_sheets(rows)[0]), "kvcache_mb")
    assert len(found["context_window_size"].values) == 2 * 3
    assert len(found["max_batch_size"].values) == 3
    assert found["prefill_chunk_size"].state == "fixed"


def test_what_has_no_logarithm_is_a_ratio() -> None:
    found = elasticities(read(own_sheets()[1]), "perplexity")
    assert found["attention_sink_size"].values == ()
    assert sorted(set(found["attention_sink_size"].steps)) == pytest.approx(
        [(18 + 4 / 9 + 64 / w) / (22 + 64 / w) for w in (128, 64)]
    )
    # from off to a window, at sink 0
    assert len(found["sliding_window_size"].steps) == 2 * 8
    assert len(found["sliding_window_size"].values) == 2 * 8


def test_the_engines_estimate() -> None:
    found = elasticities(read(sheet("results")), "kvcache_mb")
    assert found["context_window_size"].values == pytest.approx([math.log2(1234.072 / 722.068)] * 12, abs=1e-4)
    for axis in ("prefill_chunk_size", "max_batch_size", "sliding_window_size", "attention_sink_size"):
        assert found[axis].state == "inert"


def test_an_inert_axis_has_no_elasticity() -> None:
    found = elasticities(read(sheet("metrics")), "decode_tok_s")
    assert all((each.state, each.values) == ("inert", ()) for each in found.values())


def test_formats_are_compared_at_equal_points() -> None:
    results, metrics = read(sheet("results"), sheet("results", Q0)), read(sheet("metrics"), sheet("metrics", Q0))
    found = format_ratios(results, metrics, [Q4, Q0], ["total_mb", "decode_tok_s", "ttft_s"])
    assert list(found) == [Q0, Q4]  # the larger one is the reference
    assert set(found[Q0]["total_mb"]) == {1.0}
    # 12 points of batch 1 in both files, of three runs each
    assert {len(ratios) for ratios in found[Q4].values()} == {12}
    assert max(found[Q4]["total_mb"]) < 0.5
    assert min(found[Q4]["decode_tok_s"]) > 1.9
    # a computed prompt is not set against one from the prefix cache
    assert max(found[Q4]["ttft_s"]) < 1


def test_one_file_has_no_formats() -> None:
    assert format_ratios(read(sheet("results")), [], [Q4], ["total_mb"]) == {}


def test_the_page() -> None:
    figure = draw_knobs(read(*own_sheets()[:2]), read(*own_sheets()[2:]), ["Source: x."])
    assert isinstance(figure, Figure)
    titles = [axes.get_title() for axes in figure.axes][:3]
    assert titles[:2] == ["SmolLM2-q0f16", "SmolLM2-q4f16_1"]
    assert titles[2].startswith("SmolLM2\nthe weight format")
    said = words(figure)
    assert len(said) == 2 * 5 * 8 + 2 * 8
    assert "+1.00\n+1.00 … +1.00\n20 pairs" in said
    assert "× 1.05\n1.05 … 1.06\n40 pairs" in said
    assert "on: × 0.844\n0.842 … 0.845\n16 pairs" in said


def test_ratios_are_never_between_models() -> None:
    rows = [record(context, quantization=form) for context in (256, 512) for form in ("q0f16", "q4f16_1")]
    other = []
    for row in rows:
        twin = copy.deepcopy(row)
        twin["case"]["model"] = "meta/Other-Model"
        for metric in ("kv_bytes_exact", "mem_weights_bytes", "mem_measured_peak_bytes"):
            twin["metrics"][metric]["value"] *= 5
        other.append(twin)
    sheets = own_sheets([*rows, *other])
    figure = draw_knobs(read(*sheets[: len(sheets) // 2]), read(*sheets[len(sheets) // 2 :]), [])
    assert isinstance(figure, Figure)
    tables = {axes.get_title(): [text.get_text() for text in axes.texts] for axes in figure.axes if axes.get_title()}
    ratios = {title: texts for title, texts in tables.items() if "weight format" in title}
    assert [title.partition("\n")[0] for title in ratios] == ["SmolLM2", "Other-Model"]
    # the same ratio of memory in both, since both models' formats differ alike
    cells = [[text for text in texts if text.startswith("× ")] for texts in ratios.values()]
    assert cells[0] == cells[1] != []
    assert {sum(text == "reference" for text in texts) for texts in ratios.values()} == {8}
    # one format each of two models: nothing to compare
    single = own_sheets([rows[1], other[0]])
    alone = draw_knobs(read(*single[: len(single) // 2]), read(*single[len(single) // 2 :]), [])
    assert isinstance(alone, Figure)
    assert not any("weight format" in axes.get_title() for axes in alone.axes)


def test_a_models_name_without_its_weight_format() -> None:
    assert {sample.model for sample in read(*own_sheets())} == {"SmolLM2"}
    assert {sample.model for sample in read(sheet("results"), sheet("metrics", Q0))} == {"Llama-3-8B-Instruct-MLC"}


def test_the_page_of_the_original_is_mostly_grey() -> None:
    figure = draw_knobs(read(sheet("results")), read(sheet("metrics")), [])
    assert isinstance(figure, Figure)
    said = words(figure)
    # no percentage beside it: what does not answer to an axis has no change along it
    assert sum(text == "inert" for text in said) == 5 * 5 + 4 + 2
    assert not any("%" in text for text in said)


def test_colours_say_better_or_worse() -> None:
    figure = draw_knobs(read(own_sheets()[0]), [], [])
    assert isinstance(figure, Figure)
    (axes,) = figure.axes[:1]
    shade: dict[str, Any] = {}
    for text, patch in zip(axes.texts, axes.patches, strict=True):
        shade[text.get_text()] = patch.get_facecolor()
    worse = shade["+1.00\n+1.00 … +1.00\n20 pairs"]  # memory or latency
    assert worse[0] > worse[1]


@pytest.mark.parametrize(
    ("number", "text"), [(0.5, "+0.50"), (-1.234, "-1.23"), (0.0123, "+0.012"), (0.0, "0"), (-1e-9, "0")]
)
def test_numbers(number: float, text: str) -> None:
    assert signed(number) == text


def test_nothing_to_say() -> None:
    assert draw_knobs([], [], []) == "the files have no number that a figure shows"


def test_one_pair_is_one_pair() -> None:
    assert (_pairs([2.0]), _pairs([2.0, 3.0])) == ("1 pair", "2 pairs")
