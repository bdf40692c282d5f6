"""The compression suite's space: the groups of the program it replaces, and kvpress presses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from kvsuite.cache_formats.chosen_format import refuse_long_residual, selected_cache_formats
from kvsuite.case import Case
from kvsuite.compression import REPLACEMENTS, find_policy, get_policy, list_policies
from kvsuite.compression.base import Schedule
from kvsuite.compression.kvpress.adapter import find_press
from kvsuite.compression.kvpress.table import PRESSES
from kvsuite.compression.method_text import MethodText, parameter_types
from kvsuite.compression.mlp import with_weights
from kvsuite.engines.registry import get_engine
from kvsuite.entry_points import in_a_line
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, dtype_of, selected_formats

from .options import CompressionOptions

PRESS_PREFIX = "kvpress:"
# how like a method has to be to be proposed
_NEAR = 0.75
# the policies whose sizes and ratios have options of their own
_SWEPT = ("streaming_llm", "recent_only", "fix_size_l2", "l2_compress")
# order of the original's compare_all
_CROSS_SECTION = ("l2", "fix_size", "streaming")
# options that only some methods read
_READERS = {
    "keep_ratios": ("l2_compress", "fix_size_l2", PRESS_PREFIX),
    "prune_after": ("l2_compress",),
    "l2_mode": ("l2_compress",),
    "fix_kv_sizes": ("fix_size_l2",),
    "strategies": ("fix_size_l2",),
    "start_size": ("streaming_llm", "recent_only"),
    "recent_sizes": ("streaming_llm", "recent_only"),
}


@dataclass(frozen=True)
class CompressionVariant:
    """One variant: its name in tables and figures, and the policy behind it."""

    name: str
    kind: str
    policy: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    budget: int | None = None
    acts: str = "decode"


def compression_cases(options: Options) -> list[Case]:
    """Cases of the suite in the original's order: baseline, controls, then each method's groups.

    Raises
    ------
    UserError
        Naming the option whose value cannot be.
    """
    common, own = options.of(CommonOptions), options.of(CompressionOptions)
    Schedule(own.l2_mode)  # refused whether or not a selected method reads it
    formats = selected_formats(options) or (NONE,)
    groups = list(_groups(own, common))
    names = [group.name for group in groups]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--kv-method: the groups {', '.join(twice)} occur twice; name every size and ratio once")
    device = resolve_device(common.device)
    engine = "hf" if common.engine == "auto" else common.engine
    engine_params = get_engine(engine, options).case_params()
    stores = selected_cache_formats(options)
    for stored in stores:
        refuse_long_residual(stored, own.max_tokens, "--kv-max-tokens")
        refuse_long_residual(stored, common.prompt_tokens, "--kv-prompt-tokens")
    workload = {
        "protocol": protocol_of(own, groups),
        "corpus": common.corpus,
        "num_samples": common.num_samples,
        "max_tokens": own.max_tokens,
        "prompt_tokens": common.prompt_tokens,
        "max_new_tokens": common.max_new_tokens,
        "batch": 1,
    }
    return [
        Case(
            suite="compression",
            engine=engine,
            model=common.model,
            name=stored.named(_in_weights(group, None if chosen == NONE else chosen)),
            device=device,
            dtype=dtype_of(options, device, chosen),
            quantization=None if chosen == NONE else chosen,
            policy=group.policy,
            policy_params=group.parameters,
            workload=workload,
            params={"group": group.kind, "budget": group.budget}
            | engine_params
            | common.attention_parameters
            | stored.parameters,
        )
        for chosen in formats
        for stored in stores
        for group in groups
    ]


def _in_weights(group: CompressionVariant, quantization: str | None) -> str:
    return group.name if quantization is None else f"{group.name}_{quantization}"


def scores_reference(case: Case, options: Options) -> bool:
    """Whether a case scores the full cache for others: the first of a loaded model where no case is that cache itself."""
    common, own = options.of(CommonOptions), options.of(CompressionOptions)
    stores = selected_cache_formats(options)
    first = next(_groups(own, common))
    if not own.divergence or (first.policy is None and any(stored.format is None for stored in stores)):
        return False
    return case.name == stores[0].named(_in_weights(first, case.quantization))


def protocol_of(own: CompressionOptions, groups: Iterable[CompressionVariant]) -> str:
    """One quality protocol for all groups of a run: perplexities of different protocols do not compare."""
    pressed = [group.name for group in groups if group.acts == "prompt"]
    if own.protocol == "auto":
        return "prefix-continuation" if pressed else "streaming-decode"
    if pressed and own.protocol == "streaming-decode":
        raise UserError(
            f"--kv-protocol=streaming-decode: {pressed[0]} compresses a prefilled prompt and never acts on single tokens; "
            "use prefix-continuation"
        )
    return own.protocol


def method_name(options: Options) -> str:
    """The run's method as the original names its folders: one method, or ``compare_all``."""
    own = options.of(CompressionOptions)
    if own.compare_all or len(own.method) > 1:
        return "compare_all"
    return MethodText.parse(own.method[0]).name.replace(":", "_").lower()


