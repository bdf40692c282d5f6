"""The perplexity suite as a user runs it, on a small local model: rows, files, table, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from pytest_runs import NO_FIGURES, ROOT, Run, copy_benchmarks, rotated, run_pytest
from tiny_checkpoint import TEXT, TRAINED_LENGTH, byte_tokenizer, save_checkpoint

from kvsuite.__main__ import main
from kvsuite.quantization.registry import unavailable
from kvsuite.store.validate import validate
from kvsuite.suites.perplexity.csv_files import COLUMNS, ORIGINAL_COLUMNS, read_rows
from kvsuite.workloads.windows import protocol_title

PROTOCOLS = ("hf-strided", "hf-docs", "disjoint", "lm-eval-rolling", "llama.cpp-half")
FORMATS = ("none", "q4f16_1", "fake_q3")
NAMES = [f"text.txt-{chosen}-{protocol}" for protocol in PROTOCOLS for chosen in FORMATS]
CTX, STRIDE = 32, 16
CSV, FIGURES = "text.txt_ppl_results.csv", ("text.txt_ppl_vs_quant.png", "text.txt_ppl_vs_quant.svg")
SMALL = (
    "-k", "perplexity", "--kv-device=cpu", "--kv-threads=1", f"--kv-max-length={CTX}", f"--kv-stride={STRIDE}",
    "--kv-prompt-tokens=16", "--kv-max-new-tokens=4", "--kv-rounds=2", "--kv-num-warmup=1",
)  # fmt: skip
FULL = (
    *SMALL, f"--kv-quantization={','.join(FORMATS)}", "--kv-reference=none", "--kv-dataset=text.txt",
    f"--kv-ppl-protocol={','.join(PROTOCOLS)}",
)  # fmt: skip
# docs/metrics.md's, by which cases have them
WORDS = {"word_perplexity", "byte_perplexity", "bits_per_byte"}
DISTANCE = {
    "kld", "kld_se", "kld_median", "kld_p99", "kld_max", "same_top1", "rms_delta_p", "mean_delta_p", "perplexity_reference",
    "delta_perplexity", "ppl_ratio_reference", "ppl_ratio_reference_se",
}  # fmt: skip
ALWAYS = {"perplexity", "perplexity_se", "nll_sum", "nll_tokens", "next_token_acc"}


def project(folder: Path, **texts: str) -> Path:
    """A user's folder: the benchmarks, and text files."""
    copy_benchmarks(folder, "compression", "perplexity")
    for name, text in ({"text": TEXT} | texts).items():
        (folder / f"{name}.txt").write_text(text, newline="")
    return folder


@pytest.fixture
def both(pytester: pytest.Pytester) -> pytest.Pytester:
    """A pytester folder with both suites, for runs that never reach torch."""
    copy_benchmarks(pytester.path, "compression", "perplexity")
    return pytester


def run_folder(run: Run) -> Path:
    """The one run folder; the CSVs that gather many runs lie beside it."""
    (only,) = [path for path in run.reports if path.is_dir()]
    return only


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder(run) / "records.jsonl").read_text().splitlines()]


def rows(run: Run) -> dict[str, dict[str, Any]]:
    found = {row["case"]["name"]: row for row in lines(run)[1:]}
    assert len(found) == len(lines(run)) - 1
    return found


