from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvsuite.reporting.figure_style import figure_bytes, house_style
from kvsuite.suites.pipeline.figures.arms import groups_of, marks_of
from kvsuite.suites.pipeline.figures.draw import MOST_ARMS, MOST_GROUPS, POINT_LABEL, spread_labels
from kvsuite.suites.pipeline.figures.latency import draw_latency
from kvsuite.suites.pipeline.figures.render import pipeline_figures
from kvsuite.suites.pipeline.figures.scatter import draw_front, draw_quality, draw_sm_share, pareto_front
from kvsuite.suites.pipeline.figures.throughput import draw_throughput
from kvsuite.suites.pipeline.figures.timeline import chosen, courses_of, draw_timeline
from kvsuite.suites.pipeline.suite import PipelineSuite
from tests.suites.pipeline.pipeline_rows import RUN, a_run, pipeline_row, simulated

NAMES = ("throughput", "latency", "front", "sm_share", "quality", "timeline")


def texts(figure: Figure | str) -> str:
    """What stands in a figure, a line a text."""
    assert not isinstance(figure, str), figure
    found: list[Any] = figure.findobj(Text)
    return "\n".join(text.get_text().replace("\n", " ") for text in found)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure | str]:
    groups = groups_of(a_run())
    drawings = (draw_throughput, draw_latency, draw_front, draw_sm_share, draw_quality, draw_timeline)
    return {name: draw(groups, RUN) for name, draw in zip(NAMES, drawings, strict=True)}


@pytest.mark.parametrize("name", ["throughput", "latency", "front", "quality"])
def test_every_arm_is_named(drawn: dict[str, Figure | str], name: str) -> None:
    assert {row["case"]["name"].partition("-bs12-")[2] for row in a_run()[:-1]} <= set(texts(drawn[name]).split("\n"))


def test_marks_in_the_names_are_explained_where_they_are(drawn: dict[str, Figure | str]) -> None:
    chunk, factor, sms = (
        "c: prompt tokens a step", "f: one of so many prompt tokens stays",
        "sm: SMs, or shares of them, of the decode and of the prompt lane",
    )  # fmt: skip
    assert f"In the names: {chunk}; {factor}; {sms}." in texts(drawn["throughput"])
    # the arms that the timeline shows
    assert "In the names: " in texts(drawn["timeline"])
    row = a_run()[0]

    def said(*names: str) -> list[str]:
        rows = [row | {"case": row["case"] | {"name": f"synthetic-long-bs12-{name}"}} for name in names]
        (group,) = groups_of(rows)
        return marks_of(group.arms)

    assert said("baseline", "compression-only") == []
    assert said("compression-only-mlp-f5-d4") == [
        f"In the names: {factor}; d: layers merged after each token behind a prompt."
    ]
    assert said("greenctx-only-sm0.75_0.25_free") == [
        f"In the names: {sms}; free: decode steps are not bound to theirs."
    ]


def test_the_front_explains_the_marks_that_it_has() -> None:
    [group] = groups_of(a_run())
    both = [arm for arm in group.arms if arm.variant in ("baseline", "compression-only")]
    said = texts(draw_front([replace(group, arms=tuple(both))], RUN))
    assert not [word for word in ("joined by a line", "quares", "pale") if word in said]
    whole = texts(draw_front([group], RUN))
    for variant, mark in (
        ("chunked", "quares: chunks"),
        ("streams-only", "riangles: two"),
        ("triad", "rosses: it chooses"),
    ):
        assert (mark in whole) == any(arm.variant == variant for arm in group.arms), mark
    assert "joined by a line. Squares: chunks; " in whole
    assert "pale: full caches." in whole


def test_the_case_that_failed_is_named_with_its_reason(drawn: dict[str, Figure | str]) -> None:
    said = "Without numbers: greenctx-only-sm7_7: skipped: --kv-greenctx-sms=7:7: no legal split of 132 SMs"
    assert said in texts(drawn["throughput"])


