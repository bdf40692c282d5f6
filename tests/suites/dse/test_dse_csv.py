from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from dse_samples import DATA, PUBLISHED, Q4, RUN, record, sheet
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.case import model_tag
from kvsuite.errors import UserError
from kvsuite.foreign_text import csv_cell
from kvsuite.suites.dse.columns import AXES, KEY, METRICS, RESULTS, TABLES, format_field, series_tag
from kvsuite.suites.dse.csv_files import (
    append_rows,
    check_appendable,
    csv_text,
    file_name,
    read_sheet,
    tag_of,
)
from kvsuite.suites.dse.rows import csv_rows, metric_rows

HEADER = ",".join(RESULTS.original)
ROW = "HF://mlc-ai/a-q4f16_1-MLC,vulkan:0,4096,1024,1,-1,0,3,128,1,1.35,680,5472.212,4308.133,722.068,442.011"
METRIC = "m,vulkan:0,4096,1024,1,-1,0,3,128,decode_tokens_per_s,"


def again(path: Path) -> str:
    """The file written anew by its original columns."""
    found = read_sheet(path)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, found.table.original, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: format_field(name, row[name]) for name in found.table.original} for row in found.rows)
    return buffer.getvalue()


@pytest.mark.parametrize("path", sorted(DATA.glob("*.csv")), ids=lambda path: path.stem[-30:])
def test_the_originals_rows_come_back_byte_for_byte(path: Path) -> None:
    assert again(path).encode() == path.read_bytes()
    found = read_sheet(path)
    assert found.notes == ()
    assert found.tag in path.name
    assert all(list(row) == list(found.table.columns) for row in found.rows)
    assert all(row[name] is None for row in found.rows for name in found.table.added)


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published CSVs are not on this machine")
def test_the_published_files() -> None:
    paths = sorted(PUBLISHED.glob("kv_cache_dse_*.csv"))
    assert len(paths) == 8
    rows = {"results": 0, "metrics": 0}
    for path in paths:
        assert again(path).encode() == path.read_bytes(), path.name
        found = read_sheet(path)
        rows[found.table.kind] += len(found.rows)
        assert len({tuple(row[axis] for axis in AXES) for row in found.rows}) == 396
    assert rows == {"results": 1518 + 1188 + 2190 + 1188, "metrics": 22 * (506 + 396 + 867 + 396)}


def test_every_results_row_adds_up() -> None:
    for row in sheet("results").rows:
        parts = row["gpu_mem_params_mb"] + row["gpu_mem_kvcache_mb"] + row["gpu_mem_temp_mb"]
        assert abs(row["gpu_mem_total_mb"] - parts) <= 0.0015


def test_the_originals_columns_come_first_in_its_order() -> None:
    names = (
        "model,device,context_window_size,prefill_chunk_size,max_batch_size,sliding_window_size,attention_sink_size,"
        "num_runs,max_tokens,run_id,time_s,approx_chars,gpu_mem_total_mb,gpu_mem_params_mb,gpu_mem_kvcache_mb,"
        "gpu_mem_temp_mb"
    )
    assert ",".join(RESULTS.columns).startswith(names + ",engine,")
    assert (DATA / f"kv_cache_dse_results_{Q4}.csv").read_text().startswith(names + "\n")
    assert METRICS.columns[:11] == (*KEY, "metric_name", "metric_value")
    for table in TABLES:
        assert len(set(table.columns)) == len(table.columns)


def test_tags() -> None:
    tag = "Llama-3-8B-Instruct-q4f16_1-MLC"
    assert model_tag(f"HF://mlc-ai/{tag}") == tag
    assert model_tag(model_tag("a/b c:d/")) == model_tag("a/b c:d/") == "b_c_d"
    assert series_tag(f"HF://mlc-ai/{tag}", "q4f16_1") == tag
    assert series_tag("dummy:Llama-3-8B", "q4f16_1") == "dummy_Llama-3-8B-q4f16_1"
    assert series_tag("x-q4f16_1", "q4f16") == "x-q4f16_1-q4f16"
    assert series_tag("SmolLM2", None) == "SmolLM2"
    assert tag_of(Path("/x") / file_name(METRICS, tag)) == tag_of(Path(file_name(RESULTS, tag))) == tag
    assert tag_of(Path("mine.csv")) == "mine"


