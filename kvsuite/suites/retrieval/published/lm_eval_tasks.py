"""Tasks of lm-evaluation-harness: by its own names, or a local YAML file."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.case import digest
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.options.paths import expanded

from .published_task import Asking, PublishedTask, ScoredTask

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

INSTALL = "pip install 'kvsuite[lm-eval]'"
#: lm-eval's own default, by which its examples of a prompt are drawn
FEWSHOT_SEED = 1234
# of metrics without a formula for their error; lm-eval's default of 100,000 takes longer than a small task
_BOOTSTRAP = 1000
# tags of YAML's own types
_PLAIN_TAGS = "tag:yaml.org,2002:"
# equal to a mean but for the order of a sum
_ROUNDING = 1e-9
# metrics of a sample from 0 to 1 by definition; of another one values within it say nothing of its range
_FROM_0_TO_1 = {
    "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match", "likelihood", "bleu_acc", "rouge1_acc",
    "rouge2_acc", "rougeL_acc", "prompt_level_strict_acc", "prompt_level_loose_acc",
}  # fmt: skip


def load_lm_eval_tasks(asked: str) -> list[LmEvalTask]:
    """The tasks that one item of ``--kv-lm-eval`` names, with their data; a group or a tag is all of its tasks.

    Raises
    ------
    UserError
        If lm-eval is not installed, knows no such task, or cannot read it or its data.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--kv-lm-eval={asked}: lm-eval is not installed; run: {INSTALL}")
    is_file = asked.endswith((".yaml", ".yml"))
    if is_file and not expanded(asked).is_file():
        raise UserError(
            f"--kv-lm-eval={asked}: there is no such file; give a task file of lm-eval, or a name of its own tasks"
        )
    manager = _manager(defaults=not is_file)
    if not is_file and asked not in manager.all_tasks:
        raise UserError(
            f"--kv-lm-eval={asked}: lm-eval {version('lm_eval')} has no such task; `lm-eval ls tasks` lists them, and a file "
            "of your own ends in .yaml"
        )
    try:
        if is_file and (code := _code_named_in(expanded(asked).resolve(), set())):
            raise UserError(
                f"--kv-lm-eval={asked}: {code}; write the task without it, or give a task of lm-eval's own by name"
            )
        loaded = manager.load([str(expanded(asked)) if is_file else asked])["tasks"]
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a task file, a data set, a hub or imported code raises
        raise UserError(f"--kv-lm-eval={asked}: {_what_failed(error)}") from error
    for name, task in loaded.items():
        # lm-eval says so in its log and goes on, until something is scored
        unknown = [metric for metric, function in task._metric_fn_list.items() if function is None]
        if unknown and task.config.process_results is None:
            raise UserError(
                f"--kv-lm-eval={asked}: task {name} has no metric that lm-eval knows as {unknown[0]}; name another"
            )
    return [LmEvalTask(name, task) for name, task in loaded.items()]


