"""The design-space suite's cases: a design point each, served with prompts that are a share of its context window."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kvsuite.cache_formats.chosen_format import ChosenFormat, selected_cache_formats
from kvsuite.case import Case
from kvsuite.engines.registry import get_engine
from kvsuite.errors import UserError
from kvsuite.memory_model.design_point import AXES, DesignPoint
from kvsuite.memory_model.design_space import DesignSpace, SpacePoint, broken_rules
from kvsuite.memory_model.space_text import parse_space
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, QUANTIZATIONS, dtype_of, selected_formats

from .options import DseOptions

DSE = "dse"
#: the protocol of its workload
SERVING = "serving"
DEFAULT_FORMATS = (NONE, "q4f16_1")
#: the suite's usual engine, and the one that goes before it where it says so
_USUAL, _BEFORE = "nano", "mlc"
# what the axes are called in a case's params
CONTEXT, CHUNK, BATCH, WINDOW, SINK = "context", "prefill_chunk", "batch", "window", "sink"
PARAMS = dict(zip((axis.name for axis in AXES), (CONTEXT, CHUNK, BATCH, WINDOW, SINK), strict=True))
ROOM = "room-for-output"


def dse_cases(options: Options) -> list[Case]:
    """Cases of the suite in the space's order: weight format outermost, so that weights load once each.

    Points that break a rule are among them; their cases end as ``invalid`` with the rule (`refusals`).

    Raises
    ------
    UserError
        Naming the option whose value cannot be.
    """
    device = resolve_device(options.of(CommonOptions).device)
    stores = selected_cache_formats(options)
    return [_case(options, device, entry.point, stored) for stored in stores for entry in design_space(options).entries]


def design_space(options: Options) -> DesignSpace:
    """The space that the options ask for: ``--kv-space``, ``--kv-dse``, or the single point of the original's options.

    Raises
    ------
    UserError
        If they ask for two of these, or for a space that cannot be.
    """
    own = options.of(DseOptions)
    parse = functools.partial(parse_space, quantizations=selected_formats(options), default=default_formats(options))
    single = {axis.name: value for axis in AXES if (value := getattr(own, axis.name)) is not None}
    typed = [f"--kv-{name.replace('_', '-')}" for name in single if name in options.given]
    spaces = [name for name, asked in (("--kv-space", "space" in options.given), ("--kv-dse", own.dse)) if asked]
    if typed and spaces:
        raise UserError(
            f"{spaces[0]} and {typed[0]}: a space and a single point exclude each other; give the values of an axis in "
            "--kv-space, or leave the space out"
        )
    if len(spaces) > 1 and own.space.strip() != "full":
        raise UserError(f"--kv-space={own.space} and --kv-dse: the latter is --kv-space=full; give one of them")
    if own.dse:
        space = parse("full", option="--kv-dse")
    elif single and not spaces:
        space = parse(";".join(f"{name}={value}" for name, value in single.items()), option="kvsuite")
    else:
        space = parse(own.space)
    unknown = [point for entry in space.entries if (point := entry.point.quantization) not in QUANTIZATIONS]
    if unknown:
        raise UserError(f"--kv-space={own.space}: unknown weight format {unknown[0]}; use {', '.join(QUANTIZATIONS)}")
    return space


def dse_engine(options: Options, device: str) -> str:
    """The engine of the suite: ``auto`` is nano, or mlc on a GPU that only mlc can use or where mlc_llm is installed."""
    engine = options.of(CommonOptions).engine
    if engine != "auto":
        return engine
    return _BEFORE if get_engine(_BEFORE, options).is_preferred(device.partition(":")[0]) else _USUAL


def default_formats(options: Options) -> tuple[str, ...]:
    """Weight formats of the suite if nobody names one: those of the engine, if it has its own (mlc)."""
    common = options.of(CommonOptions)
    engine = get_engine(dse_engine(options, resolve_device(common.device)), options)
    return engine.default_formats(common.model) or DEFAULT_FORMATS


def point_of(case: Case) -> DesignPoint:
    """The design point of a case."""
    settings = {axis: int(case.params[short]) for axis, short in PARAMS.items()}
    return DesignPoint(case.quantization or NONE, **settings)


@dataclass(frozen=True)
class CaseVerdict:
    """Whether a case may run: the rules that it breaks, in words, and what its record must say although it may."""

    broken: tuple[str, ...]
    flags: tuple[str, ...]


def judge(case: Case, trained_length: int | None = None, *, is_dummy: bool = False) -> CaseVerdict:
    """Judge a case by the rules of the space; before its model is loaded without the trained length."""
    point = point_of(case)
    entry = SpacePoint(point, broken_rules(point, get_engine(case.engine).point_rules)).judged(
        trained_length, is_dummy=is_dummy
    )
    broken = [str(one) for one in entry.broken]
    prompt, new_tokens = int(case.workload["prompt_tokens"]), int(case.workload["max_new_tokens"])
    # one token to spare: the blocks of a request are read while it still runs
    if prompt < 1 or prompt + new_tokens >= point.context_window_size:
        broken.append(
            f"breaks {ROOM}: a prompt of {prompt} tokens and {new_tokens} new ones do not fit "
            f"context_window_size={point.context_window_size}; change --kv-prompt-share or lower --kv-max-new-tokens"
        )
    return CaseVerdict(tuple(broken), entry.flags)


def _case(options: Options, device: str, point: DesignPoint, stored: ChosenFormat) -> Case:
    common, own = options.of(CommonOptions), options.of(DseOptions)
    chosen, engine = point.quantization, dse_engine(options, device)
    return Case(
        suite=DSE,
        engine=engine,
        model=common.model,
        name=stored.named(point.id, "-"),
        device=device,
        dtype=dtype_of(options, device, chosen),
        quantization=None if chosen == NONE else chosen,
        workload={
            "protocol": SERVING,
            "prompt_tokens": int(point.context_window_size * own.prompt_share),
            "max_new_tokens": common.max_new_tokens,
            "batch": point.max_batch_size,
            "prefix_caching": own.prefix_caching,
            "corpus": common.corpus,
            "num_samples": common.num_samples,
            "eval_tokens": common.eval_tokens,
        },
        params={short: getattr(point, axis) for axis, short in PARAMS.items()}
        | get_engine(engine, options).case_params()
        | common.attention_parameters
        | stored.parameters,
    )