@given(st.text(max_size=40))
def test_a_tag_is_its_own_tag_and_stays_in_its_folder(model: str) -> None:
    tag = model_tag(model)
    assert model_tag(tag) == tag
    assert "/" not in tag
    assert tag.isascii()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "is no design-space CSV: it lacks the columns model, device"),
        (HEADER.replace(",time_s", ""), "lacks the column time_s"),
        (",".join(METRICS.original[:-1]), "lacks the column metric_value"),
        (HEADER + ",model", "has the column 'model' more than once"),
        (f"{HEADER}\n{ROW},1", "line 2 has 17 fields, 16 are needed"),
        (f"{HEADER}\nx", "line 2 has 1 field, 16 are needed"),
        (f"{HEADER}\n{ROW}\n{ROW.replace('1.35', 'fast')}", "line 3 is not a result (time_s is 'fast', no number)"),
        (f"{HEADER}\n{ROW.replace('1.35', '0')}", "time_s is 0, more than 0 is possible"),
        (f"{HEADER}\n{ROW.replace('4096', '4096.5')}", "context_window_size is '4096.5', no whole number"),
        (f"{HEADER}\n{ROW.replace('4096', '0')}", "context_window_size is 0, at least 1"),
        (f"{HEADER}\n{ROW.replace('4096', '')}", "context_window_size is empty"),
        (f"{HEADER}\n{ROW.replace(',-1,', ',-2,')}", "sliding_window_size is -2, at least -1"),
        (f"{HEADER}\n{ROW.replace('722.068', '-1')}", "gpu_mem_kvcache_mb is -1, at least 0"),
        (f"{HEADER}\n{ROW.replace('722.068', 'inf')}", "gpu_mem_kvcache_mb is inf"),
        (f'{HEADER}\n"{ROW}', "line 2 cannot be read as CSV"),
        (f"{','.join(METRICS.original)}\n{METRIC}fast", "metric_value is 'fast', no number"),
        (f"{HEADER},inert_axes\n{ROW},[1]", "inert_axes is '[1]', no JSON object"),
        (f"{HEADER},schema_version\n{ROW},2", "schema_version is 2, this kvsuite reads 1"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / file_name(RESULTS, "x")
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_sheet(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe")
    for name in ("a.csv", "b.csv"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            read_sheet(tmp_path / name)


def test_a_foreign_column_is_ignored_and_said(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{HEADER},note\n{ROW},hello\n")
    found = read_sheet(path)
    assert found.notes == (f"{path}: the column 'note' ignored",)
    assert "note" not in found.rows[0]


def test_a_rate_of_nothing_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{','.join(METRICS.original)}\n{METRIC}nan\n{METRIC}5\n")
    found = read_sheet(path)
    assert [row["metric_value"] for row in found.rows] == [None, 5]
    assert "1 metric value without a finite number left out" in found.notes[0]


def test_columns_in_another_order_and_what_pandas_saved(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / file_name(RESULTS, Q4)
    frame = pd.read_csv(DATA / path.name)
    frame["max_batch_size"] = frame["max_batch_size"].astype(float)
    frame[frame.columns[::-1]].to_csv(path, index=False)
    assert "8.0" in path.read_text()
    assert read_sheet(path).rows == sheet("results").rows


# append


def rows_of(**fields: Any) -> list[dict[str, Any]]:
    return csv_rows(RUN, [record(**fields)])


def test_written_read_and_written_again(tmp_path: Path) -> None:
    rows = rows_of() + rows_of(window=64, sink=8) + rows_of(context=512, quantization="q0f16")
    paths = append_rows(tmp_path, RESULTS, rows)
    assert [path.name for path in paths] == [file_name(RESULTS, f"SmolLM2-{name}") for name in ("q4f16_1", "q0f16")]
    found = [row for path in paths for row in read_sheet(path).rows]
    assert found == rows
    assert csv_text(RESULTS, found[:6]) == paths[0].read_text()
    metrics = metric_rows(RUN, [record()])
    (path,) = append_rows(tmp_path, METRICS, metrics)
    assert read_sheet(path).rows == metrics


def test_a_row_that_is_there_already_is_left_out(tmp_path: Path) -> None:
    (path,) = append_rows(tmp_path, RESULTS, rows_of())
    before = path.read_bytes()
    assert append_rows(tmp_path, RESULTS, rows_of()) == []
    assert path.read_bytes() == before
    append_rows(tmp_path, RESULTS, rows_of(batch=4))
    assert path.read_bytes().startswith(before)
    assert len(read_sheet(path).rows) == 6


def test_another_header_is_not_appended_to_and_no_file_grows(tmp_path: Path) -> None:
    foreign = tmp_path / file_name(RESULTS, "SmolLM2-q0f16")
    foreign.write_text(HEADER + "\n" + ROW)
    with pytest.raises(UserError, match="its header is not the one that kvsuite writes"):
        append_rows(tmp_path, RESULTS, rows_of() + rows_of(quantization="q0f16"))
    assert [path.name for path in tmp_path.glob("*.csv")] == [foreign.name]
    with pytest.raises(UserError, match="no row is added"):
        check_appendable(tmp_path, RESULTS, ["other", "SmolLM2-q0f16"])
    check_appendable(tmp_path, RESULTS, ["other"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "columns differ: \\['extra'\\]"),
        ({"time_s": float("nan")}, "time_s is nan"),
        ({"model": ""}, "model is empty"),
        ({"max_batch_size": 1.5}, "max_batch_size=1.5"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        append_rows(tmp_path, RESULTS, [row | change for row in rows_of()])
    assert not isinstance(caught.value, UserError)
    assert not list(tmp_path.glob("*.csv"))


def test_a_file_without_a_last_line_end_is_continued(tmp_path: Path) -> None:
    (path,) = append_rows(tmp_path, RESULTS, rows_of())
    path.write_text(path.read_text().rstrip("\n"))
    append_rows(tmp_path, RESULTS, rows_of(batch=4))
    assert len(read_sheet(path).rows) == 6


@given(
    st.floats(1e-9, 1e9),
    st.floats(0, 1e9),
    st.dictionaries(st.sampled_from(AXES), st.text(min_size=1, max_size=20)),
    # the engine's names hold braces and spaces
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n", exclude_categories=("C",)), min_size=1),
)
def test_any_value_comes_back(time_s: float, memory: float, inert: dict[str, str], name: str) -> None:
    (row,) = csv_rows(RUN, [record(status="error", error={"type": "E", "message": "m"})])
    row = row | {"time_s": time_s, "gpu_mem_temp_mb": memory, "inert_axes": inert or None, "model": name}
    text = csv_text(RESULTS, [row])
    from kvsuite.suites.dse import csv_files as dse_csv

    (found,) = dse_csv._parse(text, "x", "").rows
    assert found == row | {"model": csv_cell(name)}
    assert csv_text(RESULTS, [found]) == text


def test_a_file_cut_inside_its_last_number_is_told(tmp_path: Path) -> None:
    path = tmp_path / "kv_cache_dse_results_a.csv"
    path.write_text(f"{HEADER}\n{ROW[:-4]}")
    (note,) = read_sheet(path).notes
    assert "the last line has no end, so the file may be cut off inside its last number" in note
    path.write_text(f"{HEADER}\n{ROW}\n")
    assert read_sheet(path).notes == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{HEADER}\n{ROW}\n{ROW[:20]}\0\0{ROW[22:]}\n", "line 3 holds a NUL byte"),
        (f"{HEADER}\n{ROW}\n".replace(",", ";"), "separated by semicolons, and commas are read; save it with commas"),
        (f"{HEADER}\n{ROW}\n".replace(",", "\t"), "separated by tabs, and commas are read"),
    ],
)
def test_what_a_file_is_damaged_by_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "kv_cache_dse_results_a.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_sheet(path)


def test_formulas_and_lines_of_others_are_text_in_a_cell_and_found_again(tmp_path: Path) -> None:
    rows = [row | {"model": "=HYPERLINK(1)\nx"} for row in rows_of()]
    (path,) = append_rows(tmp_path, RESULTS, rows)
    assert "'=HYPERLINK(1)\\nx," in path.read_text()
    assert len(path.read_text().splitlines()) == 1 + len(rows)
    assert append_rows(tmp_path, RESULTS, rows) == []
