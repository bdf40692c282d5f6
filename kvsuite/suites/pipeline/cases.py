"""The pipeline suite's space: model x workload x batch, and for each of them every variant with what it varies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvsuite.cache_formats.chosen_format import selected_cache_formats
from kvsuite.case import Case, id_token, model_tag
from kvsuite.compression import find_policy, get_policy
from kvsuite.compression.method_text import MethodText, parameter_types
from kvsuite.compression.mlp import with_weights
from kvsuite.engines.serving_plan import BLOCK_TOKENS, SERVING_PARAM, ServingPlan
from kvsuite.entry_points import in_a_line
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.paths import expanded
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, dtype_of, selected_formats
from kvsuite.sm_split import PartitionRequest, requests
from kvsuite.workloads.serving_workload import (
    HEAVY,
    IDENTICAL,
    LIGHT,
    LIGHT_OUTPUT,
    LIGHT_TOKENS,
    LONG,
    UNIQUE,
    ServingWorkload,
)

from .options import AUTO, TRACE, PipelineOptions
from .variants import BASELINE, VARIANTS, Variant

PIPELINE = "pipeline"
#: the protocol of its workload
LOAD = "load"
SYNTHETIC_IDENTICAL = "synthetic-identical"
#: batch sizes of the original's models by what is in a model's name, and those of any other
_BATCH_SIZES = {"qwen3-8b": (16, 64), "qwen3-32b": (8, 16), "llava": (1, 4)}
_OTHER_BATCH_SIZES = (4,)
#: batches that the original queues of its two workloads
_BATCHES = {HEAVY: 4, LIGHT: 1}
#: keys of the original
_HUB_NAMES = {
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "llava-mlp": "llava-hf/llava-1.5-7b-hf",
}
#: what compresses a model that is named by such a key, in the place of ``--kv-pipeline-method``
_OWN_METHODS = {"llava-mlp": ("mlp",)}
_MOST_OUTPUT = 512
_MOST_RUNNING = 256
_POOL_REQUESTS = 2
#: of ``--kv-pipeline-image``: no file
RANDOM = "random"
#: what the synthetic workloads alone read
_SYNTHETIC = (
    "synthetic_context", "synthetic_output", "synthetic_dialogue", "synthetic_token", "synthetic_num_batches",
    "synthetic_batch_sizes",
)  # fmt: skip


@dataclass(frozen=True)
class Reduction:
    """What a compressing variant leaves in the cache: a policy with a factor, and its piece of an id."""

    policy: str
    parameters: Mapping[str, Any]
    factor: float
    id: str


@dataclass(frozen=True)
class VariantSetting:
    """One variant with what it varies."""

    variant: Variant
    reduction: Reduction | None = None
    chunk: int | None = None
    partition: PartitionRequest | None = None
    layers: int | None = None
    marks: tuple[str, ...] = field(default=())

    @property
    def id(self) -> str:
        """Its piece of a case's name."""
        return "-".join([self.variant.id, *self.marks])


def pipeline_cases(options: Options) -> list[Case]:
    """Cases of the suite: of each model, workload and batch size the baseline first, then the variants as asked.

    Cases that cannot be (a pool smaller than a request, say) are among them, and end as ``invalid`` with the reason.

    Raises
    ------
    UserError
        Naming the option whose value cannot be.
    """
    common, own = options.of(CommonOptions), options.of(PipelineOptions)
    device = resolve_device(common.device)
    models = _models(options)
    arms = {methods: _arms(own, methods, common.compressor_path) for _, methods in models}
    _refuse_unused(options, own)
    _refuse_unmerged(own, [arm.reduction for each in arms.values() for arm in each if arm.reduction is not None])
    image = _image_label(own)
    cases = [
        _case(options, device, model, chosen, workload, batch, arm, image=image, several_models=len(models) > 1)
        for model, methods in models
        for chosen in selected_formats(options) or (NONE,)
        for workload in own.workloads
        for batch in _batch_sizes(own, model, workload)
        for arm in arms[methods]
    ]
    return [
        replace(case, name=stored.named(case.name, "-"), params={**case.params, **stored.parameters})
        for stored in selected_cache_formats(options)
        for case in cases
    ]


def workload_of(case: Case) -> ServingWorkload:
    """The workload of a case as its requests are made of."""
    return ServingWorkload.of(case.workload)


def longest_request(case: Case) -> tuple[int, int]:
    """Prompt and output tokens of the longest request, as far as they are known before its texts are read."""
    return int(case.workload["prompt_tokens"]), int(case.workload["max_new_tokens"])