def test_throughput_in_units_of_the_baseline(drawn: dict[str, Figure | str]) -> None:
    rows = {row["case"]["name"].partition("-bs12-")[2]: row for row in a_run()}
    numbers = {name: rows[name]["metrics"]["output_tok_s"]["value"] for name in ("baseline", "compression-only-f5")}
    ratio = numbers["compression-only-f5"] / numbers["baseline"]
    assert f"{numbers['compression-only-f5']:.1f}  ({ratio:.2f}x)" in texts(drawn["throughput"])


def test_too_few_requests_for_a_percentile_are_said(drawn: dict[str, Figure | str]) -> None:
    assert "No p99 where there are fewer than 100 requests" in texts(drawn["latency"])
    front = texts(drawn["front"])
    assert "p90 in the place of p99, for which 100 requests are needed." in front
    assert "TTFT p90 from the scheduled arrival" in front


def test_a_hundred_requests_have_a_p99() -> None:
    served = simulated(requests=100, together=8)
    groups = groups_of([pipeline_row(arm, variant=arm, served=served) for arm in ("baseline", "chunked")])
    front = texts(draw_front(groups, RUN))
    assert "TTFT p99 from the scheduled arrival" in front
    assert "in the place of p99" not in front
    assert "No p99" not in texts(draw_latency(groups, RUN))


def test_the_split_of_a_point_of_the_share_curve(drawn: dict[str, Figure | str]) -> None:
    assert {"32/96", "64/64", "SMs of the decode lane"} <= set(texts(drawn["sm_share"]).split("\n"))


def test_lines_join_factors_and_partitions_of_one_way_to_merge() -> None:
    rows = []
    for layers in (None, 4):
        more: list[dict[str, Any]] = [{"variant": "compression-only", "factor": factor} for factor in (2.0, 5.0)]
        more += [{"variant": "greenctx-only", "factor": 5.0, "partition": sms} for sms in ((32, 96), (64, 64))]
        for at, one in enumerate(more):
            rows.append(pipeline_row(f"{one['variant']}-{at}-{layers}", policy="mean_pool", kl=0.1 * (at + 1), **one))
            rows[-1]["case"]["params"]["serving"]["layers_per_step"] = layers
    groups = groups_of(rows)
    for draw in (draw_quality, draw_front, draw_sm_share):
        figure: Any = draw(groups, RUN)
        for axes in (axes for part in figure.subfigs for axes in part.axes):
            joined = [len(line.get_xdata()) for line in axes.lines if line.get_alpha() == 0.6]
            assert set(joined) <= {1, 2}
            assert joined.count(2) == 2


def test_what_rows_do_not_have_is_not_drawn() -> None:
    rows = [
        pipeline_row("baseline", drop=("samples", "served_kld")),
        pipeline_row("chunked", chunk=64, drop=("samples", "served_kld")),
    ]
    assert set(PipelineSuite().figures(RUN, rows)) == {
        f"pipeline_{name}.{kind}" for name in ("throughput", "latency", "front") for kind in ("png", "svg")
    }
    groups = groups_of(rows)
    assert draw_quality(groups, RUN) == "quality against throughput: not measured: not measured here"
    assert "two partitions" in str(draw_sm_share(groups, RUN))
    assert "no record tells" in str(draw_timeline(groups, RUN))


def test_a_metric_that_nobody_has_says_why() -> None:
    rows = [pipeline_row("baseline", drop=("goodput_req_s",)), pipeline_row("chunked", drop=("goodput_req_s",))]
    assert "not measured: not measured here" in texts(draw_throughput(groups_of(rows), RUN))


def test_an_arm_without_a_number_has_no_bar() -> None:
    rows = [pipeline_row("baseline"), pipeline_row("chunked", drop=("output_tok_s", "ttft_p50_s", "ttft_p90_s"))]
    groups = groups_of(rows)
    assert "n/a" in texts(draw_throughput(groups, RUN)).split("\n")
    assert "n/a" in texts(draw_latency(groups, RUN)).split("\n")


