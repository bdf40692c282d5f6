"""Options of the pipeline suite: the original's have theirs, its developers' paths are refused, what excludes itself too."""

from __future__ import annotations

import pytest

from kvsuite.errors import UserError
from kvsuite.options.groups import all_options
from kvsuite.options.resolve import default_options, resolve_options
from kvsuite.suites.pipeline.options import PipelineOptions

#: the matrix bench's, by its names
ORIGINAL = {
    "output": "kvcache_matrix_results.json", "models": None, "workloads": None, "variants": None, "resume": None,
    "dataset-dir": None, "trace-conv": None, "qwen3-8b": None, "qwen3-32b": None, "llava": None, "compressor-path": None,
    "synthetic-context": 3072, "synthetic-output": 512, "synthetic-dialogue": None, "synthetic-token": None,
    "synthetic-num-batches": 2, "synthetic-batch-sizes": None, "gpu-mem-util": None,
    "greenctx-compress-ratio": None, "greenctx-main-ratio": None, "greenctx-main-stream": None,
}  # fmt: skip


def own(**typed: str) -> PipelineOptions:
    return default_options(**typed).of(PipelineOptions)


def test_every_option_of_the_original_is_there_or_refused() -> None:
    there = {name for option in all_options() for name in (option.name, *option.aliases)}
    refused = PipelineOptions.refused_names
    for name in ORIGINAL:
        assert (name in there) != (name in refused), name
    preset = own(preset="original")
    assert preset.pipeline_json is not None
    assert preset.pipeline_json.endswith(str(ORIGINAL["output"]))
    found = preset.synthetic_context, preset.synthetic_output, preset.synthetic_num_batches
    assert found == (ORIGINAL["synthetic-context"], ORIGINAL["synthetic-output"], ORIGINAL["synthetic-num-batches"])


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("gpu-mem-util", "--kv-pool-blocks=N (of 16 tokens) or --kv-pool-bytes=N"),
        ("qwen3-8b", "--kv-model=FOLDER"),
        ("qwen3-32b", "--kv-model=FOLDER"),
        ("llava", "--kv-model=FOLDER"),
    ],
)
def test_paths_of_developers_and_shares_of_free_memory_are_refused_with_what_replaces_them(
    name: str, mend: str
) -> None:
    with pytest.raises(UserError) as refused:
        resolve_options({f"kv_rejected_{name}": "0.9"}.get, lambda dest: None)
    assert str(refused.value).startswith(f"--kv-{name}: ")
    assert mend in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"variants": "greenctx"}, "--kv-variants=greenctx: use baseline, compression-only, greenctx-only"),
        ({"workloads": "heavy"}, "--kv-workloads=heavy: use heavy-trace, light-dataset"),
        ({"synthetic_batch_sizes": "32,x"}, "--kv-synthetic-batch-sizes=32,x: not a whole number"),
        ({"factors": "0.5"}, "--kv-factors=0.5: must lie between 1"),
        ({"capacity": "2"}, "--kv-capacity=2: use off, auto, or the lowest and highest rate as LOW:HIGH"),
        ({"capacity": "0:8"}, "--kv-capacity=0:8: must be more than 0"),
        ({"capacity": "8:2"}, "--kv-capacity=8:2: the first rate must be below the second"),
        ({"slo": "1s"}, "--kv-slo=1s: is no time to the first token"),
        ({"slo": "1s:25"}, "--kv-slo=1s:25: is no time to the first token"),
        ({"slo": "0s:25ms"}, "--kv-slo=0s:25ms: is no time to the first token"),
        ({"slo": "1s:0ms"}, "--kv-slo=1s:0ms: is no time to the first token"),
        ({"pool_blocks": "4", "pool_bytes": "4"}, "--kv-pool-blocks and --kv-pool-bytes: one of them hides the other"),
        ({"arrivals": "poisson"}, "--kv-arrivals=poisson: needs the mean rate"),
        (
            {"arrivals": "closed", "arrival_rate": "2"},
            "--kv-arrival-rate=2: with --kv-arrivals=closed all come at once",
        ),
        ({"arrivals": "poisson", "arrival_rate": "2", "trace_time_scale": "3"}, "--kv-trace-time-scale=3: goes with"),
        ({"arrival_rate": "0"}, "--kv-arrival-rate=0: must be more than 0"),
        ({"arrival_rate": "2", "concurrency": "2"}, "--kv-concurrency=2: is a closed loop"),
    ],
)
def test_what_cannot_be_is_a_line_that_names_option_and_value(typed: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        own(**typed)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_a_rate_asks_for_poisson_and_a_scale_for_the_trace_by_themselves() -> None:
    assert own().arrivals == "closed"
    assert own(arrival_rate="2").arrivals == "poisson"
    assert own(trace_time_scale="2").arrivals == "trace"
    assert own(arrivals="trace", arrival_rate="2").arrivals == "trace"
