from __future__ import annotations

import math

import pytest

from kvsuite.console import console_text
from kvsuite.errors import UserError
from kvsuite.reporting.aggregate import by_name
from kvsuite.suites.compression.rows import baseline_for
from kvsuite.suites.compression.table import comparison_table as drawn_table

GIB = 1024**3


def comparison_table(rows):
    return console_text(drawn_table(rows))


def published(row, name, ttft, tpot, throughput, perplexity, accuracy, **more):
    """A row whose headline numbers are the given ones, from published or sample tables."""
    tokens = 10_000
    built = row(
        name,
        tpots=(tpot,),
        throughput=throughput,
        texts=((tokens * math.log(perplexity), tokens, round(tokens * accuracy)),),
        **more,
    )
    built["metrics"]["ttft_s"]["value"] = ttft
    return built


def test_layout_is_the_originals(row):
    base = published(row, "baseline", 0.0123, 0.0045, 156.78, 42.35, 0.3567, peak_vram=int(5.23 * GIB) + 1,
                     cache=(2000.0, 2000.0, 2000.0), ratio=(1.0, 0.0), kv_bytes=5 * 2**20)  # fmt: skip
    lines = comparison_table([base]).splitlines()
    assert lines[0][:100] == (
        f"{'Method':<25} {'TTFT(s)':>10} {'TPOT(s)':>10} {'Thruput':>10} {'PPL':>10} {'Acc':>10} {'VRAM(GB)':>10} "
        f"{'Cache':>8}"
    )
    assert lines[0][100:].split() == ["TPOT±", "PPL±", "PPL/full", "KV", "MiB"]
    assert lines[1] == "-" * len(lines[0])
    assert lines[2][:100] == (
        "baseline                      0.0123     0.0045     156.78      42.35     35.67%       5.23     2000"
    )
    assert lines[2][100:].split() == ["n/a", "0.85", "1.0000±0.0000", "5.00"]
    assert lines[3] == "=" * len(lines[0])


def test_published_changes(row):
    text = comparison_table(
        [
            published(row, "baseline", 0.0251, 0.0122, 81.36, 15.48, 0.4777, kv_bytes=655_032_320),
            published(row, "streaming_512", 0.0087, 0.0102, 96.73, 15.92, 0.4757, kv_bytes=198_225_920),
        ]
    )
    (line,) = [line for line in text.partition("Change against baseline")[2].splitlines() if "streaming_512" in line]
    # of a single round nobody knows what a difference of times is worth
    assert line.split() == ["streaming_512", "≈+18.9%", "≈+16.4%", "+2.8%", "-0.4%", "-69.7%"]


def test_no_change_has_no_negative_zero(row):
    text = comparison_table([row("baseline"), row("streaming_32")])
    assert text.rstrip().count("+0.0%") == 5
    assert "-0.0%" not in text


def test_spread_columns(row):
    # t(0.975, 2) = 4.303; std of 10, 11, 12 is 1: half width 4.303 / sqrt(3) = 2.484 of 11
    cells = comparison_table([row(tpots=(0.010, 0.011, 0.012), ratio=(1.0284, 0.0011))]).splitlines()[2].split()
    assert cells[8] == "22.6%"
    assert cells[10] == "1.0284±0.0022"


def test_missing_values_have_one_footnote_each(rows):
    text = comparison_table(rows)
    assert text.count("not measured on cpu") == 1
    assert "VRAM: not measured on cpu (all cases)" in text.splitlines()
    for line in text.splitlines()[2:7]:
        assert line[:100].split()[6] == "n/a"
    assert "0.00 " not in text


def test_partial_footnotes_name_their_cases(row):
    text = comparison_table([row("baseline", ratio=None), row("streaming_32", tpots=(0.01,))])
    assert "PPL/full: not asked for (baseline)" in text.splitlines()
    assert "TPOT±: needs at least 2 rounds (streaming_32)" in text.splitlines()