def unread_options(options: Options) -> list[str]:
    """Options that a user set although no variant and no workload of the run reads them, as typed: ``--kv-chunk-sizes``."""
    own = options.of(PipelineOptions)
    variants = [VARIANTS[name] for name in own.variants]
    compresses = any(variant.compresses for variant in variants)
    is_read = {
        **dict.fromkeys(_SYNTHETIC, bool(set(own.workloads) - set(_BATCHES))),
        "pipeline_method": compresses
        and any(set(methods) >= set(own.pipeline_method) for _, methods in _models(options)),
        "factors": compresses,
        "compressor_path": compresses and any(_take_weights(methods) for _, methods in _models(options)),
        "decode_layers_per_step": any(map(_is_paced, variants)),
        "async_compression": any(variant.compresses and variant.lanes == 1 for variant in variants),
        "chunk_sizes": any(variant.chunked for variant in variants),
        "dataset_dir": LIGHT in own.workloads,
        "trace_conv": HEAVY in own.workloads or own.arrivals == TRACE,
    }
    return [f"--kv-{name.replace('_', '-')}" for name in sorted(is_read.keys() & options.given) if not is_read[name]]


def _take_weights(methods: tuple[str, ...]) -> bool:
    names = [MethodText.parse(method).name for method in methods]
    return any(find_policy(name).takes_weights for name in names)


def _models(options: Options) -> list[tuple[str, tuple[str, ...]]]:
    """Models, each with the methods that compress it."""
    common, own = options.of(CommonOptions), options.of(PipelineOptions)
    if {"models", "model"} <= options.given:
        raise UserError("--kv-models and --kv-model: one of them hides the other; give one")
    if own.models is None or "model" in options.given:
        return [(common.model, own.pipeline_method)]
    found: dict[str, tuple[str, ...]] = {}
    for key in own.models:
        # a key and the name that it stands for are one model, compressed as both of them say
        name = _HUB_NAMES.get(key, key)
        found[name] = tuple(dict.fromkeys([*found.get(name, ()), *_OWN_METHODS.get(key, own.pipeline_method)]))
    return list(found.items())


def _batch_sizes(own: PipelineOptions, model: str, workload: str) -> tuple[int, ...]:
    is_synthetic = workload not in _BATCHES
    asked = (own.synthetic_batch_sizes if is_synthetic else None) or own.pipeline_batch_sizes
    name = model_tag(model).lower()
    return asked or next((sizes for part, sizes in _BATCH_SIZES.items() if part in name), _OTHER_BATCH_SIZES)


def _arms(own: PipelineOptions, methods: tuple[str, ...], compressor: str | None) -> list[VariantSetting]:
    reductions = _reductions(own, methods, compressor)
    several = len(reductions) > 1
    paced = _paced(own, reductions)
    found = [VariantSetting(VARIANTS[BASELINE])]
    for name in own.variants:
        variant = VARIANTS[name]
        if variant.chunked:
            for chunk in own.chunk_sizes:
                found.append(VariantSetting(variant, chunk=chunk, marks=(f"c{chunk}",)))
                found += [
                    VariantSetting(variant, one, chunk, layers=layers, marks=(f"c{chunk}", one.id, *_pace(layers)))
                    for one, layers in paced
                ]
        elif name != BASELINE:
            found += [
                VariantSetting(
                    variant,
                    one,
                    partition=sms,
                    layers=layers,
                    marks=(*([one.id] if several else []), *_pace(layers), *([sms.id] if sms else [])),
                )
                for one, layers in (paced if variant.controller is None else [(one, None) for one in reductions])
                for sms in (_partitions(own) if variant.partitioned and variant.controller is None else [None])
            ]
    return found


def _paced(own: PipelineOptions, reductions: list[Reduction]) -> list[tuple[Reduction, int | None]]:
    """Reductions with the layers that are done after each token; what keeps tokens is done at the end of a prompt."""
    return [
        (one, layers)
        for one in reductions
        for layers in (own.decode_layers_per_step if find_policy(one.policy).merges else (None,))
    ]


def _is_paced(variant: Variant) -> bool:
    """Whether it takes the layers after each token from the option."""
    return variant.compresses and variant.controller is None


def _refuse_unmerged(own: PipelineOptions, reductions: list[Reduction]) -> None:
    """Refuse layers after each token where a variant reads them and no model's method merges."""
    asked = own.decode_layers_per_step
    if asked == (None,) or not any(_is_paced(VARIANTS[name]) for name in own.variants):
        return
    if any(find_policy(one.policy).merges for one in reductions):
        return
    typed = ",".join("off" if one is None else str(one) for one in asked)
    raise UserError(
        f"--kv-decode-layers-per-step={typed}: only what is made of several tokens is made layer by layer, and "
        f"--kv-pipeline-method={','.join(own.pipeline_method)} keeps tokens; name mlp, mlp_residual or mean_pool, or leave "
        "the option out"
    )


