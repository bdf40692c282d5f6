"""The perplexity suite's space: data set x protocol x weight format."""

from __future__ import annotations

from pathlib import Path

from kvsuite.cache_formats.chosen_format import ChosenFormat, refuse_long_residual, selected_cache_formats
from kvsuite.case import Case
from kvsuite.engines.registry import get_engine
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.option import option_of
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, dtype_of, require_known, selected_formats
from kvsuite.workloads.corpus import NAMES
from kvsuite.workloads.windows import STRIDED, plan_windows

from .options import PerplexityOptions

DEFAULT_FORMATS = ("none", "q4f16_1", "fake_q3")
# the original's one rule: published MLC Instruct models stand beside the base model
_LABEL, _COUNTERPART = "Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"


def perplexity_cases(options: Options) -> list[Case]:
    """Cases of the suite: every data set with every protocol in every weight format.

    Raises
    ------
    UserError
        Naming the option whose value cannot be.
    """
    own = options.of(PerplexityOptions)
    names = [dataset_name(request) for request in own.dataset]
    if len(set(names)) < len(names):
        raise UserError(f"--kv-dataset={','.join(own.dataset)}: two of the files have one name; run them apart")
    if own.dataset_path and len(names) > 1:
        raise UserError(
            f"--kv-dataset-path={own.dataset_path}: is read for one data set, and --kv-dataset names {len(names)}; "
            "name one"
        )
    device = resolve_device(options.of(CommonOptions).device)
    stores = selected_cache_formats(options)
    for stored in stores:
        refuse_long_residual(stored, own.max_length, "--kv-max-length")
    return [
        _case(options, device, name, protocol, chosen, stored)
        for name in names
        for protocol in own.ppl_protocol
        for chosen in selected_formats(options) or DEFAULT_FORMATS
        for stored in stores
    ]


def _case(options: Options, device: str, dataset: str, protocol: str, chosen: str, stored: ChosenFormat) -> Case:
    common, own = options.of(CommonOptions), options.of(PerplexityOptions)
    # for its error messages: the length of the text comes later
    plan_windows(protocol, 4 * own.max_length, own.max_length, own.stride, prefix=bos_rule(own.bos))
    engine = "hf" if common.engine == "auto" else common.engine
    return Case(
        suite="perplexity",
        engine=engine,
        # the reference engine is left out: wikitext2-4bit
        shows_engine=engine != "hf",
        model=model_of(options),
        name=stored.named("-".join([dataset, chosen, *([protocol] if len(own.ppl_protocol) > 1 else [])]), "-"),
        device=device,
        dtype=dtype_of(options, device, chosen),
        quantization=None if chosen == NONE else chosen,
        workload={
            "protocol": protocol,
            "dataset": dataset,
            "split": own.split,
            "blank_rows": own.blank_rows,
            "num_samples": common.num_samples,
            "eval_tokens": common.eval_tokens,
            "max_length": own.max_length,
            # the others step from window to window by its length
            "stride": own.stride if protocol in STRIDED else own.max_length,
            "bos": own.bos,
            "prompt_tokens": common.prompt_tokens,
            "max_new_tokens": common.max_new_tokens,
            "batch": 1,
        },
        params={"mlc_model": own.mlc_model or None, "reference": _reference(options, device)}
        | get_engine(engine, options).case_params()
        | common.attention_parameters
        | stored.parameters,
    )


def _reference(options: Options, device: str) -> dict[str, str | None] | None:
    chosen = options.of(PerplexityOptions).reference
    if chosen is None:
        return None
    require_known(option_of(PerplexityOptions, "reference"), (chosen,))
    return {"quantization": None if chosen == NONE else chosen, "dtype": dtype_of(options, device, chosen)}


def dataset_name(request: str) -> str:
    """Name of a data set in ids, files and figures: as typed, or the file's name without its folder."""
    return request if request in NAMES else Path(request).name


def bos_rule(bos: str) -> str | None:
    """Prefix rule of ``--kv-bos``, ``None`` for the protocol's own."""
    return None if bos == "auto" else bos


def model_of(options: Options) -> str:
    """The model scored: ``--kv-model``, else the counterpart of ``--kv-mlc-model`` by the original's rule."""
    model, label = options.of(CommonOptions).model, options.of(PerplexityOptions).mlc_model
    if "model" in options.given or not label:
        return model
    if _LABEL not in label:
        raise UserError(
            f"--kv-mlc-model={label}: is a label, and only {_LABEL} names a Hugging Face model by itself; give "
            "--kv-hf-model as well"
        )
    return _COUNTERPART