def unread_options(options: Options) -> list[str]:
    """Options that a user set although nothing that was selected reads them, as typed: ``--kv-strategies``."""
    own = options.of(CompressionOptions)
    if own.compare_all:
        unread = {"method", "keep_ratios", "strategies", "compressor_path"} & options.given
    else:
        methods = [MethodText.parse(method) for method in own.method]
        unread = {
            name for name in _READERS.keys() & options.given if not any(_reads(method, name) for method in methods)
        }
        weighted = [
            one for one in methods if not one.name.startswith(PRESS_PREFIX) and find_policy(one.name).takes_weights
        ]
        unread |= {"compressor_path"} & options.given if not weighted else set()
    return [f"--kv-{name.replace('_', '-')}" for name in sorted(unread)]


def _reads(method: MethodText, option: str) -> bool:
    if method.name.startswith(_READERS[option]):
        return True
    return not method.name.startswith(PRESS_PREFIX) and option in find_policy(method.name).swept(method.values).values()


def _groups(own: CompressionOptions, common: CommonOptions) -> Iterator[CompressionVariant]:
    if not own.no_baseline:
        yield CompressionVariant("baseline", "baseline")
    handlings = ("original", "cache") if own.positions == "both" else (own.positions,)
    for positions in handlings:
        groups = list(_policy_groups(own, positions, common))
        if own.compare_all:
            groups.sort(key=lambda group: _CROSS_SECTION.index(group.kind))
        yield from groups
    for method in _methods(own):
        if method.name.startswith(PRESS_PREFIX):
            yield from _presses(own, method)


def _policy_groups(own: CompressionOptions, positions: str, options: CommonOptions) -> Iterator[CompressionVariant]:
    common = {"positions": positions, "skip_layers": list(own.skip_layers)}
    mark = "_poscache" if positions == "cache" else ""

    def group(
        kind: str, policy: str, budget: int | None = None, chosen: Mapping[str, Any] | None = None, **parameters: Any
    ) -> CompressionVariant:
        try:
            built = get_policy(policy, **parameters, **common)
            name = built.label(chosen) + mark
        except UserError:
            raise
        except Exception as error:  # policies are others' too
            made = find_policy(policy)
            raise UserError(
                f"--kv-method={policy}: {made.__module__}:{made.__qualname__} cannot be made of {parameters} "
                f"({in_a_line(error)}); correct it, or give other parameters"
            ) from error
        return CompressionVariant(name, kind, policy, built.to_dict(), budget, built.acts)

    asked = _methods(own)
    # those with parameters of their own are swept by these alone
    methods = [method.name for method in asked if not method.values]
    totals = [own.start_size + recent for recent in own.recent_sizes]
    streaming = totals if "streaming_llm" in methods else []
    fixed = list(own.fix_kv_sizes) if "fix_size_l2" in methods else []
    ratios = list(own.keep_ratios)
    if own.compare_all:
        streaming, fixed, ratios = totals[-2:], [max(own.fix_kv_sizes)], [0.8, 0.5]
    controls = list(dict.fromkeys([*streaming, *fixed]))
    if "recent_only" in methods and not controls:
        controls = totals
    if own.compare_all or (own.no_recent_only and "recent_only" not in methods):
        controls = []
    for total in controls:
        yield group("recent_only", "recent_only", total, window=total)
    for total in streaming:
        recent = total - own.start_size
        if own.start_size > recent:
            raise UserError(
                f"--kv-start-size={own.start_size}: more sinks than recent tokens (--kv-recent-sizes={recent}); "
                "lower --kv-start-size or raise --kv-recent-sizes"
            )
        yield group("streaming", "streaming_llm", total, start_size=own.start_size, recent_size=recent)
    for size in fixed:
        for strategy in ["keep_low"] if own.compare_all else own.strategies:
            for ratio in [0.5] if own.compare_all else ratios:
                seeded: dict[str, Any] = {"seed": options.seed} if strategy == "random" else {}
                yield group("fix_size", "fix_size_l2", size, size=size, strategy=strategy, keep_ratio=ratio, **seeded)
    if "l2_compress" in methods or own.compare_all:
        for ratio in _below_one(ratios, own):
            yield group("l2", "l2_compress", keep_ratio=ratio, prune_after=own.prune_after, mode=own.l2_mode)
    for method in asked:
        if method.name.startswith(PRESS_PREFIX) or (method.name in _SWEPT and not method.values):
            continue
        for parameters in _variants(own, method):
            weighted = with_weights(find_policy(method.name), parameters, options.compressor_path)
            yield group("policy", method.name, chosen=parameters, **weighted)