def _pace(layers: int | None) -> list[str]:
    """The piece of an id of so many layers after each token."""
    return [] if layers is None else [f"d{layers}"]


def _partitions(own: PipelineOptions) -> list[PartitionRequest]:
    return requests(
        own.greenctx_sms,
        own.greenctx_compress_ratio,
        own.greenctx_main_ratio,
        decode_bound=own.greenctx_main_stream,
    )


def _refuse_unused(options: Options, own: PipelineOptions) -> None:
    """Refuse options of variants that are not there: what a controller chooses, for one, is no sweep of shares."""
    variants = [VARIANTS[name] for name in own.variants]
    shares = ("greenctx_sms", "greenctx_compress_ratio", "greenctx_main_ratio", "greenctx_main_stream")
    given = next((name for name in shares if name in options.given), None)
    if given is not None and not any(variant.partitioned and variant.controller is None for variant in variants):
        raise UserError(
            f"--kv-{given.replace('_', '-')}: SMs are parted as given in greenctx-only; a controller chooses its own from its "
            "first decision on; name greenctx-only in --kv-variants, or leave the option out"
        )
    if own.replay_decisions is not None and not any(variant.controller for variant in variants):
        raise UserError(
            f"--kv-replay-decisions={own.replay_decisions}: none of --kv-variants={','.join(own.variants)} has a controller; "
            "name auto-tune+greenctx or triad"
        )
    if own.replay_decisions is not None and not Path(own.replay_decisions).is_file():
        raise UserError(
            f"--kv-replay-decisions={own.replay_decisions}: no such file; name the pipeline_decisions.json of a run"
        )


def _reductions(own: PipelineOptions, methods: tuple[str, ...], compressor: str | None) -> list[Reduction]:
    found = []
    for method in methods:
        for policy, parameters, label in _policies(method):
            for factor in own.factors:
                weighted = with_weights(find_policy(policy), parameters, compressor)
                built = _built(policy, weighted, factor, method)
                mark = "-".join([*([label] if len(methods) > 1 or label != policy else []), f"f{factor:g}"])
                found.append(Reduction(policy, built.to_dict(), factor, mark))
    return found


