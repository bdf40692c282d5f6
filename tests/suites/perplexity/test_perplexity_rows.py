from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from kvsuite.meters.environment import host_facts
from kvsuite.suites.perplexity.columns import COLUMNS
from kvsuite.suites.perplexity.csv_files import append_row, csv_name, read_rows
from kvsuite.suites.perplexity.rows import csv_row, csv_rows, quantization_tag


def record(**fields: Any) -> dict[str, Any]:
    metrics = {"perplexity": 20.5, "perplexity_se": 0.2, "nll_sum": 15000.0, "nll_tokens": 4999.0, "score_s": 12.5}
    return {
        "id": "test_perplexity[wikitext2-4bit]",
        "status": "ok",
        "case": {
            "model": "smollm2",
            "device": "cpu",
            "dtype": "float32",
            "quantization": "4bit",
            "params": {"mlc_model": "q4"},
            "workload": {"max_length": 2048, "stride": 512, "split": "test", "protocol": "hf-strided", "bos": "auto"},
        },
        "suite": "perplexity",
        "case_key": "sha256:77",
        "started_utc": "2026-11-20T10:15:07+00:00",
        "effective": {"dtype": "float32", "device": "cpu", "weight_format": "4bit"},
        "dataset": {
            "name": "wikitext2", "text_hash": "sha256:c5b5", "bos": "none", "split": "validation", "revision": "b08601e",
        },
        "model": {"label": "SmolLM2", "revision": "sha256:aa", "tokenizer_hash": "sha256:bb"},
        "tokens": {"text": 5000},
        "metrics": {name: {"value": value} for name, value in metrics.items()},
        **fields,
    }  # fmt: skip


def run(**fields: Any) -> dict[str, Any]:
    facts = {"run_id": "run-7", "started_utc": "2026-11-20T10:15:00+00:00", "kvsuite_version": "0.1.0"}
    return facts | {"environment": host_facts()} | fields


@pytest.mark.parametrize(
    ("fake", "four", "eight", "tag"),
    [(1, 1, 1, "fake_q3"), (0, 1, 1, "4bit"), (0, 0, 1, "8bit"), (0, 0, 0, "fp16")],
)
def test_the_originals_tags(fake: int, four: int, eight: int, tag: str) -> None:
    row = dict.fromkeys(COLUMNS) | {"fake_q3bit": fake, "load_in_4bit": four, "load_in_8bit": eight}
    assert quantization_tag(row) == tag


def test_our_tags_say_the_dtype_and_the_format() -> None:
    row = csv_row(record(), run())
    assert quantization_tag(row) == "4bit"
    assert quantization_tag(row | {"quantization": None, "load_in_4bit": 0}) == "float32"


def test_a_row_of_a_record(tmp_path: Path) -> None:
    row = csv_row(record(), run())
    assert list(row) == list(COLUMNS)
    assert (row["load_in_4bit"], row["load_in_8bit"], row["fake_q3bit"]) == (1, 0, 0)
    assert (row["ppl"], row["num_targets"], row["num_tokens"], row["seconds"]) == (20.5, 4999, 5000, 12.5)
    assert row["nll_mean"] == pytest.approx(15000 / 4999)
    assert (row["text_sha256"], row["run_id"], row["quantization"]) == ("c5b5", "run-7", "4bit")
    assert row["ppl_original_formula"] is None
    # as resolved, not as asked
    assert (row["bos"], row["split"]) == ("none", "validation")
    path = tmp_path / csv_name("wikitext2")
    append_row(path, row)
    assert read_rows(path) == [row]
    assert math.isfinite(row["ppl"])


def test_a_failed_case_has_no_row() -> None:
    with pytest.raises(ValueError, match="no perplexity, so no row"):
        csv_row(record(status="oom"), run())
    with pytest.raises(ValueError, match="no perplexity"):
        csv_row(record(metrics={"perplexity": {"value": None, "reason": "random weights"}}), run())


def test_a_row_says_where_it_comes_from() -> None:
    from importlib.metadata import version

    facts = host_facts()
    row = csv_row(record(), run(environment=facts))
    assert {name: row[name] for name in COLUMNS[COLUMNS.index("started_utc") :]} == {
        "started_utc": "2026-11-20T10:15:07+00:00",
        "host": facts["host"]["name"],
        "kvsuite_version": "0.1.0",
        "torch_version": version("torch"),
        "transformers_version": version("transformers"),
        "model_revision": "sha256:aa",
        "tokenizer_hash": "sha256:bb",
        "dataset_revision": "b08601e",
        "case_key": "sha256:77",
    }
    assert row["host"]


def test_what_is_not_known_is_empty() -> None:
    bare = record(model={}, case_key="", started_utc="")
    bare["dataset"] = {name: bare["dataset"][name] for name in ("name", "text_hash", "bos")} | {"split": None}
    row = csv_row(bare, {"run_id": "run-7", "environment": {"host": "text"}})
    unknown = ("split", *COLUMNS[COLUMNS.index("started_utc") :])
    assert {row[name] for name in unknown} == {None}
    assert csv_row(bare, run())["started_utc"] == "2026-11-20T10:15:00+00:00"


def test_only_cases_with_a_perplexity_have_a_row() -> None:
    none = {"perplexity": {"value": None, "reason": "random weights"}}
    records = [record(), record(suite="compression"), record(status="oom"), record(metrics=none)]
    assert [row["run_id"] for row in csv_rows(run(), records)] == ["run-7"]
