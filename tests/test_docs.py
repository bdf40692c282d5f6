"""README and docs say what the code does: tables against registries, links, commands, examples."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_runs import run_pytest

import kvsuite.engines.registry  # noqa: F401  a run inside this process drops what it imports first; suites outlive it
from kvsuite.__main__ import main
from kvsuite.compression import REPLACEMENTS, CacheView, Policy, find_policy, list_policies
from kvsuite.compression.kvpress.table import PRESSES
from kvsuite.metrics.registry import ALIASES, BUILTIN, Metric
from kvsuite.models.presets import PRESETS, build_config
from kvsuite.options.groups import all_options, refused_names
from kvsuite.options.option import Option
from kvsuite.record import STATUSES
from kvsuite.suites.perplexity.columns import COLUMNS, ORIGINAL_COLUMNS

OPTIONS = all_options()
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")])
VOCABULARY = {"case", "record", "metrics", "errors", "foreign_text", "__version__"}


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def tables(page: str) -> list[list[str]]:
    """Rows of a page's tables as cells without code marks."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def row(page: str, *first: str) -> list[str]:
    """The one row whose first cell is one of ``first``."""
    (found,) = [cells for cells in tables(page) if cells[0] in first]
    return found


def blocks(page: str, language: str = "") -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


# options


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_with_its_defaults_and_twins(option: Option) -> None:
    names = [f"--kv-{name}" for name in (option.name, *option.aliases)]
    _, default, original, ini, environment, meaning = row(text("options.md"), ", alias ".join(names))
    assert default == (option.default or "(see right)")
    assert original == (option.original or "")
    assert (ini, environment) == (option.dest, option.dest.upper())
    assert meaning


def test_no_option_of_the_docs_is_unknown() -> None:
    known = {f"--kv-{name}" for option in OPTIONS for name in (option.name, *option.aliases)}
    known |= {f"--{name}".replace("_", "-") for name in known}
    # of the examples of packages that bring their own
    known |= {"--kv-burst-sizes", "--kv-my-depth"}
    for page in PAGES:
        for found in re.findall(r"--kv[-_][a-z0-9_-]*[a-z0-9]", page.read_text()):
            assert found.replace("_", "-") in known, f"{page.name}: {found}"


def test_refused_options_and_methods_name_their_replacement() -> None:
    page = text("options.md")
    for name, mend in refused_names().items():
        (cells,) = [cells for cells in tables(page) if f"--{name.replace('-', '_')}" in cells[0].split(", ")]
        assert set(re.findall(r"kvpress:\w+|fix_size_l2", mend)) == set(
            re.findall(r"kvpress:\w+|fix_size_l2", cells[1])
        )
    for name, mend in REPLACEMENTS.items():
        _, instead = row(page, name)
        assert re.findall(r"kvpress:\w+|fix_size_l2", mend) == re.findall(r"kvpress:\w+|fix_size_l2", instead)


def test_the_mapping_gives_the_presets_value() -> None:
    by_name = {f"--kv-{option.name}": option for option in OPTIONS}
    mapped = [cells for cells in tables(text("options.md")) if len(cells) == 6 and cells[2] in by_name]
    assert len(mapped) >= 20
    for original, _, ours, default, preset, _ in mapped:
        option = by_name[ours]
        off = {"false": "off"}
        assert default == off.get(option.default, option.default), ours
        assert preset == off.get(option.original or option.default, option.original or option.default), ours
        assert original


# metrics, statuses, presses, presets


@pytest.mark.parametrize("metric", BUILTIN, ids=lambda metric: metric.name)
def test_every_metric_with_unit_direction_and_class(metric: Metric) -> None:
    _, unit, better, kind, definition = row(text("metrics.md"), metric.name)
    assert (unit, better, kind) == (metric.unit, metric.better, metric.metric_class)
    assert definition


def test_aliases_of_metrics() -> None:
    for short, name in ALIASES.items():
        assert f"`{short}` = `{name}`" in text("metrics.md")


