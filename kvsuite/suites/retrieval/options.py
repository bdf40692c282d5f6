"""Options of the retrieval suite."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated, Any

from kvsuite.options.numbers import decimal
from kvsuite.options.option import Option, OptionGroup, choice, list_of, path_or_name, text, whole_number

#: tasks by name; `kvsuite.suites.retrieval.tasks` makes them
TASKS = (
    "facts1", "facts4", "facts16", "multi_query", "question_first", "passkey", "copy", "variables", "common_words", "reuse",
)  # fmt: skip


def _from_0_to_1(typed: str) -> float:
    value = decimal(typed)
    if not 0 <= value <= 1:
        raise ValueError("must lie from 0 to 1")
    return value


class RetrievalOptions(OptionGroup, frozen=True, kw_only=True):
    """What a context says, how long it is, and what is done to its cache before it is asked."""

    # fmt: off
    task: Annotated[tuple[str, ...], Option(
        list_of(choice(*TASKS)), "facts4,multi_query",
        "Tasks of the retrieval suite, comma separated: facts1, facts4, facts16 (ask one of so many), multi_query (several "
        "questions in turn), question_first, passkey, copy, variables, common_words, reuse (requests in turn, prefix cache off "
        "and on; engine nano), e.g. --kv-task=facts4,copy.",
    )]
    task_lengths: Annotated[tuple[int, ...], Option(
        list_of(whole_number(32)), "320",
        "Lengths of the contexts in tokens, e.g. --kv-task-lengths=320,1024.",
    )]
    task_depths: Annotated[tuple[float, ...], Option(
        list_of(_from_0_to_1), "0,0.5,1",
        "Where the asked fact stands: 0 is the begin of the context, 1 its end.",
    )]
    task_samples: Annotated[int, Option(
        whole_number(2), "24",
        "Contexts of each task and length, each asked at every depth; of tasks of others, the first so many samples.",
    )]
    task_methods: Annotated[tuple[str, ...], Option(
        list_of(text), "full,streaming_llm(start_size=4,recent_size=60),recent_only(window=64)",
        "What is done to the cache of the context before it is asked, comma separated: full, a policy or kvpress:<Name>, with "
        "parameters in parentheses, e.g. --kv-task-methods='full,snapkv(keep_ratio=0.2)'.",
    )]
    task_bound: Annotated[float, Option(
        _from_0_to_1, "0.3",
        "Exact answers of the full cache (tasks of others: its score) below which a task says nothing about caches: such cells "
        "are not discriminative, and never ranked.",
    )]
    lm_eval: Annotated[tuple[str, ...] | None, Option(
        list_of(path_or_name), "",
        "Tasks of lm-evaluation-harness (pip install 'kvsuite[lm-eval]'), comma separated: its own names, or local YAML files "
        "that name no code (!function). In the place of --kv-task, unless that is given too.", example="arc_easy,my_task.yaml",
    )]
    tasks_path: Annotated[str | None, Option(
        path_or_name, "",
        "A local file of RULER or LongBench in their published JSON lines, or a folder of such files. In the place of "
        "--kv-task, unless that is given too.", example="LongBench/hotpotqa.jsonl",
    )]
    # fmt: on

    @classmethod
    def combine(cls, values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
        if (values["lm_eval"] or values["tasks_path"]) and "task" not in given:
            values["task"] = ()
        return values
