"""Options of the pipeline suite, and those of the program that it replaces which are refused."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from kvsuite.errors import UserError
from kvsuite.options.durations import duration
from kvsuite.options.numbers import MOST_REQUESTS, decimal
from kvsuite.options.option import (
    Option,
    OptionGroup,
    auto_or,
    choice,
    list_of,
    off_or,
    path,
    path_or_name,
    ratio,
    switch,
    text,
    whole_number,
)
from kvsuite.options.sm_pairs import sm_pair

#: variants of the original in its order, and ours
VARIANTS = (
    "baseline", "compression-only", "greenctx-only", "auto-tune+greenctx", "triad", "streams-only", "chunked",
)  # fmt: skip
WORKLOADS = ("heavy-trace", "light-dataset", "synthetic-long", "synthetic-identical")
CLOSED, POISSON, TRACE = "closed", "poisson", "trace"
#: of ``--kv-capacity``: rates around what the closed loop gives
AUTO = "auto"

_MODEL_INSTEAD = "a folder is a model's name like any other; use --kv-model=FOLDER, or --kv-models for several"
_REFUSED = {
    "gpu-mem-util": (
        "a share of what happens to be free gives every variant another pool; use --kv-pool-blocks=N (of 16 tokens) or "
        "--kv-pool-bytes=N"
    ),
    **dict.fromkeys(("qwen3-8b", "qwen3-32b", "llava"), _MODEL_INSTEAD),
}


def _factor(typed: str) -> float:
    value = decimal(typed)
    if not 1 <= value <= 10**6:
        raise ValueError("must lie between 1, which removes nothing, and 1000000")
    return int(value) if value == int(value) else value


def _rate(typed: str) -> float:
    value = decimal(typed)
    if not 0 < value <= 10**6:
        raise ValueError("must be more than 0 requests a second, at most 1000000")
    return value


def _scale(typed: str) -> float:
    value = decimal(typed)
    if not 0 < value <= 10**6:
        raise ValueError("must be more than 0, at most 1000000")
    return value


def _capacity(typed: str) -> str | tuple[float, float]:
    if typed.strip() == AUTO:
        return AUTO
    parts = typed.split(":")
    if len(parts) != 2:
        raise ValueError("use off, auto, or the lowest and highest rate as LOW:HIGH in requests a second")
    lowest, highest = map(_rate, parts)
    if lowest >= highest:
        raise ValueError("the first rate must be below the second")
    return lowest, highest


def _slo(typed: str) -> str:
    try:
        _ttft, _tpot = map(duration, typed.split(":"))
    except ValueError:
        raise ValueError(
            "is no time to the first token and time of a further one, both above 0, in s, ms or us"
        ) from None
    return typed.strip()


class PipelineOptions(OptionGroup, frozen=True, kw_only=True):
    """Models, workloads and variants; pool, chunks and arrivals; what counts as served well."""

    refused_names: ClassVar[Mapping[str, str]] = _REFUSED

    # fmt: off
    models: Annotated[tuple[str, ...] | None, Option(
        auto_or(list_of(path_or_name)), "auto",
        "Models of the pipeline suite, comma separated, e.g. --kv-models=smollm2,dummy:Qwen3-8B; auto is the one of "
        "--kv-model. The original's qwen3-8b and qwen3-32b are Qwen/Qwen3-8B and Qwen/Qwen3-32B, its llava-mlp is "
        "llava-hf/llava-1.5-7b-hf compressed by mlp.",
        original="qwen3-8b,qwen3-32b",
    )]
    workloads: Annotated[tuple[str, ...], Option(
        list_of(choice(*WORKLOADS)), "synthetic-long",
        "Workloads, comma separated: heavy-trace (long rows of --kv-trace-conv), light-dataset (texts of --kv-dataset-dir), "
        "synthetic-long (unique prompts), synthetic-identical (one prompt for all, found again in the prefix cache), e.g. "
        "--kv-workloads=heavy-trace,synthetic-long.",
        original="heavy-trace,light-dataset,synthetic-identical",
    )]
    variants: Annotated[tuple[str, ...], Option(
        list_of(choice(*VARIANTS)), "baseline,compression-only,chunked",
        f"Variants, comma separated: {', '.join(VARIANTS)}, e.g. --kv-variants=compression-only,triad; the baseline of each "
        "model, workload and batch is always there.",
        original="baseline,compression-only,greenctx-only,auto-tune+greenctx,triad",
    )]
    pipeline_method: Annotated[tuple[str, ...], Option(
        list_of(text), "streaming_llm",
        "What compresses, comma separated, any policy of --kv-method with its parameters, e.g. "
        "--kv-pipeline-method='streaming_llm,snapkv(window=32)'; how much it keeps is --kv-factors.",
        original="h2o",
    )]
    factors: Annotated[tuple[float, ...], Option(
        list_of(_factor), "5",
        "Compression factors: a prompt of L tokens keeps L // factor, at least 1, e.g. --kv-factors=1,2,5; 1 removes nothing.",
    )]
    async_compression: Annotated[bool, Option(
        switch, "true",
        "Whether variants with one stream compress on a stream of their own (compression-only, chunked), e.g. "
        "--kv-async-compression=off; on a CPU there is one stream, and the record says so.",
    )]
    decode_layers_per_step: Annotated[tuple[int | None, ...], Option(
        list_of(off_or(whole_number(1, 1000))), "off",
        "Layers of a prompt that a policy that merges does after each token that follows it, comma separated, e.g. "
        "--kv-decode-layers-per-step=off,4; off: all of them at the end of the prompt. Variants with a controller choose it.",
        example="4",
    )]
    pipeline_image: Annotated[str | None, Option(
        off_or(path_or_name), "off",
        "The image that every prompt begins with, for a model that reads images: random (of each request another where prompts "
        "are unique), or a PNG, JPEG or .npy file, e.g. --kv-pipeline-image=photo.png; its tokens count as the prompt's.",
        example="random",
    )]
    dataset_dir: Annotated[str | None, Option(
        path, "",
        "Folder of .jsonl, .json or .csv files with the prompts of light-dataset, e.g. --kv-dataset-dir=prompts.",
    )]
    trace_conv: Annotated[str | None, Option(
        path, "",
        "Trace of heavy-trace and of --kv-arrivals=trace: a CSV with columns ContextTokens, GeneratedTokens and TIMESTAMP, "
        "e.g. --kv-trace-conv=AzureLLMInferenceTrace_conv_1week.csv.",
    )]
    synthetic_context: Annotated[int, Option(
        whole_number(1), "128",
        "Prompt tokens of the synthetic workloads, clipped to --kv-max-model-len minus the output, e.g. "
        "--kv-synthetic-context=4096.",
        original="3072",
    )]
    synthetic_output: Annotated[int, Option(
        whole_number(0), "32",
        "Output tokens of the synthetic workloads, e.g. --kv-synthetic-output=128; 0 is a quarter of --kv-max-model-len, at "
        "most 512.",
        original="512",
    )]
    synthetic_dialogue: Annotated[bool, Option(
        switch, "false",
        "Repeat a dialogue of five lines as the prompt of the synthetic workloads.",
        is_flag=True,
    )]
    synthetic_token: Annotated[str | None, Option(
        text, "",
        "Repeat this text as the prompt of the synthetic workloads, e.g. --kv-synthetic-token=Hello; it wins over a dialogue.",
        example="Hello",
    )]
    synthetic_num_batches: Annotated[int, Option(
        whole_number(1, MOST_REQUESTS), "1",
        "Batches of the synthetic workloads that are queued at once, e.g. --kv-synthetic-num-batches=2.",
        original="2",
    )]
    synthetic_batch_sizes: Annotated[tuple[int, ...] | None, Option(
        auto_or(list_of(whole_number(1, MOST_REQUESTS))), "auto",
        "Batch sizes of the synthetic workloads, comma separated, e.g. --kv-synthetic-batch-sizes=32,64; auto is "
        "--kv-pipeline-batch-sizes.",
    )]
    pipeline_batch_sizes: Annotated[tuple[int, ...] | None, Option(
        auto_or(list_of(whole_number(1, MOST_REQUESTS))), "auto",
        "Requests of a batch, comma separated, e.g. --kv-pipeline-batch-sizes=16,64; all requests of a case are queued at "
        "once, what runs together is --kv-max-running. auto is the original's for its models (16,64 for Qwen3-8B, 8,16 for "
        "Qwen3-32B, 1,4 for LLaVA), else 4.",
    )]
    pool_blocks: Annotated[int | None, Option(
        auto_or(whole_number(1)), "auto",
        "Blocks of 16 tokens in the pool of every variant, e.g. --kv-pool-blocks=4096; auto holds two of the longest requests.",
    )]
    pool_bytes: Annotated[int | None, Option(
        auto_or(whole_number(1, 10**13)), "auto",
        "Bytes of the pool of every variant in the place of --kv-pool-blocks, e.g. --kv-pool-bytes=8589934592.",
    )]
    max_model_len: Annotated[int, Option(
        whole_number(2), "4096",
        "Tokens of a request at most, prompt and output together, e.g. --kv-max-model-len=8192; longer prompts are clipped.",
    )]
    max_running: Annotated[int | None, Option(
        auto_or(whole_number(1, MOST_REQUESTS)), "auto",
        "Requests that run at the same time at most, e.g. --kv-max-running=64; auto is all of a case, at most 256.",
        original="512",
    )]
    step_tokens: Annotated[int, Option(
        whole_number(1), "8192",
        "Tokens of a step at most where prompts come first, e.g. --kv-step-tokens=2048.",
        original="32768",
    )]
    chunk_sizes: Annotated[tuple[int, ...], Option(
        list_of(whole_number(1)), "64",
        "Tokens of a step of the variant chunked, decoding requests first and prompts in what is left, comma separated, e.g. "
        "--kv-chunk-sizes=256,512.",
    )]
    greenctx_sms: Annotated[tuple[tuple[int, int], ...] | None, Option(
        auto_or(list_of(sm_pair)), "auto",
        "SMs of the decode lane and of the prompt lane of greenctx-only, comma separated, e.g. --kv-greenctx-sms=64:64,32:96; "
        "auto takes the two shares.",
    )]
    greenctx_compress_ratio: Annotated[tuple[float, ...] | None, Option(
        auto_or(list_of(ratio)), "auto",
        "Share of the SMs for prompts and their compression, comma separated, e.g. --kv-greenctx-compress-ratio=0.2; auto is "
        "0.25.",
    )]
    greenctx_main_ratio: Annotated[tuple[float, ...] | None, Option(
        auto_or(list_of(ratio)), "auto",
        "Share of the SMs for decoding, comma separated, e.g. --kv-greenctx-main-ratio=0.8; auto is what the other leaves.",
    )]
    greenctx_main_stream: Annotated[bool, Option(
        switch, "true",
        "Whether decoding is held to its share; off, as in the original's commands, it may use all SMs, e.g. "
        "--kv-greenctx-main-stream=off.",
        original="false",
    )]
    replay_decisions: Annotated[str | None, Option(
        path, "",
        "Let the controller of auto-tune+greenctx and triad decide as in another run, by its pipeline_decisions.json, e.g. "
        "--kv-replay-decisions=reports/latest/pipeline_decisions.json; a log that does not fit ends the case.",
    )]
    arrivals: Annotated[str, Option(
        choice(CLOSED, POISSON, TRACE), CLOSED,
        "When requests come: closed (all at once, or by --kv-concurrency), poisson (at --kv-arrival-rate), trace (as in "
        "--kv-trace-conv, by --kv-trace-time-scale), e.g. --kv-arrivals=poisson.",
    )]
    arrival_rate: Annotated[float | None, Option(
        off_or(_rate), "off",
        "Requests a second in the mean, e.g. --kv-arrival-rate=2; by itself it asks for --kv-arrivals=poisson, and with trace "
        "it says how fast that comes.",
        example="2",
    )]
    trace_time_scale: Annotated[float, Option(
        _scale, "1",
        "How many times as fast as the trace requests come, e.g. --kv-trace-time-scale=4; by itself it asks for "
        "--kv-arrivals=trace.",
    )]
    concurrency: Annotated[int | None, Option(
        off_or(whole_number(1, MOST_REQUESTS)), "off",
        "Closed loop: so many requests are under way, and the next comes when one is over, e.g. --kv-concurrency=8; off: all "
        "come at once.",
        example="8",
    )]
    slo: Annotated[str, Option(
        _slo, "1s:25ms",
        "What counts as served well: TTFT from the arrival, and mean TPOT of the request, e.g. --kv-slo=1s:25ms.",
    )]
    capacity: Annotated[str | tuple[float, float] | None, Option(
        off_or(_capacity), "off",
        "Seek each case's capacity, the highest rate of arrivals at which 90 % of the requests meet --kv-slo, by bisection "
        "after the rounds: between two rates, --kv-capacity=0.5:8, or auto, around what the closed loop gives.",
        example="auto",
    )]
    served_quality: Annotated[bool, Option(
        switch, "true",
        "Whether the continuation that was served is compared with the full cache's (perplexity, KL divergence, top-1), e.g. "
        "--kv-served-quality=off.",
    )]
    pipeline_json: Annotated[str | None, Option(
        path, "",
        "File that gets the original's JSON list after each case, beside the one in the run's folder, e.g. "
        "--kv-pipeline-json=kvcache_matrix_results.json.",
        original="kvcache_matrix_results.json", aliases=("output",),
    )]
    # fmt: on

    @classmethod
    def combine(cls, values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
        """Arrivals, and the pool's size, of which one way at most may be given."""
        if values["pool_blocks"] is not None and values["pool_bytes"] is not None:
            raise UserError("--kv-pool-blocks and --kv-pool-bytes: one of them hides the other; give one")
        if "arrivals" not in given:
            # what only one kind of arrivals reads asks for that kind
            asked = TRACE if "trace_time_scale" in given else POISSON if "arrival_rate" in given else values["arrivals"]
            values = values | {"arrivals": asked}
        if values["arrivals"] == POISSON and values["arrival_rate"] is None:
            raise UserError("--kv-arrivals=poisson: needs the mean rate; give --kv-arrival-rate=2, say")
        if values["arrivals"] == CLOSED and values["arrival_rate"] is not None:
            raise UserError(
                f"--kv-arrival-rate={values['arrival_rate']:g}: with --kv-arrivals=closed all come at once; use "
                "--kv-arrivals=poisson or trace"
            )
        if values["trace_time_scale"] != 1 and (values["arrivals"] != TRACE or values["arrival_rate"] is not None):
            raise UserError(
                f"--kv-trace-time-scale={values['trace_time_scale']:g}: goes with --kv-arrivals=trace alone, without "
                "--kv-arrival-rate, which is another way to say how fast"
            )
        if values["concurrency"] is not None and values["arrivals"] != CLOSED:
            raise UserError(
                f"--kv-concurrency={values['concurrency']}: is a closed loop, and --kv-arrivals={values['arrivals']} is an "
                "open one; leave one of them out"
            )
        return values
