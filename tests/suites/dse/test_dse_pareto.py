from __future__ import annotations

from dse_samples import Q0, Q4, changed, own_sheets, sheet
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from kvsuite.suites.dse.csv_files import CsvSheet
from kvsuite.suites.dse.figures.pareto import Point, _memory, _panel, draw_pareto, front, pareto_points
from kvsuite.suites.dse.figures.points import Sample, Spread, samples_of


def read(*sheets: CsvSheet) -> list[Sample]:
    return [sample for each in sheets for sample in samples_of(each)]


def point(memory: float, speed: float, quality: float | None = None, family: str = "m") -> Point:
    return Point(family, (family, "cpu", None), (), memory, Spread(speed, speed, speed, 1), quality)


def test_the_front() -> None:
    small, fast, beaten, both = point(1, 1), point(9, 9), point(9, 8), point(1, 1)
    assert front([small, fast, beaten, both]) == [small, fast, both]
    assert front([point(1, 9), point(2, 8, family="other")]) == [point(1, 9), point(2, 8, family="other")]


def test_a_speed_inside_the_repeats_of_another_is_no_better() -> None:
    def spread(memory: float, low: float, middle: float, high: float) -> Point:
        return Point("m", ("m", "cpu", None), (), memory, Spread(middle, low, high, 3), None)

    small, larger, faster = spread(1, 8, 10, 12), spread(2, 9, 11, 13), spread(3, 14, 15, 16)
    assert front([small, larger, faster]) == [small, faster]
    # of one memory neither is the best by chance
    twin = spread(1, 9, 11, 13)
    assert front([small, twin]) == [small, twin]


def test_quality_counts_where_all_points_have_it() -> None:
    best, worse = point(2, 5, 10.0), point(1, 6, 20.0)
    assert front([best, worse]) == [best, worse]
    assert front([point(2, 5), worse]) == [worse]


numbers = st.integers(1, 6).map(float)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(triples: list[tuple[float, float, float]]) -> None:
    points = [point(*triple) for triple in triples]
    found = front(points)
    assert found
    for mine in points:
        beaten = any(
            o.memory <= mine.memory
            and o.speed.middle >= mine.speed.middle
            and (o.quality or 0) <= (mine.quality or 0)
            and (o.memory, o.speed.middle, o.quality) != (mine.memory, mine.speed.middle, mine.quality)
            for o in points
        )
        assert (mine in found) is not beaten


def test_noise_along_inert_axes_makes_no_front() -> None:
    points = pareto_points(read(sheet("results")), read(sheet("metrics")), "decode_tok_s")
    # context, chunk and batch move the memory; nothing moves the speed
    assert {axis for each in points for axis, _ in each.settings} == {
        "context_window_size", "prefill_chunk_size", "max_batch_size",
    }  # fmt: skip
    assert len({each.speed for each in points if "3 runs" in each.label}) == 1
    best = front(points)
    assert {each.memory for each in best} == {min(each.memory for each in points)}


def test_a_range_is_shown_and_what_is_missing_is_said() -> None:
    figure = draw_pareto(
        read(sheet("results"), sheet("results", Q0)), read(sheet("metrics"), sheet("metrics", Q0)), ["Source: x."]
    )
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "total memory (MB)"
    assert axes.get_ylabel() == "decode (tok/s), higher is better"
    said = " ".join(figure.get_supxlabel().split())
    assert "Quality is not measured at all points" in said
    assert "Not beaten: Llama-3-8B-Instruct-q4f16_1-MLC" in said
    assert "context 4 096, prefill chunk 1 024, batch 1: 5472 MB" in said
    assert (_memory(0.4092), _memory(13.81), _memory(5472.4)) == ("0.409 MB", "13.8 MB", "5472 MB")
    assert "Speeds whose bars overlap count as alike" in said
    rings = [line for line in axes.lines if line.get_gid() == "front"]
    # of one memory, in two conditions whose speeds overlap
    assert sum(len(line.get_xdata()) for line in rings) == 2
    assert axes.collections  # bars


def test_three_numbers_where_all_are_measured() -> None:
    sheets = own_sheets()
    figure = draw_pareto(read(*sheets[:2]), read(*sheets[2:]), [])
    assert isinstance(figure, Figure)
    speed, quality = figure.axes
    assert quality.get_ylabel() == "perplexity, lower is better"
    assert figure.get_suptitle().endswith("lower perplexity")
    rings = [{len(line.get_xdata()) for line in axes.lines if line.get_gid() == "front"} for axes in (speed, quality)]
    assert rings[0] == rings[1]
    # a full cache in the better format is beaten by nothing: no point has a lower perplexity
    points = pareto_points(read(*sheets[:2]), read(*sheets[2:]), "decode_tok_s")
    assert any(each.quality == 17.0 for each in front(points))


def test_machines_are_not_set_against_each_other() -> None:
    results, metrics = own_sheets()[1], own_sheets()[3]
    slow = [changed(each, host="slow") for each in (results, metrics)]
    points = pareto_points(read(results, slow[0]), read(metrics, slow[1]), "decode_tok_s")
    assert len({each.family for each in points}) == 2
    assert {each.family for each in front(points)} == {each.family for each in points}


def test_weight_formats_of_one_model_are() -> None:
    points = pareto_points(
        read(sheet("results"), sheet("results", Q0)), read(sheet("metrics"), sheet("metrics", Q0)), "decode_tok_s"
    )
    assert {each.family[0] for each in points} == {"Llama-3-8B-Instruct-MLC"}


def test_what_it_needs() -> None:
    assert "it needs memory and speed" in str(draw_pareto([], read(sheet("metrics")), []))
    other = CsvSheet(sheet("metrics").table, "other", "x", sheet("metrics").rows)
    no_text = changed(sheet("results"), time_s=None)
    assert "no point has both" in str(draw_pareto(read(no_text), read(other), []))
    assert Q4 in no_text.tag


def test_points_lie_inside_of_their_panel() -> None:
    points = [point(530.0, 15.0), point(540.0, 17.0)]
    axes = Figure().subplots()
    _panel(axes, points, points, "decode_tok_s", ["m"])
    low, high = axes.get_xlim()
    # from 0 on, and the largest one's ring, 12 points across, is not cut
    assert low == 0
    assert (high - 540.0) / high > 0.03
