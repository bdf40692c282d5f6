"""Bad input: exit code 4, one line that names the option, the value and the mend, and nothing in the report folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pytest_runs import TINY, Run, copy_benchmarks, run_pytest

from kvsuite.models.smollm2 import MANIFEST, converted_path

pytestmark = pytest.mark.usefixtures("what_runs_import")

BAD = {
    "policy": ("--kv-method=nope", "unknown method; known: expected_attention, fix_size_l2, h2o, "),
    "policy of kvpress": ("--kv-method=adakv", "did you mean kvpress:AdaKV?"),
    "press": ("--kv-method=kvpress:SnapVK", "did you mean kvpress:SnapKV?"),
    "policy left out": ("--kv-method=head_aware", "not part of kvsuite; use kvpress:AdaKV"),
    "policy twice": ("--kv-method=recent_only,recent_only", "names the same value twice"),
    "model": ("--kv-model=llama", "not a model; give smollm2, dummy:tiny, a local folder, a .gguf file or a hub id"),
    "model path": ("--kv-model=/no/such/model", "no such file or folder; check the path"),
    "model file": ("--kv-model=missing.gguf", "no such file or folder; check the path"),
    "model folder": ("--kv-model=./benchmarks", "no config.json in the folder; give a Hugging Face model folder"),
    "preset": ("--kv-model=dummy:huge", "unknown preset; choose one of Llama-3-8B"),
    "size 0": ("--kv-recent-sizes=0", "must be at least 1; for example --kv-recent-sizes=28,60,124"),
    "size -1": ("--kv-fix-kv-sizes=32,-1", "must be at least 1; for example"),
    "size abc": ("--kv-recent-sizes=abc", "not a whole number; for example"),
    "size twice": ("--kv-recent-sizes=8,8", "names the same value twice"),
    "tokens 1": ("--kv-max-tokens=1", "must be at least 2; for example"),
    "rounds": ("--kv-rounds=0", "must be at least 1; for example --kv-rounds=5"),
    "rounds as text": ("--kv-rounds=many", "not a whole number; for example --kv-rounds=5"),
    "dtype": ("--kv-dtype=int4", "unknown dtype; choose float32, float16 or bfloat16"),
    "device": ("--kv-device=tpu:0", "unknown device; use cpu, cuda[:N],"),
    "sinks": ("--kv-start-size=9", "more sinks than recent tokens (--kv-recent-sizes=4); lower --kv-start-size"),
    "ratio 0": ("--kv-keep-ratios=0", "must lie in (0, 1]; for example --kv-keep-ratios=0.8,0.5,0.3"),
    "ratio above 1": ("--kv-keep-ratios=1.5", "must lie in (0, 1]; for example"),
    "ratio nan": ("--kv-keep-ratios=0.5,nan", "must lie in (0, 1]; for example"),
    "ratio as text": ("--kv-keep-ratios=half", "not a number; for example"),
    "weight format": (
        "--kv-quantization=none,nonsense", "unknown weight format nonsense; use none, "),
    "weight format compared with": ("--kv-reference=nonsense", "unknown weight format nonsense; use none, "),
    "rule": ("--kv-fail=nonsense", "nonsense is no rule; write METRIC:LIMIT or one of missing, "),
    "schedule": ("--kv-l2-mode=sometimes", "unknown schedule; use every_token, single_shot or interval=N"),
    "strategy": ("--kv-strategies=keep_best", "use keep_low, keep_high, random"),
    "corpus": ("--kv-corpus=/no/such/text.txt", "no such corpus or file; check the path, or choose one of default"),
    "corpus name": ("--kv-corpus=pg20", "no such corpus or file; check the path, or choose one of default"),
    "empty": ("--kv-model=", "is empty; for example --kv-model=smollm2"),
    "report folder": ("--kv-report-dir=taken", "cannot write there (File exists); choose a folder you may write to"),
    "digits of another alphabet": ("--kv-rounds=٥", "not a whole number; use the digits 0 to 9 alone; for example"),
    "digits with a line": ("--kv-prompt-tokens=1_000", "not a whole number; use the digits 0 to 9 alone; for example"),
    "sign": ("--kv-seed=+5", "not a whole number; use the digits 0 to 9 alone; for example --kv-seed=0"),
    "seed beyond 64 bits": (f"--kv-seed={2**64}", f"must be at most {2**64 - 1}; for example --kv-seed=0"),
    "prompt of any size": ("--kv-prompt-tokens=100000000", "must be at most 10000000; for example"),
    "time that is none": ("--kv-timeout=1e-320", "must lie between 0.001 and 1e8 s; for example --kv-timeout=600"),
    "home of nobody": ("--kv-report-dir=~nosuch/x", "no home folder is known for it; give the whole path; for example"),
    "model at the home of nobody": ("--kv-model=~nosuch/x", "no home folder is known for it; give the whole path"),
    "below a file": ("--kv-report-dir=taken/runs", "cannot write there (Not a directory); choose a folder"),
}  # fmt: skip


@pytest.mark.parametrize(("option", "mend"), BAD.values(), ids=BAD)
def test_bad_option(benchmarks: pytest.Pytester, option: str, mend: str) -> None:
    (benchmarks.path / "taken").write_text("a file in the way")
    result = benchmarks.runpytest_inprocess(*TINY, option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith(f"ERROR: kvsuite: {option}: ")
    assert mend in line
    assert not (benchmarks.path / "reports").exists()
    assert (benchmarks.path / "taken").read_text() == "a file in the way"


@pytest.mark.parametrize(
    ("option", "mend"),
    [
        ("--kv-observation-windows=16,32", "--kv-observation-windows: not part of kvsuite; use --kv-method=kvpress:SnapKV"),
        ("--kv_classifications_path=x", "--kv-classifications-path: head_aware is not part of kvsuite; use --kv-method="),
        ("--kv-compare-new", "--kv-compare-new: not part of kvsuite; use --kv-method="),
    ],
)  # fmt: skip
def test_an_option_of_the_originals_that_is_refused(benchmarks: pytest.Pytester, option: str, mend: str) -> None:
    result = benchmarks.runpytest_inprocess(*TINY, option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith(f"ERROR: kvsuite: {mend}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--kv-method=kvpress:SnapKV", "--kv-protocol=streaming-decode"),
            "--kv-protocol=streaming-decode: SnapKV_kr=0.8 compresses a prefilled prompt",
        ),
        (("--kv-method=kvpress:SnapKV", "--kv-positions=cache"), "--kv-positions=cache: kvpress:SnapKV decides on positions"),
        (("--kv-method=kvpress:SnapKV", "--kv-skip-layers=0"), "--kv-skip-layers: kvpress:SnapKV treats all layers"),
        (
            ("--kv-method=recent_only", "--kv-no-baseline", "--kv-positions=both", "--kv-recent-sizes=0"),
            "--kv-recent-sizes=0: must be at least 1",
        ),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other(benchmarks: pytest.Pytester, options: tuple[str, ...], message: str) -> None:
    result = benchmarks.runpytest_inprocess(*TINY, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith(f"ERROR: kvsuite: {message}")


def test_a_bad_environment_variable_and_ini_line_are_found_too(
    benchmarks: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = benchmarks.runpytest_inprocess(*TINY, "-o", "kv_seed=x")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: kvsuite: --kv-seed=x: not a whole number; for example --kv-seed=0"])
    monkeypatch.setenv("KV_IMPL", "list")
    result = benchmarks.runpytest_inprocess(*TINY)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: kvsuite: --kv-impl=list: use ring, copy; for example --kv-impl=ring"])


def test_a_misspelt_option_is_told_with_the_one_that_was_meant(benchmarks: pytest.Pytester) -> None:
    result = benchmarks.runpytest_inprocess(*TINY, "--kv-methd=recent_only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*unrecognized arguments: --kv-methd=recent_only", "*--kv-methd: did you mean --kv-method[?]"]
    )


def test_a_misspelt_variable_is_told_once(tmp_path: Path) -> None:
    arguments = (*TINY, "-k", "recent_only", "--collect-only", "-q")
    run = run_pytest(copy_benchmarks(tmp_path), *arguments, KV_ROUNDZ="7")
    assert run.code == pytest.ExitCode.OK
    assert run.said("KV_ROUNDZ") == [
        "kvsuite: warning: KV_ROUNDZ in the environment is read by nothing; did you mean KV_ROUNDS?"
    ]


def test_no_folder_is_named_after_the_sign_of_the_home_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    project = copy_benchmarks(tmp_path / "project")
    arguments = (*TINY, "-k", "recent_only", "--kv-report-dir=~/runs", "-W", "ignore", "--kv-rounds=1")
    run = run_pytest(project, *arguments, HOME=str(home))
    assert run.code == pytest.ExitCode.OK, run.out
    assert len(list((home / "runs").glob("*/records.jsonl"))) == 1
    assert not list(tmp_path.rglob("~*"))


def test_xdist_finds_bad_options_before_it_starts_a_worker(benchmarks: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    (benchmarks.path / "taken").write_text("a file in the way")
    result = benchmarks.runpytest_inprocess(*TINY, "-n2", "--kv-dtype=int4")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "workers" not in result.stdout.str()


def assert_one_line(run: Run, message: str) -> None:
    assert run.code == pytest.ExitCode.USAGE_ERROR
    (line,) = run.said(message)
    assert "kvsuite: " in line
    assert "Traceback" not in run.out + run.err
    assert "FAILURES" not in run.out
    assert run.reports == [], "nothing was measured"


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "xdist"])
def test_a_corpus_that_is_too_short_ends_the_run(tmp_path: Path, tiny_model: Path, workers: tuple[str, ...]) -> None:
    (tmp_path / "short.txt").write_text("A text of forty characters, hardly more.")
    run = run_pytest(
        copy_benchmarks(tmp_path),
        *TINY,
        f"--kv-model={tiny_model}",
        "--kv-corpus=short.txt",
        "--kv-max-tokens=41",
        *workers,
    )
    assert_one_line(
        run, "--kv-max-tokens: text 1 of corpus short.txt has 40 tokens, 41 are needed; lower --kv-max-tokens"
    )


def test_xdist_finds_an_unwritable_report_folder_before_it_measures(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "taken").write_text("a file in the way")
    run = run_pytest(copy_benchmarks(tmp_path), *TINY, "--kv-report-dir=taken", "-n2")
    assert_one_line(run, "--kv-report-dir=taken: cannot write there (File exists); choose a folder you may write to")


def test_a_damaged_cached_model_is_named(tmp_path: Path) -> None:
    folder = converted_path(tmp_path / "cache")
    folder.mkdir(parents=True)
    files = {"config.json": {"size": 2, "sha256": "0" * 64}}
    (folder / MANIFEST).write_text(json.dumps({"schema": "kvsuite.converted/1", "files": files}))
    (folder / "config.json").write_text("{}")
    run = run_pytest(copy_benchmarks(tmp_path), *TINY, "--kv-model=smollm2", f"--kv-cache-dir={tmp_path / 'cache'}")
    assert_one_line(
        run, f"--kv-model=smollm2: config.json in {folder} is missing or damaged; delete that folder or choose"
    )


def test_a_weight_format_that_is_impossible_for_the_model_ends_its_own_case_alone(tmp_path: Path) -> None:
    """A weight that float16 cannot hold: the formats of float16 are invalid, the others are measured."""
    conftest = """
import pytest, torch
from kvsuite.quantization import apply

@pytest.fixture(autouse=True, scope="session")
def a_weight_beyond_float16():
    from kvsuite.engines import loading
    load = loading.load_model
    def spoilt(*args, **named):
        loaded = load(*args, **named)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                if parameter.dim() == 2:
                    parameter[0, 0] = 1e30
        return loaded
    loading.load_model = spoilt
    yield
    loading.load_model = load
"""
    project = copy_benchmarks(tmp_path, conftest=conftest)
    run = run_pytest(
        project, *TINY, "-k", "baseline", "--kv-quantization=none,q4f16_1", "--kv-rounds=1", "-W", "ignore"
    )
    rows = {row["case"]["quantization"]: row for row in run.lines()[1:]}
    assert rows[None]["status"] == "ok"
    assert rows["q4f16_1"]["status"] == "invalid"
    assert "not finite in float16" in rows["q4f16_1"]["reason"]