def test_nothing_to_draw() -> None:
    assert pipeline_figures(RUN, [pipeline_row("baseline", status="error")]) == {}
    many = [pipeline_row(f"chunked-c{chunk}", variant="chunked", chunk=chunk + 8) for chunk in range(MOST_ARMS + 1)]
    assert pipeline_figures(RUN, many) == {}


@pytest.mark.parametrize("draw", [draw_throughput, draw_timeline])
def test_the_same_bytes_for_the_same_rows(draw: Any) -> None:
    rows = a_run()[:3]
    assert len({figure_bytes(draw(groups_of(rows), RUN), "svg") for _ in range(2)}) == 1


def test_groups_are_what_can_be_compared() -> None:
    rows = [*a_run(), pipeline_row("baseline", workload="light-dataset")]
    first, second = groups_of(rows)
    assert len(first.arms) == len(a_run()) - 1
    assert [arm.label for arm in second.arms] == ["baseline"]
    assert first.slo == (1.0, 0.025)
    assert "light-dataset, 8 requests" in second.title


def test_groups_that_have_no_room_are_named() -> None:
    rows = [pipeline_row("baseline", workload=f"work{number}") for number in range(MOST_GROUPS + 1)]
    text = texts(draw_throughput(groups_of(rows), RUN))
    assert f"more than {MOST_GROUPS} groups" in text
    assert f"work{MOST_GROUPS}" in text


def test_a_partition_under_a_controller_is_no_point_of_the_share_curve() -> None:
    rows = [row for row in a_run() if row["case"]["partition"]]
    for row in rows[:1]:
        row["case"]["params"]["serving"]["controller"] = "auto"
    assert "two partitions" in str(draw_sm_share(groups_of(rows), RUN))


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1), st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12
    )
)
def test_the_front(points: dict[str, tuple[float, float]]) -> None:
    front = pareto_front(points)
    for name, (x, y) in points.items():
        beaten = [o for o in points.values() if o[0] <= x and o[1] <= y and (o[0] < x or o[1] < y)]
        assert (name in front) == (not beaten)
    assert [points[name] for name in front] == sorted(points[name] for name in front)


def test_labels_of_one_place_do_not_lie_on_each_other() -> None:
    from matplotlib.transforms import Bbox

    with house_style():
        figure = Figure(figsize=(8, 5))
        axes = figure.subplots()
        axes.set_xlim(0, 2)
        axes.set_ylim(0, 2)
        for name in ("compression-only-f5", "greenctx-only", "triad", "streams-only"):
            axes.annotate(name, (1, 1), xytext=(8, 5), textcoords="offset points", gid=POINT_LABEL)
        figure.draw_without_rendering()
        spread_labels(axes)
        boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(Bbox.intersection(a, b) for at, a in enumerate(boxes) for b in boxes[at + 1 :])


def looked_at(rows: list[dict[str, Any]]) -> list[str]:
    (group,) = groups_of(rows)
    return [one.arm.label for one in chosen(courses_of(group))]


def test_runs_that_are_worth_a_look() -> None:
    assert looked_at(a_run()) == ["baseline", "greenctx-only-sm32_96", "triad"]
    assert looked_at(a_run()[1:4]) == ["compression-only-f2", "compression-only-f5", "chunked-c64"]


def test_the_timeline_tells_lanes_preemptions_and_decisions(drawn: dict[str, Figure | str]) -> None:
    text = texts(drawn["timeline"])
    assert {"one stream", "prompt lane", "decode lane", "preempted"} <= set(text.split("\n"))
    assert "triad: decision 1 at 0.00 s: pipeline prefill, sm_compress_ratio 0.25; decision 2 at 1.10 s" in text


def test_points_of_the_front(drawn: dict[str, Figure | str]) -> None:
    figure: Any = drawn["front"]
    (axes,) = [axes for part in figure.subfigs for axes in part.axes]
    rows = {row["case"]["name"].partition("-bs12-")[2]: row["metrics"] for row in a_run()[:-1]}
    points = {text.get_text(): text.xy for text in axes.texts}
    assert points == {
        name: (metrics["ttft_p90_s"]["value"], metrics["itl_p90_s"]["value"] * 1e3) for name, metrics in rows.items()
    }