@functools.cache
def _manager(*, defaults: bool) -> TaskManager:
    """lm-eval's index of tasks, whose 10,000 files take seconds to read; none for a local file."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _code_named_in(path: Path, seen: set[Path]) -> str | None:
    """What names code in a file or in one that it includes; nothing is constructed or imported."""
    import lm_eval.api.metrics  # noqa: F401 (fills the registry)
    import yaml  # type: ignore[import-untyped]
    from lm_eval.api.registry import metric_registry

    if path in seen or not path.is_file():
        return None
    seen.add(path)
    # aliases may make a graph of it, with circles
    nodes, walked = [yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in walked:
            continue
        walked.add(id(node))
        if not node.tag.startswith(_PLAIN_TAGS) or "python/" in node.tag:
            return f"{path} names code that would be run (a YAML tag such as !function)"
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                nodes += [key, value]
                scalar = value.value if isinstance(value, yaml.ScalarNode) else ""
                if key.value == "hf_evaluate" and scalar.lower() not in ("false", "no", "off"):
                    return f"{path} asks for a metric by hf_evaluate, whose code would be fetched and run"
                # a metric that lm-eval does not know is taken for a package of Hugging Face's evaluate, or a path to one
                if key.value == "metric" and scalar and scalar not in metric_registry:
                    return f"{path} has a metric that is none of lm-eval's own and would be run as code, {scalar}"
                if key.value != "include":
                    continue
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(one, yaml.ScalarNode):
                        found = _code_named_in((path.parent / one.value).resolve(), seen)
                        if found:
                            return found
    return None


def _what_failed(error: BaseException) -> str:
    """In one line, with the mend."""
    from datasets.exceptions import DatasetNotFoundError

    told = " ".join(str(error).split())
    if isinstance(error, ConnectionError | DatasetNotFoundError) or "offline" in told.lower():
        return (
            f"its data set is not on this machine and cannot be fetched ({told}); run once on a connected machine and then "
            "with HF_HUB_OFFLINE=1, or give a task file whose dataset_path is json and whose data_files are local"
        )
    return f"lm-eval cannot load it: {type(error).__name__}: {told}; mend the task file or its data"


class LmEvalTask(PublishedTask):
    """One task, whose samples, prompts, filters and metrics are lm-eval's.

    Parameters
    ----------
    name
        lm-eval's.
    task
        Loaded, with its data.
    """

    kind: ClassVar[str] = "lm-eval"
    in_one_piece: ClassVar[bool] = True

    def __init__(self, name: str, task: ConfigurableTask) -> None:
        self.name = f"lm_eval_{name}"
        self._task = task
        self._own_name = name

    def size(self, count: int) -> tuple[int, int]:
        documents = self._task.eval_docs
        used = min(count, len(documents))
        texts = [self._task.doc_to_text(documents[index]) for index in range(used)]
        return used, sum(len(str(text)) for text in texts) * (1 + int(self._task.config.num_fewshot or 0))

    def score(self, asking: Asking, count: int, full: ScoredTask | None = None) -> ScoredTask:
        from lm_eval.evaluator import evaluate

        from .lm_eval_model import SessionModel

        model, task, name = SessionModel(asking), self._task, self._own_name
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        try:
            found = evaluate(model, {"tasks": {name: task}}, limit=count, bootstrap_iters=_BOOTSTRAP, log_samples=True)
        except CaseInvalid as error:
            raise CaseInvalid(f"--kv-lm-eval: task {name}: {error}") from error
        except Exception as error:
            if error is model.failed:
                # of the engine, such as memory that runs out
                raise
            told = " ".join(str(error).split())
            # a ValueError is lm-eval's word for what it does not run: images, code that would be executed
            if not isinstance(error, ValueError):
                told = f"its own code raised {type(error).__name__}: {told}; mend the task, or give another"
            raise CaseInvalid(f"--kv-lm-eval: task {name}: {told}") from error
        results, samples = found["results"][name], found["samples"][name]
        chosen = _mean_of_samples(task.higher_is_better(), results, samples) if full is None else _rule_of(full)
        first = [sample for sample in samples if sample["filter"] == (chosen[1] if chosen else samples[0]["filter"])]
        first.sort(key=lambda sample: int(sample["doc_id"]))
        hashes = [digest([one["doc_hash"], one["prompt_hash"], one["target_hash"]]) for one in first]
        scores = [float(one[chosen[0]]) for one in first] if chosen else None
        if chosen and scores and not all(0 <= score <= 1 for score in scores):
            raise CaseInvalid(
                f"--kv-lm-eval: task {name}: its metric {chosen[0]} is not from 0 to 1; give another task"
            )
        return ScoredTask(
            scores=scores,
            rows=[_row(one) for one in first],
            hashes=hashes,
            contexts=[tokens for tokens, _ in model.contexts],
            kept=[kept for _, kept in model.contexts],
            longest=list(model.longest),
            facts={
                "task": name,
                "task_version": str(task.VERSION),
                "task_hash": digest(hashes),
                "lm_eval_version": version("lm_eval"),
                "output_type": str(task.OUTPUT_TYPE),
                "fewshot": int(task.config.num_fewshot or 0),
                "fewshot_seed": FEWSHOT_SEED,
                "samples": len(first),
                "samples_of": len(task.eval_docs),
                "score": ",".join(chosen) if chosen else None,
                "metrics": _metrics(results),
            },
            reason=""
            if chosen
            else "no metric of the task is known to be a mean over samples, from 0 to 1 and better when higher",
        )


def _mean_of_samples(
    higher: Mapping[str, bool], results: Mapping[str, Any], samples: list[dict[str, Any]]
) -> tuple[str, str] | None:
    """Metric and filter: the first one known to be a mean over samples, from 0 to 1 and better when higher."""
    for filtered in dict.fromkeys(str(sample["filter"]) for sample in samples):
        of_filter = [sample for sample in samples if sample["filter"] == filtered]
        for metric, is_higher in higher.items():
            values = [sample.get(metric) for sample in of_filter]
            if not is_higher or metric not in _FROM_0_TO_1:
                continue
            if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
                continue
            whole = results.get(f"{metric},{filtered}")
            if whole is not None and abs(fmean(map(float, values)) - float(whole)) <= _ROUNDING:  # type: ignore[arg-type]
                return metric, filtered
    return None


def _rule_of(full: ScoredTask) -> tuple[str, str] | None:
    """Metric and filter by which the full cache was scored."""
    if full.facts["score"] is None:
        return None
    metric, _, filtered = full.facts["score"].partition(",")
    return metric, filtered


def _metrics(results: Mapping[str, Any]) -> dict[str, float | None]:
    """lm-eval's metrics and standard errors by its own keys; what it does not know is ``None``."""
    return {
        key: float(value) if isinstance(value, int | float) else None for key, value in results.items() if "," in key
    }


def _row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One sample, in JSON types."""
    return {
        "sample": int(sample["doc_id"]),
        "right": str(sample["target"]),
        "answers": [
            [float(one[0]), bool(one[1])] if isinstance(one, tuple) else str(one) for one in sample["filtered_resps"]
        ],
        "metrics": {name: float(sample[name]) for name in sample["metrics"] if isinstance(sample[name], int | float)},
    }
