"""What of a case of the pipeline suite cannot be, whatever the model: found before one is loaded."""

from __future__ import annotations

from kvsuite.case import Case
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.errors import CaseInvalid
from kvsuite.options.paths import expanded
from kvsuite.quantization.registry import quantization
from kvsuite.workloads.serving_workload import LONG, ServingWorkload

from .cases import RANDOM, longest_request, workload_of
from .options import PipelineOptions

#: arrivals that come over a longer time than this are a mistake: nothing drains before the last one is there
_LONGEST_ARRIVALS_S = 3600.0


def refuse_load(case: Case, own: PipelineOptions) -> None:
    """Refuse a case that has nothing to serve, or nowhere to put it.

    Raises
    ------
    CaseInvalid
        Naming the option and the mend.
    """
    load, plan = workload_of(case), ServingPlan.of(case)
    prompt, new_tokens = longest_request(case)
    if quantization(case.quantization or "none").quality_only:
        raise CaseInvalid(
            f"--kv-quantization={case.quantization}: quality only, its weights stay dense; the pipeline is about speed and "
            "memory under load, name another format"
        )
    if load.needs_trace and not own.trace_conv:
        why = f"--kv-workloads={load.name}" if load.arrivals != "trace" else "--kv-arrivals=trace"
        raise CaseInvalid(
            f"{why}: is made of a trace and none is given; give --kv-trace-conv=FILE, AzureLLMInferenceTrace_conv.csv of the "
            "repository Azure/AzurePublicDataset, say"
        )
    image = own.pipeline_image
    if image is not None and image != RANDOM and not expanded(image).is_file():
        raise CaseInvalid(f"--kv-pipeline-image={image}: no such file; give a PNG, JPEG or .npy file, or random")
    if prompt < 1:
        option = "--kv-synthetic-output" if load.name == LONG else "--kv-workloads"
        asked = new_tokens if load.name == LONG else load.name
        raise CaseInvalid(
            f"{option}={asked}: {new_tokens} output tokens leave no room for a prompt in requests of at most "
            f"{load.max_model_len}; ask for fewer, or raise --kv-max-model-len"
        )
    factor = case.params["factor"]
    if factor is not None and prompt < factor:
        raise CaseInvalid(
            f"--kv-factors={factor:g}: keeps nothing of a prompt of {prompt} tokens; lower it, or take longer prompts"
        )
    if load.arrivals == "poisson" and load.arrival_rate:
        require_end((load.requests - 1) / load.arrival_rate, load)
    rates = case.params.get("capacity")
    if isinstance(rates, list) and (load.requests - 1) / rates[0] > _LONGEST_ARRIVALS_S:
        raise CaseInvalid(
            f"--kv-capacity={rates[0]:g}:{rates[1]:g}: at the lowest rate the last of {load.requests} requests comes after "
            f"{(load.requests - 1) / rates[0]:.0f} s; raise it above {(load.requests - 1) / _LONGEST_ARRIVALS_S:.2g}, or ask "
            "for smaller batches"
        )
    if plan is not None and plan.pool_blocks is not None:
        require_room(plan.pool_blocks, plan, option=f"--kv-pool-blocks={plan.pool_blocks}")


def require_end(seconds: float, load: ServingWorkload) -> None:
    """Refuse arrivals whose last one comes so late that nobody would wait for a round of them.

    Parameters
    ----------
    seconds
        From the first arrival to the last, known or expected.
    load
        Whose arrivals they are.

    Raises
    ------
    CaseInvalid
        Naming what says how fast they come.
    """
    if seconds <= _LONGEST_ARRIVALS_S:
        return
    option, mend = f"--kv-trace-time-scale={load.time_scale:g}", "raise the scale"
    if load.arrival_rate is not None:
        option, mend = f"--kv-arrival-rate={load.arrival_rate:g}", "raise the rate"
    raise CaseInvalid(
        f"{option}: the last of {load.requests} requests comes after {seconds:.0f} s: a round never drains within "
        f"{_LONGEST_ARRIVALS_S:.0f} s; {mend} or ask for smaller batches"
    )


def require_room(blocks: int, plan: ServingPlan, *, option: str) -> None:
    """Refuse a pool that is smaller than the longest request: it could never be served to its end.

    Raises
    ------
    CaseInvalid
        With what the pool would need.
    """
    needed = -(-plan.max_model_len // BLOCK_TOKENS)
    if blocks < needed:
        held = (
            f"1 block of {BLOCK_TOKENS} tokens is" if blocks == 1 else f"{blocks} blocks of {BLOCK_TOKENS} tokens are"
        )
        raise CaseInvalid(
            f"{option}: {held} fewer than the {needed} of one request of {plan.max_model_len} tokens; give a larger pool, or "
            "shorter requests"
        )