def test_every_status_is_explained() -> None:
    for status in STATUSES:
        _, meaning, outcome = row(text("records.md"), status)
        assert meaning
        assert outcome or status == "crashed"


def test_every_press_with_what_it_frees_and_when_it_acts() -> None:
    page = text("kvpress.md")
    for info in PRESSES.values():
        cells = row(page, info.name)
        assert cells[1:3] == ["yes" if info.frees_memory else "no", info.compresses], info.name
        if info.unavailable:
            assert cells[3] == info.unavailable
            continue
        inner = [
            name for default in info.inner.values() for name in ([default] if isinstance(default, str) else default)
        ]
        assert cells[4] == ", ".join(inner), info.name
        facts = {"needs eager attention": info.attention == "eager", "uneven layers": info.uneven_layers,
                 "re-rotates keys": info.positions == "cache", "seeded by": info.random,
                 "writes a prompt": info.needs_tokenizer}  # fmt: skip
        assert {fact: fact in cells[5] for fact in facts} == facts, info.name
        for name, value in info.arguments.items():
            assert f"{name}={value}" in cells[5]


def test_the_numbers_of_presses() -> None:
    runnable = sum(info.unavailable is None for info in PRESSES.values())
    readme = (ROOT / "README.md").read_text()
    assert f"All {len(PRESSES)} presses of kvpress 0.5.5 are known, {runnable} run" in readme
    assert f"These {len(PRESSES) - runnable} are known but cannot run" in text("kvpress.md")
    assert f"{len(PRESSES)} presses of kvpress 0.5.5 by name" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_with_its_cache(preset: str) -> None:
    (cells,) = [cells for cells in tables(text("models.md")) if cells[0].split(" (")[0] == preset]
    config = build_config(preset).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    assert cells[2:] == [
        str(layers), f"{heads} × {head_dim}", f"{2 * layers * heads * head_dim * 2:,}", f"{config.max_position_embeddings:,}",
    ]  # fmt: skip


def test_the_csvs_header_is_the_documented_one() -> None:
    (own,) = re.findall(r"the original's ten columns first, then `([^`]+)`", text("perplexity.md"))
    assert len(ORIGINAL_COLUMNS) == 10
    assert tuple(own.split(", ")) == COLUMNS[len(ORIGINAL_COLUMNS) :]


# links and figures


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"\]\((\w+\.md)", text("index.md")))
    assert listed == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


def test_the_figure_is_an_image_of_reasonable_size() -> None:
    figure = DOCS / "figures" / "compression_smollm2.png"
    data = figure.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") >= 1200
    assert len(data) < 400_000


def test_the_figure_of_mlc_is_drawn_from_the_numbers_of_its_table() -> None:
    lines = re.findall(
        r"^\| ([\d,]+) \| (\d+) \|(.*)\|$", text("mlc.md").split("## Beside `nano`")[1].split("![")[0], re.MULTILINE
    )
    table = {
        (int(context.replace(",", "")), int(batch)): [cell.strip(" ¹²") for cell in cells.split("|")]
        for context, batch, cells in lines
    }
    columns = {"mlc": (0, 2, 3, 6), "nano": (1, 2, 4, 8)}
    drawn = set()
    for row in csv.DictReader((DOCS / "measurements/h200_mlc_nano.csv").read_text(encoding="utf-8").splitlines()):
        point = int(row["context"]), int(row["batch"])
        drawn.add((row["engine"], *point))
        numbers = [row[name] for name in ("decode_step_ms", "floor_ms", "ttft_ms", "memory_mib")]
        assert numbers == [table[point][column] for column in columns[row["engine"]]], point
    assert drawn == {(name, *point) for point, cells in table.items() for name in columns if cells[columns[name][0]]}


# commands


