"""``python -m kvsuite predict``: the table, the CSV, what fits, and what is refused."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvsuite.__main__ import USAGE_ERROR, main
from kvsuite.memory_model.design_point import DesignPoint
from kvsuite.memory_model.survey import csv_header

LLAMA = ("--model", "dummy:Llama-3-8B", "--quantization", "q4f16_1")


def predict(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["predict", *map(str, words)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["predict", *map(str, words)]) == USAGE_ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def table(text: str) -> list[list[str]]:
    """Lines of the tables as cells: context first, what to turn last."""
    return [line.split(None, 13) for line in text.splitlines() if re.match(r" +\d+ +\d+ +\d+ +(?:off|\d)", line)]


def exported(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_full_space(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "full.csv"
    text = predict(capsys, *LLAMA, "--space", "full", "--csv", path)
    assert "space full: 396 points, 144 more break a rule" in text
    assert "144 break sink-needs-window: attention_sink_size=32 without a sliding window" in text
    assert "132 flagged: context_window_size=16384 is more than the 8192 positions" in text
    assert "inert here: sliding_window_size, attention_sink_size: MLC's configuration of llama models" in text
    assert "q4f16_1: parameters 4308.133 MB" in text
    lines = table(text)
    # the window does not reach these models, so eleven points are one line
    assert len(lines) == 36
    assert sum(int(line[5]) for line in lines) == 396
    assert lines[0][:11] == [
        "4096",
        "1024",
        "1",
        "off..4096",
        "0..256",
        "11",
        "722.068",
        "442.011f",
        "5472.212f",
        "257",
        "514.0",
    ]
    rows = exported(path)
    assert len(rows) == 540
    assert list(rows[0]) == csv_header()
    valid = [row for row in rows if not row["broken_rules"]]
    assert len(valid) == 396
    assert {row["mem_predicted_total_mb"] for row in rows if row["broken_rules"]} == {""}
    first = valid[0]
    numbers = ("params", "kvcache", "temp", "total")
    assert [first[f"mem_predicted_{name}_mb"] for name in numbers] == ["4308.133", "722.068", "442.011", "5472.212"]
    assert (first["params_basis"], first["temp_basis"], first["kv_blocks"]) == ("exact", "fitted", "257")
    assert first["kv_allocated_bytes"] == str(257 << 21)
    for row in rows:
        assert DesignPoint.from_id(row["id"]).context_window_size == int(row["context_window_size"])
    assert re.search(r"396 points in \d+\.\d\d s\nwrote 540 rows to ", text)


def test_it_says_what_fits_and_what_to_turn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "card.csv"
    text = predict(capsys, *LLAMA, "--space", "ctx=4096,16384;window=off", "--card", "8GiB", "--csv", path)
    assert "card: 8 GiB, of which the engine uses 0.85: 6,963 MB" in text
    short, long = table(text)
    assert short[12] == "yes"
    assert long[12:] == [
        "no;",
        "context_window_size=8192 or prefill_chunk_size=512 or quantization=q3f16_1 or json_prefill_chunk=4096",
    ]
    assert [row["fits"] for row in exported(path)] == ["yes", "no"]
    assert exported(path)[1]["turn"] == long[13]
    # of the whole card it fits
    assert table(predict(capsys, *LLAMA, "--space", "ctx=16384", "--card", "8", "--card-share", "1"))[0][12] == "yes"


def test_the_table_says_where_the_memory_goes(capsys: pytest.CaptureFixture[str]) -> None:
    text = predict(capsys, *LLAMA, "--space", "schemes", "--explain", "q4f16_1-ctx8192-pc4096-bs64-swoff-sink0")
    assert "functions of the library    1248.000f" in text
    assert re.search(r"attention buffers +162\.062 +2\.\d% +json_prefill_chunk ", text)
    assert re.search(r"attention workspace +48\.000 +0\.\d% +nothing ", text)
    assert not table(text)
    whole = predict(capsys, *LLAMA, "--space", "schemes")
    assert "q4f16_1-ctx8192-pc4096-bs64-swoff-sink0, the point that takes most:" in whole
    assert "7044.972f" in whole


def test_one_impossible_format_does_not_end_the_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "formats.csv"
    words = ("--model", "dummy:tiny", "--engine", "nano", "--space", "ctx=256,512;chunk=64", "--csv", path)
    text = predict(capsys, *words, "--quantization", "none,q3f16_0,q4f16_1")
    assert "4 points, 2 more break a rule" in text
    assert "  2 break format-of-engine: --kv-quantization=q3f16_0: not predicted for nano; choose from none" in text
    rows = exported(path)
    assert [row["quantization"] for row in rows if row["mem_predicted_total_mb"]] == ["none"] * 2 + ["q4f16_1"] * 2
    assert {row["broken_rules"].partition(":")[0] for row in rows if not row["mem_predicted_total_mb"]} == {
        "breaks format-of-engine"
    }
    assert "--kv-quantization=q3f16_0: not predicted for nano" in refusal(capsys, *words, "--quantization", "q3f16_0")


def test_what_is_not_known_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "unknown.csv"
    text = predict(capsys, "--model", "dummy:Qwen3-8B", "--card", "80", "--csv", path)
    assert "n/a: temporary buffers of Qwen3-8B can only be read from its compiled library" in text
    assert {tuple(line[7:9]) for line in table(text)} == {("n/a", "n/a")}
    assert {line[12] for line in table(text)} == {"unknown"}
    row = exported(path)[0]
    assert (row["mem_predicted_temp_mb"], row["mem_predicted_total_mb"], row["temp_basis"]) == ("", "", "unknown")
    assert row["null_reason"].startswith("temporary buffers of Qwen3-8B")
    small = predict(capsys, "--model", "dummy:Qwen3-8B", "--card", "4")
    assert "no; weights and cache alone are too large" in small


def test_the_nano_engine(capsys: pytest.CaptureFixture[str]) -> None:
    space = ("--space", "ctx=8192,32768;window=off,4096;sink=0,4,1000")
    text = predict(capsys, "--model", "dummy:Qwen3-8B", "--engine", "nano", *space)
    assert "none: parameters 15622.588 MB; a token's keys and values 144 KiB in bfloat16" in text
    assert "break sink-within-eighth-of-window" in text
    lines = table(text)
    windowed = [line for line in lines if line[3] == "4096"]
    assert [line[6] for line in windowed[:2]] == [line[6] for line in windowed[2:]]
    on_cpu = predict(
        capsys, "--model", "dummy:tiny", "--engine", "nano", "--device", "cpu", "--quantization", "q4f16_1"
    )
    assert "in float16" in on_cpu
    assert "attention workspace" not in on_cpu


def test_points_beyond_the_trained_length_of_a_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = predict(capsys, "--model", "HF://mlc-ai/Llama-3-8B-Instruct-q0f16-MLC", "--space", "full")
    # the format of the weights, and the chunk of the published JSON, without a hub
    assert "q0f16: parameters 15316.508 MB" in text
    assert "prefill_chunk_size of mlc-chat-config.json: 2048" in text
    assert "space full: 264 points, 276 more break a rule" in text
    assert "180 break within-trained-length" in text
    assert table(text)[0][6] == "600.521"


def test_a_space_without_a_valid_point(capsys: pytest.CaptureFixture[str]) -> None:
    text = predict(capsys, *LLAMA, "--space", "ctx=512;chunk=1024")
    assert "0 points, 1 more break a rule" in text
    assert "1 break chunk-within-context" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "dummy:Llama-9"), "unknown preset"),
        (("--space", "huge"), "--space=huge: no such space"),
        (("--quantization", "q5"), "--kv-quantization=q5: no weight format of MLC"),
        (("--quantization", "q0f16,q0f16"), "has the value q0f16 twice"),
        (("--quantization", "q0f16", "--space", "quant=q4f16_1"), "quantization is given here and as an option of its own"),
        (("--card", "big"), "--card=big: no size of a card"),
        (("--card", "8", "--card-share", "2"), "--card-share=2: must lie above 0"),
        (("--card-share", "0.5"), "--card-share: needs --card"),
        (("--json-prefill-chunk", "0"), "--json-prefill-chunk=0: must be at least 1"),
        (("--engine", "hf"), "--engine=hf: has no formulas of its memory; use mlc, nano"),
        (("--engine", "nosuch"), "unknown engine; use auto, hf, llamacpp, mlc, nano, server, vllm"),
        (("--engine", "nano", "--json-prefill-chunk", "64"), "--json-prefill-chunk: only --engine mlc reads it"),
        (("--engine", "nano", "--total-tokens", "batch"), "--total-tokens: only --engine mlc reads it"),
        (("--dtype", "float16"), "--dtype: only --engine nano or vllm reads it"),
        (("--device", "cuda"), "--device: only --engine nano or vllm reads it"),
        (("--engine", "nano", "--dtype", "int4"), "--kv-dtype=int4: unknown dtype"),
        (("--engine", "nano", "--model", "HF://mlc-ai/Llama-3-8B-Instruct-q0f16-MLC"), "MLC weights, which nano cannot load"),
        (("--explain", "nonsense"), "no id of a design point"),
        (("--explain", "q4f16_1-ctx4096-pc1024-bs16-swoff-sink0"), "no valid point of --space small; it has q4f16_1-ctx512"),
    ],
)  # fmt: skip
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    given = words if "--model" in words else ("--model", "dummy:tiny", *words)
    assert message in refusal(capsys, *given)


def test_a_csv_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such.csv"
    assert f"--csv={missing}: the folder {missing.parent} does not exist" in refusal(capsys, *LLAMA, "--csv", missing)
    assert not missing.parent.exists()


def outputs() -> list[tuple[str, str]]:
    """Commands of the page with what it says they print."""
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    return re.findall(r"^```\n\$ python -m kvsuite (predict [^\n]*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), outputs(), ids=["schemes", "card"])
def test_the_output_in_the_docs_is_real(capsys: pytest.CaptureFixture[str], command: str, shown: str) -> None:
    text = predict(capsys, *shlex.split(command)[1:])
    without_time = [re.sub(r"\d+\.\d\d s$", "", line) for line in text.splitlines()]
    assert [re.sub(r"\d+\.\d\d s$", "", line) for line in shown.splitlines()] == without_time


def test_the_example_in_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out.splitlines()[0].endswith("5501.915 ['functions of the library']")


def test_the_command_loads_no_torch() -> None:
    code = """
import sys
from kvsuite.__main__ import main
assert main(["predict", "--model", "dummy:Llama-3-8B", "--space", "full", "--card", "6GiB"]) == 0
sys.exit(bool({"torch", "transformers", "pytest", "matplotlib"} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=240
    )
    assert (done.returncode, done.stderr) == (0, "")
