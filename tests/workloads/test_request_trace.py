from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.workloads.request_trace import TraceRow, first_rows, heavy_rows, times_of

AZURE = Path("/work/shared/data/azure_llm/AzureLLMInferenceTrace_conv.csv")
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def write(folder: Path, *lines: str, header: str = HEADER) -> str:
    path = folder / "trace.csv"
    path.write_text("\n".join([header, *lines, ""]))
    return str(path)


def test_rows_of_the_filter_by_context(tmp_path: Path) -> None:
    trace = write(
        tmp_path,
        "2023-11-16 18:15:46.6805900,1024,256",
        "2023-11-16 18:15:47.0000000,1023,300",  # a short context
        "2023-11-16 18:15:48.0000000,4000,255",  # a short answer
        "2023-11-16 18:15:49.0000000,4000,513",  # a long one
        "2023-11-16 18:15:50.6805900,2000,512",
        "2023-11-16 18:15:51.0000000,1024,400",
        "2023-11-16 18:15:52.0000000,,400",
    )
    rows = heavy_rows(trace, 3)
    # of equal contexts the first in the file comes first
    assert [(row.context, row.generated) for row in rows] == [(2000, 512), (1024, 256), (1024, 400)]
    times = times_of(rows, trace)
    assert times[0] - times[1] == pytest.approx(4.0, abs=1e-6)
    assert heavy_rows(trace, 1) == rows[:1]
    with pytest.raises(
        UserError, match=r"--kv-trace-conv=.*3 rows .*1024.*256 to 512.*4 are needed; .*smaller batches"
    ):
        heavy_rows(trace, 4)


@given(names=st.permutations(["other", "Timestamp", "ContextTokens", "GeneratedTokens"]))
def test_columns_are_found_by_name(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    values = {"other": "x", "Timestamp": "7.5", "ContextTokens": "1500", "GeneratedTokens": "300"}
    trace = write(tmp_path_factory.mktemp("t"), ",".join(values[name] for name in names), header=",".join(names))
    assert heavy_rows(trace, 1) == [TraceRow(1500, 300, 7.5)]


def test_a_zone_and_gzip(tmp_path: Path) -> None:
    text = "\n".join(
        [HEADER, "2024-05-10 00:00:01.250000+00:00,1500,300", "2024-05-10 00:00:00.250000+00:00,1400,300", ""]
    )
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    later, earlier = times_of(heavy_rows(str(path), 2), str(path))
    assert later - earlier == pytest.approx(1.0)


def test_first_rows_by_time_whatever_their_length(tmp_path: Path) -> None:
    trace = write(tmp_path, "3,10,1", "1,20,2", "2,5000,900")
    assert [row.context for row in first_rows(trace, 2)] == [20, 5000]
    with pytest.raises(UserError, match=r"has 3 rows, 4 are needed"):
        first_rows(trace, 4)


def test_no_times(tmp_path: Path) -> None:
    trace = write(tmp_path, "1500,300", header="ContextTokens,GeneratedTokens")
    rows = heavy_rows(trace, 1)
    assert rows == [TraceRow(1500, 300, None)]
    with pytest.raises(UserError, match=r"--kv-trace-conv=.*TIMESTAMP.*--kv-arrivals=poisson"):
        times_of(rows, trace)


def test_a_row_without_time_among_others(tmp_path: Path) -> None:
    trace = write(tmp_path, "1,1500,300", ",1400,300")
    rows = heavy_rows(trace, 2)
    with pytest.raises(UserError, match=r"rows without a time"):
        times_of(rows, trace)


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        (
            "TIMESTAMP,Context,Generated",
            "1,2,3",
            r"no column ContextTokens nor GeneratedTokens; its columns are TIMESTAMP",
        ),
        ("ContextTokens,x", "1500,300", r"no column GeneratedTokens; its columns are ContextTokens, x"),
        (HEADER, "1,many,300", r"cannot be read as a CSV of whole numbers .*intact trace"),
        (HEADER, "1,1500.5,300", r"cannot be read as a CSV of whole numbers"),
        (HEADER, "1,1500", r"cannot be read as a CSV of whole numbers"),
        (HEADER, "yesterday,1500,300", r"its times are no dates and no seconds \('yesterday'\)"),
    ],
)
def test_other_files(tmp_path: Path, header: str, line: str, message: str) -> None:
    trace = write(tmp_path, line, header=header)
    with pytest.raises(UserError, match=rf"^--kv-trace-conv={trace}: {message}") as raised:
        heavy_rows(trace, 1)
    assert "\n" not in str(raised.value)


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UserError, match=r"cannot be read"):
        heavy_rows(str(tmp_path / "empty.csv"), 1)
    with pytest.raises(UserError, match=r"0 rows"):
        heavy_rows(write(tmp_path), 1)
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match=r"no such file; give AzureLLMInferenceTrace_conv.csv"):
            heavy_rows(str(path), 1)


@pytest.mark.skipif(not AZURE.exists(), reason=f"no {AZURE.name}")
def test_the_trace_that_azure_published() -> None:
    assert len(heavy_rows(str(AZURE), 4534)) == 4534
    with pytest.raises(UserError, match=r"4534 rows"):
        heavy_rows(str(AZURE), 4535)
    rows = heavy_rows(str(AZURE), 256)
    contexts = [row.context for row in rows]
    assert contexts == sorted(contexts, reverse=True)
    assert (contexts[127] + contexts[128]) / 2 == 1274
    assert round(sum(row.generated for row in rows) / 256) == 396
    every = first_rows(str(AZURE), 19_366)
    times = times_of(every, str(AZURE))
    assert len(times) / (times[-1] - times[0]) == pytest.approx(5.53, abs=0.01)