def commands(prefix: str) -> list[Any]:
    """Command lines of all pages, without comments; those with a ``<part>`` to fill in are left out."""
    found: dict[str, Path] = {}
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            for line in block.splitlines():
                command = re.sub(r"\s+#.*", "", line).strip()
                if re.match(rf"(?:[A-Z_]+=\S+ )*{prefix}", command) and "<" not in command:
                    found.setdefault(command, page)
    return [pytest.param(command, id=f"{page.stem}: {command}") for command, page in found.items()]


@pytest.fixture
def project(what_runs_import: None, pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with the benchmarks, and the model and the text that the examples name."""
    import shutil

    shutil.copytree(ROOT / "benchmarks", pytester.path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pytest.ini", pytester.path)
    (pytester.path / "my-model").mkdir()
    (pytester.path / "my-model" / "config.json").write_text("{}")
    (pytester.path / "book.txt").write_text("A book.")
    (pytester.path / "wiki.test.raw").write_text("A text.")
    # of weights the hash alone is looked at before a case runs
    (pytester.path / "mlp_compressor.pth").write_bytes(b"weights")
    asked = {
        "input": "Some.\nWhat?",
        "context": "A text.",
        "all_classes": None,
        "dataset": "hotpotqa",
        "answers": ["text"],
    }
    for name, line in {
        "LongBench/hotpotqa.jsonl": asked,
        "ruler/4096/data/vt/validation.jsonl": {"index": 0, "input": "Some.\nWhat?", "outputs": ["text"]},
    }.items():
        path = pytester.path / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(line))
    return pytester


@pytest.mark.parametrize("command", commands("(?:python -m )?pytest benchmarks"))
def test_commands_collect_cases(command: str, project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("KV_", "PYTEST_ADDOPTS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    arguments = words[words.index("pytest") + 1 :]
    here = {"/models/my-model": str(project.path / "my-model"), "/texts/book.txt": str(project.path / "book.txt")}
    for example, real in here.items():
        arguments = [argument.replace(example, real) for argument in arguments]
    arguments += [flag for flag in ("--collect-only", "-q") if flag not in arguments]
    result = project.runpytest_inprocess(*arguments, "-p", "no:cacheprovider")
    assert result.ret == 0, result.stderr.str()
    assert any(
        re.search(r"::test_(compression|perplexity|dse|pipeline|retrieval|sensitivity)\[", line)
        for line in result.outlines
    )


@pytest.mark.parametrize("name", ["README.md", "docs/records.md"])
def test_the_report_command_takes_what_the_docs_give_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"python -m kvsuite (report [^`\n]*)", (ROOT / name).read_text())
    assert lines
    for line in lines:
        words = line.replace("<run folder>", "no_such_run").split()
        # 4 is bad input, found after the arguments were understood (2 is argparse's)
        assert main(words) == 4, line
        assert "no_such_run" in capsys.readouterr().err or "report.json" in words


def test_make_targets_and_variables_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE)) | {"ARGS"}
    for page in PAGES:
        for called in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert "".join(called) in targets, f"{page.name}: make {called}"
        for line in re.findall(r"^make .*", page.read_text(), re.MULTILINE):
            assert set(re.findall(r"\b([A-Z_]+)=", line)) <= variables, line
    assert {cells[0] for cells in tables(text("install.md")) if cells[0].isupper()} == variables


# examples


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KV_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder,
        env=kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_examples_of_a_users_repository_run(tmp_path: Path) -> None:
    (readme,) = blocks((ROOT / "README.md").read_text(), "python")
    suite, by_hand, _, _, hooks = blocks(text("plugin.md"), "python")
    (tmp_path / "test_readme.py").write_text(readme)
    (tmp_path / "test_plugin.py").write_text(suite)
    (tmp_path / "test_by_hand.py").write_text(by_hand)
    (tmp_path / "conftest.py").write_text(hooks)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nkv_model = dummy:tiny\nkv_device = cpu\nkv_threads = 1\nkv_rounds = 2\n"
        "kv_prompt_tokens = 48\nkv_max_new_tokens = 4\n"
    )
    done = run_pytest(tmp_path, "-q", "--strict-markers", "-k", "baseline or streaming_32 or hand")
    assert done.code == 0, done.out + done.err
    assert "5 passed" in done.out
    (folder,) = (tmp_path / "reports").iterdir()
    assert (folder / "statuses.txt").read_text() == "ok ok ok ok ok"
    assert (folder / "records.jsonl").read_text().count('"joules_per_token"') == 5


def test_the_example_without_pytest_runs(tmp_path: Path) -> None:
    example, whole = blocks(text("plugin.md"), "python")[3], 'rounds="2"'
    assert whole in example
    short = example.replace(whole, f'{whole}, prompt_tokens="48", max_new_tokens="4"')
    (tmp_path / "example.py").write_text(short)
    done = run_python(tmp_path, "example.py")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines][:2] == [["baseline", "ok"], ["recent_only_32", "ok"]]
    assert len(lines) == 7
    assert all(int(line[2]) > 0 for line in lines)


def test_the_runtimes_example_runs(tmp_path: Path) -> None:
    (example,) = blocks(text("nanovllm.md"), "python")
    (tmp_path / "example.py").write_text(example)
    done = run_python(tmp_path, "example.py")
    assert done.returncode == 0, done.stderr
    served, drawn, refused, counters = done.stdout.splitlines()
    assert served == "request-0 finished length 12"
    assert drawn.startswith("request-1 finished")
    assert refused.startswith("request-2 failed a prompt of 197 tokens leaves no room for output in max_model_len=128")
    assert ast.literal_eval(counters)["logical_prompt_tokens"] == 37 + 57


def test_the_runtimes_limits_and_their_defaults() -> None:
    from dataclasses import fields

    from kvsuite.nanovllm.limits import Limits

    documented: dict[str, str] = {}
    page = text("nanovllm.md").split("## Limits")[1].split("## The way")[0]
    for names, default, _ in tables(page)[1:]:
        documented |= dict.fromkeys(names.split(", "), default)
    words = {True: "on", False: "off"}
    for field in fields(Limits):
        found = documented.pop(field.name)
        if field.name not in ("num_blocks", "pool_bytes", "memory_share", "cache_format"):
            wanted = "off" if field.default in (None, 0) else words.get(field.default, str(field.default))
            assert found == wanted, field.name
    assert not {name for name in documented if not name.startswith("---")}


def test_the_example_policy_keeps_what_its_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    source, line = blocks(text("compression.md"), "python")[:2]
    # a dataclass looks its module up
    module = ModuleType("example_policy")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace = vars(module)
    exec(compile(source, "docs/compression.md", "exec"), namespace)
    (policy_class,) = [
        c for c in namespace.values() if isinstance(c, type) and issubclass(c, Policy) and c is not Policy
    ]
    (expected,) = eval(line, {"Line": lambda *own, **more: SimpleNamespace(own=own, **more)})
    name, parameters, kept = expected.own
    assert policy_class.name == name
    policy, unlimited = policy_class(**parameters), policy_class(**parameters | dict(expected.unlimited))
    for n in range(1, 41):
        view = CacheView(torch.arange(n), n - 1)
        assert policy.keep(view).tolist() == list(kept(n, []))
        assert policy.size_after(n) == len(kept(n, []))
        assert unlimited.size_after(n) == n


# the house


def test_every_policy_says_when_it_acts() -> None:
    acts = {}
    for rows in re.findall(r"^\| policy \|.*?(?=^$)", text("compression.md"), re.MULTILINE | re.DOTALL):
        head, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows.splitlines()]
        acts |= {line[0].strip(" `").partition("(")[0]: line[head.index("acts")] for line in lines}
    assert set(acts) == {name for name in list_policies() if find_policy(name).__module__.startswith("kvsuite.")}
    assert {name for name, when in acts.items() if when == "at the end of the prompt"} == {
        name for name in acts if find_policy(name).acts == "prompt"
    }