def _policies(method: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Policy, parameters and piece of an id of each method that a text names."""
    try:
        text = MethodText.parse(method)
        if text.name.startswith("kvpress:"):
            raise UserError(
                f"--kv-method={method}: a press works on the dense cache of one prompt, and here requests share blocks; use a "
                "policy"
            )
        policy = find_policy(text.name)
        if "factor" in text.values:
            raise UserError(f"--kv-method={method}: how much stays is --kv-factors here; leave the factor out")
        variants = list(text.variants(parameter_types(policy)))
    except UserError as error:
        raise _of_this_suite(error) from error
    for parameters in variants:
        yield text.name, parameters, id_token("_".join([text.name, *(f"{k}{v}" for k, v in parameters.items())]))


def _built(policy: str, parameters: Mapping[str, Any], factor: float, method: str) -> Any:
    try:
        return get_policy(policy, **parameters, factor=factor)
    except UserError as error:
        raise _of_this_suite(error) from error
    except Exception as error:  # policies are others' too
        made = find_policy(policy)
        raise UserError(
            f"--kv-pipeline-method={method}: {made.__module__}:{made.__qualname__} cannot be made with factor={factor:g} "
            f"({in_a_line(error)}); take a policy that has a factor"
        ) from error


def _of_this_suite(error: UserError) -> UserError:
    return UserError(str(error).replace("--kv-method", "--kv-pipeline-method"))


def _image_label(own: PipelineOptions) -> str | None:
    """What a case calls its image: ``random``, or a file's name with 12 digits of what is in it; ``None`` without one.

    Raises
    ------
    UserError
        If there is no such file, or it cannot be read.
    """
    if own.pipeline_image is None or own.pipeline_image == RANDOM:
        return own.pipeline_image
    file = expanded(own.pipeline_image)
    if not file.is_file():
        raise UserError(
            f"--kv-pipeline-image={own.pipeline_image}: no such file; give a PNG, JPEG or .npy file, or random"
        )
    try:
        with file.open("rb") as stream:
            return f"{file.name}@{hashlib.file_digest(stream, 'sha256').hexdigest()[:12]}"
    except OSError as error:
        raise UserError(
            f"--kv-pipeline-image={own.pipeline_image}: cannot be read ({error.strerror}); give a file that can be"
        ) from error


def _load(own: PipelineOptions, name: str, batch: int, image: str | None) -> tuple[ServingWorkload, int, int, int]:
    """The workload, its batches, and the prompt and output tokens of its longest request (0: nothing is left of one)."""
    batches = _BATCHES.get(name, own.synthetic_num_batches)
    output = own.synthetic_output or max(1, min(_MOST_OUTPUT, own.max_model_len // 4))
    load = ServingWorkload(
        name=LONG if name == SYNTHETIC_IDENTICAL else name,
        requests=batch * batches,
        max_model_len=own.max_model_len,
        context=own.synthetic_context,
        output=output,
        prompts=IDENTICAL if name == SYNTHETIC_IDENTICAL else UNIQUE,
        dialogue=own.synthetic_dialogue,
        token=own.synthetic_token or "",
        arrivals=own.arrivals,
        arrival_rate=own.arrival_rate,
        time_scale=own.trace_time_scale,
        image=image,
    )
    if name == HEAVY:
        output, prompt = _MOST_OUTPUT, own.max_model_len - 1
        return load, batches, prompt, min(output, own.max_model_len - 1)
    if name == LIGHT and load.image is not None:
        # how many tokens an image takes is known once the model is
        return load, batches, own.max_model_len - LIGHT_OUTPUT, LIGHT_OUTPUT
    if name == LIGHT:
        return load, batches, min(LIGHT_TOKENS[1], own.max_model_len - LIGHT_OUTPUT), LIGHT_OUTPUT
    return load, batches, max(0, min(own.synthetic_context, own.max_model_len - output)), output


def _case(
    options: Options,
    device: str,
    model: str,
    chosen: str,
    workload: str,
    batch: int,
    arm: VariantSetting,
    *,
    image: str | None,
    several_models: bool,
) -> Case:
    common, own = options.of(CommonOptions), options.of(PipelineOptions)
    load, batches, prompt, new_tokens = _load(own, workload, batch, image)
    longest = own.max_model_len if workload == HEAVY else max(2, prompt + new_tokens)
    pieces = [*([id_token(model_tag(model))] if several_models else []), *([] if chosen == NONE else [chosen])]
    pieces += [workload, *([] if load.image is None else ["image"])]
    return Case(
        suite=PIPELINE,
        engine="nano" if common.engine == "auto" else common.engine,
        model=model,
        name="-".join([*pieces, f"bs{batch:02}", arm.id]),
        device=device,
        dtype=dtype_of(options, device, chosen),
        quantization=None if chosen == NONE else chosen,
        policy=None if arm.reduction is None else arm.reduction.policy,
        policy_params={} if arm.reduction is None else arm.reduction.parameters,
        workload=load.to_dict()
        | {
            "protocol": LOAD,
            "workload": workload,
            "batch": batch,
            "num_batches": batches,
            "prompt_tokens": prompt,
            "max_new_tokens": new_tokens,
            "concurrency": own.concurrency,
            "corpus": common.corpus,
            "num_samples": common.num_samples,
        },
        params={
            "variant": arm.variant.name,
            "factor": None if arm.reduction is None else arm.reduction.factor,
            "chunk": arm.chunk,
            "slo": own.slo,
            SERVING_PARAM: _plan(own, arm, load, longest).to_dict(),
        }
        | ({} if own.capacity is None else {"capacity": own.capacity if own.capacity == AUTO else list(own.capacity)}),
        partition=None if arm.partition is None else arm.partition.to_dict(),
    )


def _plan(own: PipelineOptions, arm: VariantSetting, load: ServingWorkload, longest: int) -> ServingPlan:
    running, chunks = own.max_running, own.chunk_sizes if "chunked" in own.variants else ()
    least_step = min([own.step_tokens, *chunks])
    if running is None:
        # the same for every variant, and a step has room for a token of each
        running = min(load.requests, _MOST_RUNNING, least_step)
    elif running > least_step:
        option = "--kv-step-tokens" if least_step == own.step_tokens else "--kv-chunk-sizes"
        raise UserError(
            f"{option}={least_step}: fewer tokens than --kv-max-running={running} requests need in a step; raise the former or "
            "lower the latter"
        )
    blocks = None
    if own.pool_bytes is None:
        blocks = own.pool_blocks or _POOL_REQUESTS * -(-longest // BLOCK_TOKENS)
    variant = arm.variant
    stage = "none"
    if arm.reduction is not None:
        stage = "async" if own.async_compression or variant.lanes == 2 else "sync"
    return ServingPlan(
        pool_blocks=blocks,
        pool_bytes=own.pool_bytes,
        max_model_len=longest,
        max_num_seqs=running,
        step_tokens=arm.chunk or own.step_tokens,
        prompts_first=arm.chunk is None,
        prefix_caching=load.prompts == IDENTICAL,
        stage=stage,
        lanes=variant.lanes,
        controller=variant.controller,
        replay_decisions=own.replay_decisions if variant.controller else None,
        layers_per_step=arm.layers,
    )