def _variants(own: CompressionOptions, method: MethodText) -> Iterator[dict[str, Any]]:
    """Parameters of a policy's variants: those given, those that options sweep, else the policy's own defaults."""
    policy = find_policy(method.name)
    swept = {name: getattr(own, source) for name, source in policy.swept(method.values).items()}
    if not swept and not method.values:
        yield from map(dict, policy.sweep())
        return
    lists = {name: list(value) if isinstance(value, tuple) else [value] for name, value in swept.items()}
    if "keep_ratio" in lists:
        lists["keep_ratio"] = _below_one(lists["keep_ratio"], own)
    for given in method.variants(parameter_types(policy)):
        for chosen in itertools.product(*lists.values()):
            yield given | dict(zip(lists, chosen, strict=True))


def _presses(own: CompressionOptions, method: MethodText) -> Iterator[CompressionVariant]:
    info = find_press(method.name)
    if own.positions == "cache":
        raise UserError(
            f"--kv-positions=cache: {method.name} decides on positions itself; use kvpress:KeyRerotation, or positions=original"
        )
    if own.skip_layers:
        raise UserError(f"--kv-skip-layers: {method.name} treats all layers; leave --kv-skip-layers at none")
    ratios = _below_one(list(own.keep_ratios), own) if info.takes_ratio else [1.0]
    for given in method.variants(dict.fromkeys(method.values)):
        marks = [f"{name}={value}" for name, value in given.items() if name != "keep_ratio"]
        for ratio in [given.pop("keep_ratio")] if "keep_ratio" in given else ratios:
            name = "_".join([info.name, *marks, *([f"kr={ratio}"] if info.takes_ratio else [])])
            yield CompressionVariant(
                name, "press", PRESS_PREFIX + info.name, {"keep_ratio": ratio, **given}, acts="prompt"
            )


def _below_one(ratios: list[float], own: CompressionOptions) -> list[float]:
    # keeping everything is the baseline
    return [ratio for ratio in ratios if ratio < 1 or own.no_baseline]


def _methods(own: CompressionOptions) -> list[MethodText]:
    if own.compare_all:
        return []
    asked = [MethodText.parse(method) for method in own.method]
    for method in (one.name for one in asked):
        if method in REPLACEMENTS:
            raise UserError(f"--kv-method={method}: not part of kvsuite; use {REPLACEMENTS[method]}")
        if method.startswith(PRESS_PREFIX):
            try:
                find_press(method)
            except UserError as error:
                raise UserError(f"--kv-method={method}: {error}") from error
        elif method not in list_policies():
            raise UserError(
                f"--kv-method={method}: unknown method; known: {', '.join(list_policies())}, kvpress:<Name>{_meant(method)}"
            )
    return asked


def _meant(method: str) -> str:
    """A question whether a policy or a press that is called nearly so was meant; empty where none is."""
    if method in PRESSES:
        return f"; did you mean {PRESS_PREFIX}{method}?"
    presses = {name.lower(): f"{PRESS_PREFIX}{name}" for name in PRESSES}
    # of equal names the policy, which was written as policies are
    known = presses | {name.replace("_", ""): name for name in list_policies()}
    near = get_close_matches(re.sub("[-_ ]", "", method).lower(), known, 1, _NEAR)
    return f"; did you mean {known[near[0]]}?" if near else ""
