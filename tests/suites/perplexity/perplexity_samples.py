"""Rows of perplexity CSVs: as kvsuite writes them, and the original program's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvsuite.suites.perplexity.columns import COLUMNS, SCHEMA_VERSION
from kvsuite.suites.perplexity.csv_files import read_rows

SAMPLE = Path(__file__).parents[2] / "data" / "perplexity_original.csv"


def our_row(**fields: Any) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS) | {
        "mlc_model": "HF://mlc-ai/Llama-3-8B-Instruct-q4f16_1-MLC",
        "hf_model": "a, model",
        "device": "cpu",
        "max_length": 2048,
        "stride": 512,
        "split": "test",
        "load_in_4bit": 0,
        "load_in_8bit": 0,
        "fake_q3bit": 0,
        "ppl": 1 / 3 + 20,
        "dataset": "wikitext2",
        "text_sha256": "c5b5",
        "num_tokens": 5000,
        "num_targets": 4999,
        "dtype": "float32",
        "nll_mean": 3.0,
        "protocol": "hf-strided",
        "perplexity_se": 0.25,
        "bos": "none",
        "run_id": "run-1",
        "schema_version": SCHEMA_VERSION,
    }
    return row | fields


def drawn_row(ppl: float, **fields: Any) -> dict[str, Any]:
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


def original(dataset: str) -> list[dict[str, Any]]:
    return [each | {"dataset": dataset} for each in read_rows(SAMPLE)]
