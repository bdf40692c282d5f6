"""Options of the retrieval suite."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated

from kvsuite.options.numbers import decimal
from kvsuite.options.option import Option, OptionGroup, choice, list_of, text, whole_number

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
        "Contexts of each task and length, each asked at every depth.",
    )]
    task_methods: Annotated[tuple[str, ...], Option(
        list_of(text), "full,streaming_llm(start_size=4,recent_size=60),recent_only(window=64)",
        "What is done to the cache of the context before it is asked, comma separated: full, a policy or kvpress:<Name>, with "
        "parameters in parentheses, e.g. --kv-task-methods='full,snapkv(keep_ratio=0.2)'.",
    )]
    task_bound: Annotated[float, Option(
        _from_0_to_1, "0.3",
        "Exact answers of the full cache below which a task says nothing about caches: such cells are not discriminative, and "
        "never ranked.",
    )]
    # fmt: on