def test_failed_case_prints_its_reason_instead_of_numbers(row):
    error = {"type": "OutOfMemoryError", "message": "tried to\n allocate 20 MiB", "traceback": ""}
    text = comparison_table(
        [
            row("baseline"),
            row("streaming_32", status="oom", error=error),
            row("kvpress_knorm", status="skipped", reason="pip install --no-deps kvpress"),
        ]
    )
    lines = text.splitlines()
    assert lines[3].split(maxsplit=1) == ["streaming_32", "oom: OutOfMemoryError: tried to allocate 20 MiB"]
    assert lines[4].split(maxsplit=1) == ["kvpress_knorm", "skipped: pip install --no-deps kvpress"]
    assert "Change against baseline: none" in text


def test_without_a_finished_baseline_no_change_is_printed(row):
    assert "the run has no baseline" in comparison_table([row()])
    failed = comparison_table([row("baseline", status="oom"), row()])
    assert "Change against baseline: none" in failed


def test_long_names_keep_the_columns(row):
    name = "fix512_keep_low_kr0.5_positions_cache_skip_layers_0-1"
    lines = comparison_table([row("baseline"), row(name)]).splitlines()
    assert {len(line) for line in (*lines[:3], lines[3])} == {len(lines[0])}
    assert lines[0].index("TTFT(s)") > len(name)


def test_warnings_are_printed(row):
    warned = row("streaming_32", warnings=["past the trained length"])
    assert "warning: past the trained length (streaming_32)" in comparison_table([row("baseline"), warned]).splitlines()


def test_empty_selection_is_refused():
    with pytest.raises(UserError, match="no compression case"):
        comparison_table([])


def test_labels_never_merge_two_cases(row):
    assert list(by_name([row("a"), row("b")])) == ["a", "b"]
    assert list(by_name([row("a"), row("a", engine="nano"), row("b")])) == ["hf-a", "nano-a", "b"]
    other = row("a") | {"id": "elsewhere/test_x.py::t[hf-a]"}
    assert len(by_name([row("a"), other])) == 2


def test_baseline_is_the_one_of_the_same_setting(row):
    rows = [row("baseline", engine="nano"), row("baseline"), row("streaming_32")]
    assert baseline_for(rows[2], rows) is rows[1]
    rows[2]["case"]["dtype"] = "float16"
    assert baseline_for(rows[2], rows) is None


def timed(row, name, tpots):
    return row(name, tpots=tpots, throughput=tuple(1 / tpot for tpot in tpots), ratio=None)


def test_a_difference_inside_its_noise_is_marked(row):
    rows = [
        timed(row, "baseline", (0.0100, 0.0101, 0.0099)),
        timed(row, "faster", (0.0080, 0.0081, 0.0079)),
        timed(row, "noisy", (0.0080, 0.0160, 0.0041)),
        timed(row, "alike", (0.0101, 0.0100, 0.0099)),
    ]
    table = comparison_table(rows)
    changes = {line.split()[0]: line.split()[1:3] for line in table.partition("Change against")[2].splitlines() if line}
    assert changes["faster"] == ["+25.0%", "+20.0%"]
    assert changes["noisy"] == ["≈+25.0%", "≈+20.0%"]
    assert changes["alike"] == ["≈+0.0%", "≈+0.0%"]
    assert "≈: inside the noise of the rounds" in table
    assert "≈" not in comparison_table(rows[:2])


def test_of_one_round_no_difference_is_known(row):
    rows = [timed(row, "baseline", (0.010,)), timed(row, "other", (0.002,))]
    assert "≈+80.0%" in comparison_table(rows)


def test_a_reason_is_whole_and_of_a_long_error_the_middle_is_left_out(row) -> None:
    reason = "engine x: " + "no library " * 30 + "; use --kv-device=cpu"
    skipped = row("streaming_32", status="skipped", reason=reason)
    broken = row("streaming_64", status="error", error={"type": "E", "message": "a" * 4000 + " give another"})
    table = " ".join(comparison_table([row("baseline"), skipped, broken]).split())
    assert f"skipped: {' '.join(reason.split())}" in table
    assert "error: E: aaa" in table
    assert "give another" in table
    assert len(table) < 2500
