"""The retrieval suite's space: tasks and lengths, number formats, and what is done to the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvsuite.cache_formats.chosen_format import refuse_long_residual, selected_cache_formats
from kvsuite.case import Case
from kvsuite.compression import find_policy, get_policy, list_policies
from kvsuite.compression.kvpress.adapter import find_press
from kvsuite.compression.method_text import MethodText, parameter_types
from kvsuite.compression.mlp import with_weights
from kvsuite.engines.serving_plan import BLOCK_TOKENS, SERVING_PARAM, ServingPlan
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, dtype_of, selected_formats

from .options import RetrievalOptions
from .published.chosen_tasks import chosen_tasks

#: the task whose contexts are asked by requests in turn
REUSE = "reuse"
_MULTI_QUERY = "multi_query"
#: the method that does nothing
FULL = "full"
#: what a case is called behind its method where the question stands inside the prompt that is compressed
SEEN = "question_seen"
_PRESS = "kvpress:"
# contexts that the pool of requests in turn has room for
_CONTEXTS_HELD = 4
# tokens of question and answer behind a context, more than any task has
_ASKED_TOKENS = 96


@dataclass(frozen=True)
class Method:
    """What is done to the cache of a context.

    Parameters
    ----------
    name
        In ids, tables and figures.
    policy, parameters
        As a case has them.
    sees_question
        Whether the question is part of the prompt that is compressed.
    """

    name: str
    policy: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    sees_question: bool = False


def retrieval_cases(options: Options) -> list[Case]:
    """Cases of the suite: every task at every length, its methods side by side.

    Raises
    ------
    UserError
        Naming the option whose value cannot be.
    """
    common, own = options.of(CommonOptions), options.of(RetrievalOptions)
    methods = list(_methods(own, common.compressor_path))
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--kv-task-methods: {', '.join(twice)} occurs twice; name every method and size once")
    device = resolve_device(common.device)
    stores = selected_cache_formats(options)
    for stored in stores if own.task else ():
        refuse_long_residual(stored, min(own.task_lengths), "--kv-task-lengths")
    if REUSE in own.task and len(own.task_depths) > 4:
        raise UserError(f"--kv-task-depths: task {REUSE} asks one context of four facts; give four depths or fewer")
    return [
        Case(
            suite="retrieval",
            engine=asked.engine if common.engine == "auto" else common.engine,
            model=common.model,
            name=stored.named("-".join([asked.name, method.name, *([] if chosen == NONE else [chosen])])),
            device=device,
            dtype=dtype_of(options, device, chosen),
            quantization=None if chosen == NONE else chosen,
            policy=method.policy,
            policy_params=method.parameters,
            workload={"protocol": "compress-then-ask", "num_samples": own.task_samples, "batch": 1} | asked.workload,
            params={
                "method": method.name,
                "question": SEEN if asked.shows_question or method.sees_question else "after",
            }
            | common.attention_parameters
            | stored.parameters
            | (_served_in_turn(method, asked.in_turn) if asked.in_turn else {}),
        )
        for asked in [*_generated(common, own), *_published(options)]
        for chosen in selected_formats(options) or (NONE,)
        for stored in stores
        for method in methods
        if not (asked.question_has_its_place and method.sees_question)
    ]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is asked of every cache.

    Parameters
    ----------
    name
        In ids, before the method's.
    engine
        Where none is named.
    workload
        Its own part.
    shows_question
        Context and question come in one piece, so that every method sees it.
    question_has_its_place
        No method can be shown the question beside those that are not.
    in_turn
        Tokens of the context that requests in turn share; 0 where there are no such requests.
    """

    name: str
    engine: str = "hf"
    workload: dict[str, Any]
    shows_question: bool = False
    question_has_its_place: bool = False
    in_turn: int = 0


def _generated(common: CommonOptions, own: RetrievalOptions) -> Iterator[_Asked]:
    for task in own.task:
        for length in own.task_lengths:
            yield _Asked(
                name=f"{task}-{length}",
                engine="nano" if task == REUSE else "hf",
                workload={
                    "corpus": common.corpus,
                    "task": task,
                    "depths": list(own.task_depths),
                    "seed": common.seed,
                    "prompt_tokens": length,
                    "max_new_tokens": _ASKED_TOKENS,
                },
                # of requests that are served, the question is part of the prompt in any case; questions in turn are behind
                # each other, and each alone inside its own prompt would be compared with another prompt
                question_has_its_place=task in (REUSE, _MULTI_QUERY),
                in_turn=length if task == REUSE else 0,
            )


def _published(options: Options) -> Iterator[_Asked]:
    for task in chosen_tasks(options).values():
        yield _Asked(
            name=task.name,
            workload={"published": task.kind, "task": task.name},
            shows_question=task.in_one_piece,
            question_has_its_place=task.in_one_piece,
        )


def is_published(case: Case) -> bool:
    """Whether the case is of somebody else's task, by its rules."""
    return "published" in case.workload


def _served_in_turn(method: Method, length: int) -> dict[str, Any]:
    """The plan of a case that serves one request after the other, each of which may find the blocks of those before."""
    longest = length + _ASKED_TOKENS
    plan = ServingPlan(
        pool_blocks=_CONTEXTS_HELD * -(-longest // BLOCK_TOKENS),
        max_model_len=longest,
        max_num_seqs=1,
        step_tokens=longest,
        prefix_caching=True,
        stage="none" if method.policy is None else "sync",
    )
    return {SERVING_PARAM: plan.to_dict()}


def takes_weights(own: RetrievalOptions) -> bool:
    """Whether a method reads ``--kv-compressor-path``."""
    names = {MethodText.parse(typed).name for typed in own.task_methods} & set(list_policies())
    return any(find_policy(name).takes_weights for name in names)


def _methods(own: RetrievalOptions, compressor: str | None) -> Iterator[Method]:
    for typed in own.task_methods:
        method = MethodText.parse(typed)
        if method.name == FULL:
            if method.values:
                raise UserError(f"--kv-task-methods={typed}: the full cache has no parameters; give full alone")
            yield Method(FULL)
        elif method.name.startswith(_PRESS):
            yield from _presses(method)
        else:
            yield from _policies(method, compressor)


def _policies(method: MethodText, compressor: str | None) -> Iterator[Method]:
    if method.name not in list_policies():
        raise UserError(
            f"--kv-task-methods={method.typed}: unknown method; known: {FULL}, {', '.join(list_policies())}, kvpress:<Name>"
        )
    found = find_policy(method.name)
    for given in method.variants(parameter_types(found)) if method.values else map(dict, found.sweep()):
        policy = get_policy(method.name, **with_weights(found, given, compressor))
        short = policy.label(None)
        name = policy.label(given) if short == policy.name else short
        yield Method(name, method.name, policy.to_dict())
        if policy.needs.queries or policy.needs.attention_sums:
            yield Method(f"{name}_{SEEN}", method.name, policy.to_dict(), sees_question=True)


def _presses(method: MethodText) -> Iterator[Method]:
    try:
        info = find_press(method.name)
    except UserError as error:
        raise UserError(f"--kv-task-methods={method.typed}: {error}") from error
    for given in method.variants(dict.fromkeys(method.values)):
        parameters = {"keep_ratio": 0.5 if info.takes_ratio else 1.0} | given
        name = "_".join(
            [info.name, *(f"{'kr' if key == 'keep_ratio' else key}={value}" for key, value in given.items())]
        )
        yield Method(name, _PRESS + info.name, parameters)
        yield Method(f"{name}_{SEEN}", _PRESS + info.name, parameters, sees_question=True)