def value(row: dict[str, Any], name: str) -> Any:
    return row["metrics"][name]["value"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer begins a text with BOS."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return save_checkpoint(folder, tokenizer=byte_tokenizer(adds_bos=True))


@pytest.fixture(scope="session")
def full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every protocol in three formats against a reference, under pytest-benchmark."""
    folder = project(tmp_path_factory.mktemp("full"))
    return run_pytest(folder, f"--kv-model={checkpoint}", *FULL)


@pytest.fixture(scope="session")
def beside_xdist(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same on two workers."""
    pytest.importorskip("xdist")
    folder = project(tmp_path_factory.mktemp("xdist"))
    return run_pytest(folder, f"--kv-model={checkpoint}", *FULL, "-n2")


@pytest.fixture(scope="session")
def runs(full: Run, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Short runs, good and bad ones."""
    base = tmp_path_factory.mktemp("runs")
    bare = {
        name: save_checkpoint(base / name, tokenizer=tokenizer)
        for name, tokenizer in (("no-bos", byte_tokenizer(special=False)), ("no-tokenizer", False))
    }
    found: dict[str, Run] = {}

    def folder(name: str, **texts: str) -> Path:
        (base / "runs" / name).mkdir(parents=True)
        if name != "later":
            (base / "runs" / name / "conftest.py").write_text(NO_FIGURES)
        return project(base / "runs" / name, **texts)

    def run(
        name: str, *arguments: str, model: str | Path = checkpoint, where: Path | None = None, **texts: str
    ) -> None:
        several = any(one.startswith("--kv-dataset=") for one in arguments)
        dataset = () if several else ("--kv-dataset=text.txt",)
        where = where or folder(name, **texts)
        found[name] = run_pytest(where, f"--kv-model={model}", *SMALL, *dataset, *arguments)

    one = "--kv-quantization=none"
    # its report folder has the results of the full run already
    later = folder("later")
    (later / "reports").mkdir()
    (later / "reports" / CSV).write_bytes((full.folder / "reports" / CSV).read_bytes())
    q4 = ("--kv-quantization=none,q4f16_1", "-p", "no:benchmark", "-k", "perplexity and q4f16_1")
    run("later", *q4, where=later)
    run("twice", "--kv-dataset=text.txt,copy.txt", one, copy=TEXT)
    run("empty", one, text="")
    run("blank", one, text=" \n\n ")
    run("one token", one, model=bare["no-bos"], text="a")
    run("too short", one, "--kv-ppl-protocol=llama.cpp-half", text=TEXT[: 2 * CTX - 2])
    run("beyond", one, f"--kv-max-length={TRAINED_LENGTH + 1}")
    run("no hub", one, "--kv-dataset=wikitext2")
    run("no bos", one, "--kv-bos=bos_first", model=bare["no-bos"])
    run("no bos, rolling", one, "--kv-ppl-protocol=lm-eval-rolling", model=bare["no-bos"])
    run("no tokenizer", one, model=bare["no-tokenizer"])
    run("dummy", "-k", "perplexity or baseline", "--kv-quantization=q4f16_1", model="dummy:tiny")
    blocked = folder("no bitsandbytes")
    (blocked / "conftest.py").write_text("import sys\n\nsys.modules['bitsandbytes'] = None\n" + NO_FIGURES)
    formats = ("--kv-quantization=none,4bit,8bit", "--kv-reference=4bit", "-rs")
    run("no bitsandbytes", *formats, where=blocked)
    return found


# the full run


def test_every_case_is_there_and_fine(full: Run) -> None:
    assert full.code == 0, full.out + full.err
    assert full.said(f"{len(NAMES)} passed")
    found = rows(full)
    assert {name: row["status"] for name, row in found.items()} == dict.fromkeys(NAMES, "ok")
    (seed,) = {row["order_seed"] for row in found.values()}
    assert sorted(found, key=lambda name: found[name]["order_index"]) == rotated(NAMES, seed)
    assert sorted(found, key=lambda name: found[name]["case_index"]) == NAMES
    run = lines(full)[0]
    validate("run", run, "run line")
    for row in found.values():
        validate("record", row, row["id"])
    assert {row["id"] for row in found.values()} == {
        f"benchmarks/test_perplexity.py::test_perplexity[{name}]" for name in NAMES
    }
    assert len({row["case_key"] for row in found.values()}) == len(NAMES)


def documented() -> set[str]:
    """The metrics that docs/metrics.md gives the perplexity suite."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    table = text.partition("Of the [perplexity suite]")[2].partition("\nNotes:")[0]
    found = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert found >= WORDS | DISTANCE, "the table could not be read"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_the_documented_ones(name: str, full: Run) -> None:
    row = rows(full)[name]
    chosen, protocol = row["case"]["quantization"], row["case"]["workload"]["protocol"]
    expected = ALWAYS | documented()
    if protocol != "lm-eval-rolling":
        expected -= WORDS
    if protocol not in ("hf-strided", "disjoint"):
        expected -= {"ppl_original_formula"}
    if chosen == "fake_q3":
        expected -= {"score_s", "score_tok_s"}
        assert set(row["metrics"]) == expected, "rounded weights have no number of memory or speed"
        return
    assert expected <= set(row["metrics"])
    absent = {metric for metric in expected if value(row, metric) is None}
    assert absent == (DISTANCE if chosen is None else set())
    assert {"ttft_s", "tpot_s", "mem_weights_bytes", "kv_bytes_exact", "bits_per_weight"} <= set(row["metrics"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_divergence_is_of_the_others_from_the_reference(protocol: str, full: Run) -> None:
    found = rows(full)
    reference, packed, rounded = (found[f"text.txt-{chosen}-{protocol}"] for chosen in FORMATS)
    for metric in DISTANCE:
        assert (value(reference, metric), reference["metrics"][metric]["reason"]) == (None, "this is the reference")
    for row in (packed, rounded):
        assert 0 < value(row, "kld_median") < value(row, "kld_p99") <= value(row, "kld_max")
        assert value(row, "kld") > 0
        assert 0 < value(row, "same_top1") <= 1
        assert value(row, "rms_delta_p") > abs(value(row, "mean_delta_p"))
        assert value(row, "perplexity_reference") == pytest.approx(value(reference, "perplexity"), rel=1e-5)
        assert value(row, "ppl_ratio_reference") == pytest.approx(
            value(row, "perplexity") / value(reference, "perplexity"), rel=1e-5
        )
        assert row["metrics"]["kld"]["reference"] == "none"
    assert value(packed, "kld") < value(rounded, "kld")


def contexts(protocol: str, tokens: Sequence[int], bos: int) -> dict[int, list[int]]:
    """What each target is predicted from, by docs/perplexity.md."""
    n, found = len(tokens), {}
    for t in range(n):
        if protocol == "hf-strided":
            seen = list(tokens[max(t // STRIDE * STRIDE + STRIDE - CTX, 0) : t])
        elif protocol == "hf-docs":
            seen = list(tokens[next(b for b in range(0, n, STRIDE) if t < b + CTX) : t])
        elif protocol == "disjoint":
            seen = list(tokens[t // CTX * CTX : t])
        elif protocol == "lm-eval-rolling":
            chunk = t // CTX * CTX
            # the last window is filled up with context
            begin = chunk - 1 if chunk + CTX <= n or chunk == 0 else n - CTX - 1
            seen = ([bos] if begin < 0 else []) + list(tokens[max(begin, 0) : t])
        else:
            chunk = t // CTX * CTX
            scored = t - chunk > CTX // 2 and chunk + CTX <= n
            seen = [bos, *tokens[chunk + 1 : t]] if scored else []
        if seen:
            found[t] = seen
    return found


def loop(model: Any, tokens: Sequence[int], seen: dict[int, list[int]]) -> dict[int, float]:
    """Losses in float64: one forward for every length of context, a row for every target."""
    import torch

    losses: dict[int, float] = {}
    by_length = defaultdict(list)
    for t, ids in seen.items():
        by_length[len(ids)].append(t)
    with torch.no_grad():
        for targets in by_length.values():
            logits = model(torch.tensor([seen[t] for t in targets])).logits[:, -1]
            picked = torch.log_softmax(logits, -1)[range(len(targets)), [tokens[t] for t in targets]]
            losses |= dict(zip(targets, (-picked).tolist(), strict=True))
    return dict(sorted(losses.items()))


def documentation_loop(model: Any, tokens: Sequence[int]) -> tuple[float, int]:
    """Sum of losses and number of tokens by the code of the Hugging Face documentation, "Perplexity of fixed-length models"."""
    import torch

    encoded = torch.tensor([tokens])
    nll_sum, n_tokens, before = 0.0, 0, 0
    for begin in range(0, len(tokens), STRIDE):
        end = min(begin + CTX, len(tokens))
        input_ids = encoded[:, begin:end]
        labels = input_ids.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            logits = model(input_ids).logits  # its own loss is taken in float32
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:])
        loss_tokens = int((labels != -100).sum()) - 1
        nll_sum, n_tokens, before = nll_sum + float(loss) * loss_tokens, n_tokens + loss_tokens, end
        if end == len(tokens):
            break
    return nll_sum, n_tokens


def double_model(checkpoint: Path, chosen: str) -> Any:
    """The weights of a format as dense float64."""
    from transformers import LlamaForCausalLM

    from kvsuite.models import resolve_model
    from kvsuite.models.load import load_model
    from kvsuite.quantization.apply import apply_quantization
    from kvsuite.quantization.packed import PackedWeight

    dtype = "float16" if "f16" in chosen else "float32"
    loaded = load_model(resolve_model(str(checkpoint)), device="cpu", dtype=dtype)
    apply_quantization(loaded, chosen)
    dense = LlamaForCausalLM(loaded.model.config).eval()
    state = {name: tensor for name, tensor in loaded.model.state_dict().items() if ".packed." not in name}
    for name, module in loaded.model.named_modules():
        if isinstance(module, PackedWeight):
            state[name.removesuffix("packed") + "weight"] = module.dense()
    dense.load_state_dict(state)
    return dense.double()


def text_tokens(checkpoint: Path, protocol: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return list(tokenizer(TEXT, add_special_tokens=protocol != "lm-eval-rolling")["input_ids"])


@pytest.mark.parametrize("chosen", FORMATS)
def test_perplexity_is_a_plain_float64_loop(chosen: str, full: Run, checkpoint: Path) -> None:
    model, found = double_model(checkpoint, chosen), rows(full)
    for protocol in PROTOCOLS:
        row = found[f"text.txt-{chosen}-{protocol}"]
        workload = row["case"]["workload"]
        assert (workload["protocol"], workload["max_length"]) == (protocol, CTX)
        assert workload["stride"] == (STRIDE if protocol in ("hf-strided", "hf-docs") else CTX)
        tokens = text_tokens(checkpoint, protocol)
        expected = loop(model, tokens, contexts(protocol, tokens, 256))
        # activations of q4f16_1 are float16
        tolerance = {"abs": 2e-2} if chosen == "q4f16_1" else {"abs": 1e-4}
        total, n = math.fsum(expected.values()), len(expected)
        if protocol == "hf-docs":
            total, n = documentation_loop(model, tokens)
            assert n < len(expected)
        assert value(row, "nll_tokens") == n
        assert value(row, "nll_sum") / n == pytest.approx(total / n, abs=tolerance["abs"] / 4)
        relative = 5e-3 if chosen == "q4f16_1" else 1e-4 / math.exp(total / n)
        assert value(row, "perplexity") == pytest.approx(math.exp(total / n), rel=relative)
        side = parquet.read_table(run_folder(full) / row["sidecar"]).to_pydict()
        assert side["position"] == list(expected)
        assert side["token"] == [tokens[t] for t in expected]
        assert side["nll"] == pytest.approx(list(expected.values()), **tolerance)


def test_the_record_holds_all_that_the_number_depends_on(full: Run, checkpoint: Path) -> None:
    rules = dict(zip(PROTOCOLS, ("none", "none", "none", "bos_first", "bos_over_first"), strict=True))
    for row in rows(full).values():
        protocol, dataset = row["case"]["workload"]["protocol"], row["dataset"]
        assert dataset["name"] == "text.txt"
        assert dataset["text_hash"] == "sha256:" + hashlib.sha256(TEXT.encode()).hexdigest()
        assert dataset["bos"] == rules[protocol]
        assert dataset["source"] == "text.txt"
        entry = row["metrics"]["perplexity"]
        assert (entry["protocol"], entry["max_length"], entry["bos"]) == (protocol, CTX, rules[protocol])
        assert entry["stride"] == (STRIDE if protocol in ("hf-strided", "hf-docs") else CTX)
        assert value(row, "perplexity") == pytest.approx(math.exp(value(row, "nll_sum") / value(row, "nll_tokens")))
        assert 0 < value(row, "perplexity_se") < value(row, "perplexity")
        assert re.fullmatch("sha256:[0-9a-f]{64}", row["model"]["tokenizer_hash"])
        assert row["tokens"]["text"] == len(text_tokens(checkpoint, protocol))
        if protocol != "hf-docs":  # whose windows count a token less than they score
            assert row["tokens"]["scored"] == value(row, "nll_tokens")
        assert row["effective"]["scoring"]["head"] == "split"
    # tokens with and without BOS are two revisions of one text
    assert len({row["dataset"]["tokens_hash"] for row in rows(full).values()}) == 2


@pytest.mark.parametrize("chosen", ["none", "q4f16_1"])
def test_weight_bytes_are_the_formulas(chosen: str, full: Run) -> None:
    row = rows(full)[f"text.txt-{chosen}-hf-strided"]
    measured = value(row, "mem_weights_bytes")
    assert value(row, "mem_predicted_weights_bytes") == measured == row["model"]["weights_bytes"]
    assert value(row, "bits_per_weight") == pytest.approx(8 * measured / row["model"]["parameters"], rel=1e-12)
    if chosen == "none":
        # one buffer of rotary frequencies beside the weights
        assert value(row, "bits_per_weight") == pytest.approx(32, rel=1e-2)
    else:
        assert 4.5 <= value(row, "bits_per_weight") < 5.5
    assert row["effective"]["dtype"] == ("float32" if chosen == "none" else "float16")


def test_rounded_weights_say_that_they_are_quality_only(full: Run) -> None:
    row = rows(full)["text.txt-fake_q3-disjoint"]
    assert "quality only" in row["inert"]["speed"]
    assert {row["metrics"][name]["class"] for name in row["metrics"]} <= {"near_deterministic", "deterministic"}
    assert not any(name.startswith(("mem_", "kv_bytes", "bits_per_w")) for name in row["metrics"])


def test_the_table_names_the_protocol_of_every_number(full: Run, checkpoint: Path) -> None:
    table = (run_folder(full) / "table.txt").read_text()
    assert table.strip() in full.out
    digest = hashlib.sha256(TEXT.encode()).hexdigest()[:8]
    n = len(text_tokens(checkpoint, "hf-strided"))
    assert (
        "text.txt: strided (original program), window 32, step 16, prefix rule none, "
        f"{n - 1:,} of {n:,} tokens scored, text {digest}" in table.splitlines()
    )
    for protocol in PROTOCOLS:
        shown = f"text.txt: {protocol_title(protocol)}, window 32, "
        assert len([line for line in table.splitlines() if line.startswith(shown)]) == 1
    for name in NAMES:
        assert len([line for line in table.splitlines() if line.startswith(f"{name} ")]) == 1
    # numbers as in the records
    line = next(line for line in table.splitlines() if line.startswith(NAMES[0]))
    assert f"{value(rows(full)[NAMES[0]], 'perplexity'):.3f}" in line


def test_the_folder_has_every_file(full: Run) -> None:
    folder = run_folder(full)
    assert folder.name.startswith("perplexity_tiny-llama_")
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files >= {"records.jsonl", "report.json", "table.txt", CSV, *FIGURES}
    assert not {"results.json", "benchmark_comparison.png"} & files, "those are the compression suite's"
    assert all(path.stat().st_size for path in folder.iterdir())
    assert {path.name for path in full.reports if not path.name.startswith(".")} == {folder.name, CSV}


def test_the_csv_has_the_originals_columns_first(full: Run) -> None:
    path = run_folder(full) / CSV
    with path.open(newline="") as stream:
        header, *fields = list(csv.reader(stream))
    assert tuple(header) == COLUMNS
    assert tuple(header[: len(ORIGINAL_COLUMNS)]) == ORIGINAL_COLUMNS
    assert len(fields) == len(NAMES)
    found = rows(full)
    for row, name in zip(read_rows(path), NAMES, strict=True):
        record = found[name]
        assert row["ppl"] == value(record, "perplexity")
        assert row["perplexity_se"] == value(record, "perplexity_se")
        assert row["num_targets"] == value(record, "nll_tokens")
        assert row["protocol"] == record["case"]["workload"]["protocol"]
        assert row["fake_q3bit"] == int("fake_q3" in name)
        assert row["quantization"] == {"none": "fp32"}.get(name.split("-")[1], name.split("-")[1])
        assert (row["seconds"] is None) == ("fake_q3" in name)
    assert (full.folder / "reports" / CSV).read_bytes() == path.read_bytes()


def test_report_draws_the_run_again(full: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_folder(full)), "--out", str(tmp_path)]) == 0
    assert f"{len(NAMES)} records: {len(NAMES)} ok" in capsys.readouterr().out
    for name in ("report.json", "table.txt", CSV, *FIGURES):
        assert (tmp_path / name).read_bytes() == (run_folder(full) / name).read_bytes(), name


def test_report_draws_the_csv_of_many_runs(runs: dict[str, Run], tmp_path: Path) -> None:
    gathered = runs["later"].folder / "reports" / CSV
    assert main(["report", str(gathered), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(FIGURES)


def test_the_same_rows_on_two_workers(full: Run, beside_xdist: Run) -> None:
    assert beside_xdist.code == 0, beside_xdist.out + beside_xdist.err
    ours, theirs = rows(full), rows(beside_xdist)
    assert theirs.keys() == ours.keys()
    for name, row in ours.items():
        other = theirs[name]
        for field in ("id", "case_key", "case", "status", "dataset", "inert", "tokens", "case_index"):
            assert other[field] == row[field], (name, field)
        assert other["metrics"].keys() == row["metrics"].keys()
        for metric, entry in row["metrics"].items():
            if "deterministic" in entry["class"] and not metric.startswith("mem_measured"):
                found = other["metrics"][metric]["value"]
                assert (
                    found == pytest.approx(entry["value"], rel=1e-6, nan_ok=False) if found else found == entry["value"]
                )
    assert [row["ppl"] for row in read_rows(run_folder(beside_xdist) / CSV)] == pytest.approx(
        [row["ppl"] for row in read_rows(run_folder(full) / CSV)], rel=1e-6
    )


# a second run


def test_a_later_run_without_pytest_benchmark_appends_its_row(runs: dict[str, Run], full: Run) -> None:
    later = runs["later"]
    assert later.code == 0, later.out + later.err
    assert later.said("1 passed")
    (row,) = rows(later).values()
    assert row["case"]["name"] == "text.txt-q4f16_1"
    assert len(row["metrics"]["ttft_s"]["values"]) == 2
    assert not DISTANCE & set(row["metrics"]), "nothing was to be compared"
    before = (full.folder / "reports" / CSV).read_text()
    after = (later.folder / "reports" / CSV).read_text()
    assert after.startswith(before)
    added = after.removeprefix(before)
    assert (run_folder(later) / CSV).read_text() == before.splitlines(keepends=True)[0] + added
    gathered = read_rows(later.folder / "reports" / CSV)
    assert len(gathered) == len(NAMES) + 1
    assert gathered[-1]["run_id"] == run_folder(later).name
    # and the same setting has the same value in both runs
    twin = rows(full)["text.txt-q4f16_1-hf-strided"]
    assert gathered[-1]["ppl"] == pytest.approx(value(twin, "perplexity"), rel=1e-6)


def assert_one_result(run: Run) -> None:
    assert run.code == 0, run.out + run.err
    found = list(rows(run).values())
    assert sorted(row["status"] for row in found) == ["ok", "skipped"]
    first, second = sorted(found, key=lambda row: row["status"])
    # whichever ran first: the one that was named first
    assert first["dataset"]["name"] == "text.txt"
    assert second["reason"] == (
        f"the same text as {first['dataset']['name']}, whose result it is: never two results of one text"
    )
    assert second["metrics"] == {}
    names = {path.name for path in run.reports if path.suffix == ".csv"}
    assert names == {f"{first['dataset']['name']}_ppl_results.csv"}


def test_the_same_text_twice_is_one_result(runs: dict[str, Run]) -> None:
    assert_one_result(runs["twice"])


@pytest.mark.slow
def test_the_same_text_twice_is_one_result_on_two_workers(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    options = ("--kv-dataset=text.txt,copy.txt", "--kv-quantization=none", "-n2")
    assert_one_result(run_pytest(project(tmp_path, copy=TEXT), f"--kv-model={checkpoint}", *SMALL, *options))


# selection


def collected(pytester: pytest.Pytester, *arguments: str) -> list[str]:
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:warnings", *arguments)
    assert result.ret == 0
    return sorted(line.partition("[")[2].removesuffix("]") for line in result.outlines if "::" in line)


def test_k_selects_by_suite_and_format(both: pytest.Pytester) -> None:
    assert collected(both, "-k", "perplexity and 4bit", "--kv-quantization=none,4bit,8bit") == ["default-4bit"]
    assert collected(both, "-k", "perplexity") == ["default-fake_q3", "default-none", "default-q4f16_1"]
    assert collected(both, "-k", "wikitext2 and fake_q3", "--kv-dataset=wikitext2,c4") == ["wikitext2-fake_q3"]
    several = ("--kv-ppl-protocol=disjoint,llama.cpp-half", "--kv-quantization=none,fake_q3")
    assert collected(both, "-k", "fake_q3 and llama.cpp and perplexity", *several) == ["default-fake_q3-llama.cpp-half"]


def test_the_default_run_selects_both_suites(both: pytest.Pytester) -> None:
    found = collected(both)
    assert {one for one in found if not one.startswith("hf-")} == {"default-fake_q3", "default-none", "default-q4f16_1"}
    assert any(one.startswith("hf-streaming") for one in found)


# bad input


def assert_refused(code: int, said: str, message: str) -> None:
    assert code == pytest.ExitCode.USAGE_ERROR, said
    found = [line for line in said.splitlines() if message in line]
    assert len(found) == 1, said
    assert "kvsuite: " in found[0]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            ("--kv-max-length=32", "--kv-stride=33"),
            ("--kv-stride=33: longer than the window of 32 tokens", "at most 32 or a longer --kv-max-length"),
        ),
        (("--kv-load-in-4bit", "--kv-load-in-8bit"), ("--kv-load-in-4bit and --kv-load-in-8bit: one of them hides",)),
        (("--kv-fake-q3bit", "--kv-quantization=none"), ("--kv-fake-q3bit and --kv-quantization: one of them hides",)),
        (("--kv-dataset=wikitext2,c4", "--kv-dataset-path=benchmarks"), ("--kv-dataset-path=benchmarks: is read for one",)),
        (("--kv-dataset=missing.txt",), ("--kv-dataset=missing.txt: no such corpus or file; check the path",)),
        (
            ("--kv-dataset=in/a b =[x],ü.txt",),
            ("--kv-dataset=in/a b =[x]: no such", "a path that has one goes into --kv-dataset-path, its name"),
        ),
        (("--kv-dataset=c4", "--kv-split=test"), ("--kv-dataset=c4: no split 'test'; c4 has validation, train",)),
        (("--kv-ppl-protocol=strided",), ("--kv-ppl-protocol=strided: use hf-strided, hf-docs, disjoint, lm-eval-rolling,",)),
        (("--kv-reference=q5",), ("--kv-reference=q5: unknown weight format q5; use none,",)),
        (("--kv-eval-tokens=1",), ("--kv-eval-tokens=1: must be at least 2",)),
        (("--kv-max-length=2",), ("--kv-max-length=2: must be at least 3",)),
        (("--kv-bos=first",), ("--kv-bos=first: use auto, none, bos_first,",)),
        (
            ("--kv-model=dummy:tiny", "-k", "perplexity"),
            ("--kv-model=dummy:tiny: random weights have no perplexity, and nothing else is selected; name a real model",),
        ),
        (("--kv-mlc-model=HF://mlc-ai/Qwen3-8B-q4f16_1-MLC",), ("give --kv-hf-model as well",)),
    ],
    ids=lambda item: item[0],
)  # fmt: skip
def test_bad_options_end_the_run_before_it_begins(
    both: pytest.Pytester, options: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    result = both.runpytest_inprocess(*options)
    said = result.stdout.str() + "\n" + result.stderr.str()
    for message in messages:
        assert_refused(result.ret, said, message)
    assert not (both.path / "reports").exists() or not list((both.path / "reports").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "--kv-dataset=text.txt: there is no text in it, or blanks only; give another corpus"),
        ("blank", "--kv-dataset=text.txt: there is no text in it, or blanks only; give another corpus"),
        ("one token", "--kv-dataset=text.txt: the text has one token only, and a perplexity needs at least 2; give a longer"),
        ("too short", "--kv-max-length=32: llama.cpp-half needs a text of at least 64 tokens, this one has 63; give a longer"),
        ("no hub", "--kv-dataset=wikitext2: "),
        ("no bos", "--kv-bos=bos_first: hf-strided needs a token before the text, and the tokenizer has neither a BOS nor"),
        ("no bos, rolling", "neither a BOS nor an EOS token; give another --kv-ppl-protocol"),
        ("no tokenizer", "--kv-model: the model has no tokenizer, so no text can be scored"),
    ],
)  # fmt: skip
def test_bad_texts_end_the_run_without_a_row(name: str, message: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    assert_refused(run.code, run.out + run.err, message)
    assert run.reports == []


def test_a_window_beyond_the_trained_length_is_no_result(runs: dict[str, Run]) -> None:
    run = runs["beyond"]
    assert run.code == pytest.ExitCode.TESTS_FAILED, "nothing that was selected could run"
    (row,) = rows(run).values()
    reason = (
        f"--kv-max-length={TRAINED_LENGTH + 1}: longer than the {TRAINED_LENGTH} tokens that the model was trained for"
    )
    assert (row["status"], row["reason"], row["metrics"]) == ("invalid", reason, {})
    assert run.said(f"error: no selected case could run: {reason}")
    assert not list(run.folder.rglob("*.csv"))
    assert not list(run.folder.rglob("*_ppl_vs_quant.*"))


def test_a_dummy_is_skipped_beside_the_compression_suite(runs: dict[str, Run]) -> None:
    run = runs["dummy"]
    assert run.code == 0, run.out + run.err
    assert run.said("1 passed, 1 skipped")
    found = {row["case"]["suite"]: row for row in lines(run)[1:]}
    assert found["compression"]["case"]["name"] == "baseline_q4f16_1"
    assert found["compression"]["status"] == "ok"
    assert found["compression"]["effective"]["weight_format"] == "q4f16_1"
    skipped = found["perplexity"]
    assert (skipped["status"], skipped["metrics"]) == ("skipped", {})
    assert skipped["reason"] == "--kv-model=dummy:tiny: random weights have no perplexity; name a real model"
    assert not list(run.folder.rglob("*.csv"))


def test_without_bitsandbytes_its_formats_are_skipped_with_the_install_line(runs: dict[str, Run]) -> None:
    run = runs["no bitsandbytes"]
    assert run.code == 0, run.out + run.err
    assert run.said("1 passed, 2 skipped")
    found = rows(run)
    for chosen in ("4bit", "8bit"):
        row = found[f"text.txt-{chosen}"]
        assert row["status"] == "skipped"
        assert row["reason"] == (
            f'{chosen} needs bitsandbytes, which is not installed; run: pip install "kvsuite[quantization]"'
        )
        assert run.said(f"skipped: {row['reason']}")
    # what the other case lacks is said in it
    reason = found["text.txt-none"]["metrics"]["kld"]["reason"]
    assert reason.startswith("the reference cannot run: 4bit needs bitsandbytes")
    assert [row["quantization"] for row in read_rows(run_folder(run) / CSV)] == ["fp32"]


@pytest.mark.parametrize("device", ["mps", "xpu:0", "vulkan:0"])
def test_8bit_names_the_devices_that_have_it(device: str) -> None:
    assert unavailable("8bit", device) == f"8bit by bitsandbytes runs on cpu and cuda, not on {device}"
