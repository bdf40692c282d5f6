"""The space of the pipeline suite: ids, baselines, one pool for all variants, and what is refused before anything is loaded."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from compressor_weights import written

from kvsuite.case import Case
from kvsuite.engines.capabilities import ReadsImages, ServesUnderLoad
from kvsuite.engines.serving_plan import ServingPlan
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import default_options
from kvsuite.suites.pipeline.cases import pipeline_cases, unread_options, workload_of
from kvsuite.suites.pipeline.options import PipelineOptions
from kvsuite.suites.pipeline.refusals import refuse_load
from kvsuite.suites.pipeline.suite import PipelineSuite
from kvsuite.suites.pipeline.work import load_work

QWEN = {"model": "dummy:Qwen3-8B", "device": "cpu"}
VARIANTS = "compression-only,greenctx-only,auto-tune+greenctx,triad,streams-only,chunked"


def cases(**typed: str) -> list[Case]:
    return pipeline_cases(default_options(**({"device": "cpu"} | typed)))


def ids(**typed: str) -> list[str]:
    return [case.id for case in cases(**typed)]


def plan(case: Case) -> ServingPlan:
    found = ServingPlan.of(case)
    assert found is not None
    return found


def refusal(case: Case, **typed: str) -> str:
    with pytest.raises(CaseInvalid) as refused:
        refuse_load(case, default_options(**typed).of(PipelineOptions))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_default_is_something_for_a_laptop() -> None:
    found = cases()
    assert [case.id for case in found] == [
        "nano-synthetic-long-bs04-baseline",
        "nano-synthetic-long-bs04-compression-only",
        "nano-synthetic-long-bs04-chunked-c64",
        "nano-synthetic-long-bs04-chunked-c64-f5",
    ]
    for case in found:
        assert case.model == "smollm2"
        assert case.workload["requests"] == 4
        # room for two of the longest requests
        assert plan(case).pool_blocks == 2 * -(-(128 + 32) // 16)


def test_ids_name_every_axis_and_have_no_plus() -> None:
    found = ids(**QWEN, variants=VARIANTS, chunk_sizes="256,512", factors="2,5", workloads="synthetic-long")
    assert "nano-synthetic-long-bs16-chunked-c256" in found
    assert "nano-synthetic-long-bs64-chunked-c512-f2" in found
    assert any(re.fullmatch(r"nano-synthetic-long-bs16-auto-tune_greenctx-.*f5.*", name) for name in found)
    assert len(set(found)) == len(found)
    assert not [name for name in found if set(name) & set("+[](), ")]


@pytest.mark.parametrize(
    "typed",
    [
        {"variants": "auto-tune+greenctx,triad", "greenctx_compress_ratio": "0.2"},
        {"variants": "triad", "greenctx_sms": "64:64"},
        {"variants": "compression-only", "greenctx_main_stream": "off"},
    ],
)
def test_shares_of_sms_are_no_sweep_under_a_controller(typed: dict[str, str]) -> None:
    """The original takes them, and replaces them at its first decision (flaw 10)."""
    with pytest.raises(UserError, match=r"SMs are parted as given in greenctx-only; a controller chooses its own"):
        cases(**typed)
    found = cases(**typed | {"variants": f"greenctx-only,{typed['variants']}"})
    assert {plan(case).controller for case in found if case.partition is not None} == {None}
    assert any(case.partition is not None for case in found)


def test_decisions_are_replayed_by_variants_with_a_controller_alone(tmp_path: Path) -> None:
    log = tmp_path / "decisions.json"
    with pytest.raises(UserError, match="none of --kv-variants=compression-only has a controller"):
        cases(variants="compression-only", replay_decisions=str(log))
    with pytest.raises(UserError, match="no such file"):
        cases(variants="triad", replay_decisions=str(log))
    log.write_text("{}")
    found = cases(variants="compression-only,triad", replay_decisions=str(log))
    assert [plan(case).replay_decisions for case in found] == [None, None, str(log)]


@pytest.mark.parametrize(
    ("typed", "unread", "reader"),
    [
        ({"variants": "compression-only", "chunk_sizes": "32"}, ["--kv-chunk-sizes"], {"variants": "chunked"}),
        (
            {"variants": "baseline", "factors": "2", "pipeline_method": "snapkv"},
            ["--kv-factors", "--kv-pipeline-method"],
            {"variants": "streams-only"},
        ),
        ({"variants": "triad", "async_compression": "off"}, ["--kv-async-compression"], {"variants": "chunked"}),
        (
            {"workloads": "light-dataset,heavy-trace", "synthetic_context": "9"},
            ["--kv-synthetic-context"],
            {"workloads": "synthetic-identical"},
        ),
        ({"dataset_dir": "texts"}, ["--kv-dataset-dir"], {"workloads": "light-dataset"}),
        ({"trace_conv": "t.csv"}, ["--kv-trace-conv"], {"workloads": "heavy-trace"}),
        ({"trace_conv": "t.csv"}, ["--kv-trace-conv"], {"arrivals": "trace"}),
    ],
)
def test_an_option_that_nothing_of_the_run_reads_is_named(
    typed: dict[str, str], unread: list[str], reader: dict[str, str]
) -> None:
    assert unread_options(default_options(**typed)) == unread
    assert unread_options(default_options(**typed | reader)) == []


def test_several_methods_stand_in_the_id_and_one_does_not() -> None:
    assert ids(variants="compression-only")[1] == "nano-synthetic-long-bs04-compression-only"
    found = ids(variants="compression-only", pipeline_method="streaming_llm,snapkv(window=8)")
    assert found[1:] == [
        "nano-synthetic-long-bs04-compression-only-streaming_llm-f5",
        "nano-synthetic-long-bs04-compression-only-snapkv_window8-f5",
    ]


@pytest.mark.parametrize("variants", ["compression-only", "baseline", "chunked", "baseline,compression-only"])
def test_the_baseline_of_each_model_workload_and_batch_is_there_once(variants: str) -> None:
    found = cases(
        models="smollm2,dummy:tiny", variants=variants, workloads="synthetic-long,synthetic-identical",
        synthetic_batch_sizes="2,4",
    )  # fmt: skip
    baselines = [case for case in found if case.params["variant"] == "baseline"]
    assert len(baselines) == 2 * 2 * 2
    assert len({(case.model, case.workload["workload"], case.workload["batch"]) for case in baselines}) == 8
    for case in baselines:
        assert case.policy is None
        assert plan(case).stage == "none"


@pytest.mark.parametrize("typed", [{}, {"pool_blocks": "64"}, {"pool_bytes": "10000000"}, {"max_running": "40"}])
def test_every_variant_has_the_same_pool_and_may_run_as_many(typed: dict[str, str]) -> None:
    """Flaw 8: not a share of what happens to be free once something is loaded."""
    found = cases(**QWEN, variants=VARIANTS, synthetic_batch_sizes="64", **typed)
    pools = {(plan(case).pool_blocks, plan(case).pool_bytes, plan(case).max_num_seqs) for case in found}
    assert len(pools) == 1


def test_what_the_variants_ask_for() -> None:
    found = {case.params["variant"]: case for case in cases(variants=VARIANTS) if case.params["chunk"] is None}
    asked = {name: (plan(case).stage, plan(case).lanes, plan(case).controller) for name, case in found.items()}
    assert asked == {
        "baseline": ("none", 1, None),
        "compression-only": ("async", 1, None),
        "streams-only": ("async", 2, None),
        "greenctx-only": ("async", 2, None),
        "auto-tune+greenctx": ("async", 2, "auto"),
        "triad": ("async", 2, "dual"),
    }
    assert all(case.policy == "streaming_llm" for name, case in found.items() if name != "baseline")
    dense, compressed = (case for case in cases(variants="chunked") if case.params["chunk"])
    assert (dense.policy, compressed.policy) == (None, "streaming_llm")
    for case in (dense, compressed):
        assert not plan(case).prompts_first
        assert plan(case).step_tokens == case.params["chunk"] == 64
    assert plan(cases(variants="compression-only", async_compression="off")[1]).stage == "sync"


def test_partitions_stand_in_the_id_and_counts_win_over_shares() -> None:
    assert ids(variants="greenctx-only")[1] == "nano-synthetic-long-bs04-greenctx-only-sm0.75_0.25"
    found = cases(variants="greenctx-only,triad", greenctx_sms="64:64,24:104", greenctx_compress_ratio="0.2")
    assert [(case.name.removeprefix("synthetic-long-bs04-"), case.partition) for case in found[1:]] == [
        ("greenctx-only-sm64_64", {"decode_sms": 64, "prompt_sms": 64}),
        ("greenctx-only-sm24_104", {"decode_sms": 24, "prompt_sms": 104}),
        ("triad", None),
    ]
    shares = cases(variants="greenctx-only", greenctx_compress_ratio="0.2,0.5", greenctx_main_stream="off")[1:]
    assert [case.partition for case in shares] == [
        {"decode_ratio": 0.8, "prompt_ratio": 0.2, "decode_bound": False},
        {"decode_ratio": 0.5, "prompt_ratio": 0.5, "decode_bound": False},
    ]


def test_identical_prompts_are_a_workload_of_their_own_and_alone_are_found_again() -> None:
    """Flaw 1: cached tokens are not throughput unless somebody asks for that."""
    unique, identical = cases(variants="baseline", workloads="synthetic-long,synthetic-identical")
    assert (workload_of(unique).prompts, plan(unique).prefix_caching) == ("unique", False)
    assert (workload_of(identical).prompts, plan(identical).prefix_caching) == ("identical", True)


def test_sizes_of_the_original() -> None:
    """Golden facts: clipped contexts, outputs of 0, and how many prompts a case takes."""
    for context, output, clipped in ((4096, 128, 3968), (3072, 512, 3072), (4096, 512, 3584)):
        case = cases(synthetic_context=str(context), synthetic_output=str(output))[0]
        assert case.workload["prompt_tokens"] == clipped
    assert cases(synthetic_output="0")[0].workload["max_new_tokens"] == 512
    heavy = cases(**QWEN, workloads="heavy-trace", variants="baseline", trace_conv="t.csv")
    assert [case.workload["requests"] for case in heavy] == [64, 256]
    synthetic = cases(**QWEN, synthetic_batch_sizes="32,64", variants="baseline")
    assert [case.workload["requests"] for case in synthetic] == [32, 64]


def test_the_originals_llava_has_its_own_compressor_and_batch_sizes(tmp_path: Path) -> None:
    path = written(tmp_path / "weights.pth")
    typed = {"models": "qwen3-8b,llava-mlp", "variants": "compression-only,triad", "compressor_path": path}
    found = cases(**typed, pipeline_method="h2o", workloads="light-dataset", pipeline_image="random")
    compressed = [case for case in found if case.policy is not None]
    assert {(case.model, case.policy) for case in compressed} == {
        ("Qwen/Qwen3-8B", "h2o"), ("llava-hf/llava-1.5-7b-hf", "mlp"),
    }  # fmt: skip
    llava = [case for case in found if "llava" in case.model]
    assert [case.workload["batch"] for case in llava] == [1, 1, 1, 4, 4, 4]
    assert {case.policy_params["weights"] for case in compressed if case.policy == "mlp"} == {path}
    assert {case.policy_params["factor"] for case in compressed} == {5.0}
    # a context of 4096 is 3968 with its output; of that 576 are the image's
    long = cases(**typed, pipeline_image="random", synthetic_context="4096", synthetic_output="128")
    assert {case.workload["prompt_tokens"] for case in long} == {3968}
    # flaw 12: its compressor is never left out
    with pytest.raises(UserError, match=r"--kv-pipeline-method=mlp: has no weights; give --kv-compressor-path=FILE"):
        cases(models="llava-mlp")
    alone = {"models": "llava-mlp", "compressor_path": path}
    assert unread_options(default_options(**alone)) == []
    assert unread_options(default_options(**alone, pipeline_method="h2o")) == ["--kv-pipeline-method"]
    assert unread_options(default_options(models="qwen3-8b", compressor_path=path)) == ["--kv-compressor-path"]


def test_a_key_and_the_name_that_it_stands_for_are_one_model(tmp_path: Path) -> None:
    typed = {"compressor_path": written(tmp_path / "weights.pth"), "variants": "compression-only"}
    typed |= {"models": "llava-mlp,llava-hf/llava-1.5-7b-hf", "pipeline_method": "h2o", "pipeline_batch_sizes": "1"}
    found = cases(**typed)
    assert [(case.model, case.policy) for case in found] == [
        ("llava-hf/llava-1.5-7b-hf", None), ("llava-hf/llava-1.5-7b-hf", "mlp"), ("llava-hf/llava-1.5-7b-hf", "h2o"),
    ]  # fmt: skip
    assert len({case.id for case in found}) == 3
    assert unread_options(default_options(**typed)) == []
    assert len(cases(models="qwen3-8b,Qwen/Qwen3-8B", variants="baseline", pipeline_batch_sizes="1")) == 1


def test_models_by_the_originals_keys_and_their_batch_sizes() -> None:
    found = cases(models="qwen3-8b,qwen3-32b", variants="baseline")
    assert [(case.model, case.workload["batch"]) for case in found] == [
        ("Qwen/Qwen3-8B", 16), ("Qwen/Qwen3-8B", 64), ("Qwen/Qwen3-32B", 8), ("Qwen/Qwen3-32B", 16),
    ]  # fmt: skip
    with pytest.raises(UserError, match="--kv-models and --kv-model"):
        cases(models="smollm2", model="smollm2")
    # the preset names the original's models, and a user who names one means it
    assert {case.model for case in cases(preset="original", model="dummy:tiny")} == {"dummy:tiny"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"pipeline_method": "kvpress:SnapKV"}, "--kv-pipeline-method=kvpress:SnapKV: a press works on the dense cache"),
        ({"pipeline_method": "nosuch"}, "--kv-pipeline-method=nosuch: unknown policy"),
        ({"pipeline_method": "snapkv(factor=3)"}, "--kv-factors here"),
        ({"pipeline_method": "snapkv(width=3)"}, "has no parameter width"),
        ({"max_running": "100", "synthetic_batch_sizes": "200"}, "--kv-chunk-sizes=64: fewer tokens than --kv-max-running=100"),
        ({"max_running": "100", "step_tokens": "50", "variants": "baseline"}, "--kv-step-tokens=50: fewer tokens than"),
    ],
)  # fmt: skip
def test_what_no_case_can_be_made_of_is_a_line(typed: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        cases(**typed)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_case_lacks_makes_it_invalid_and_not_the_run() -> None:
    trace = {"workloads": "heavy-trace"}
    assert refusal(cases(**trace)[0], **trace).startswith(
        "--kv-workloads=heavy-trace: is made of a trace and none is given"
    )
    assert "--kv-arrivals=trace" in refusal(cases(arrivals="trace")[0], arrivals="trace")
    nothing = {"synthetic_output": "500", "max_model_len": "400"}
    assert "leave no room for a prompt" in refusal(cases(**nothing)[0], **nothing)
    small = {"pool_blocks": "9"}
    assert refusal(cases(**small)[0], **small).startswith(
        "--kv-pool-blocks=9: 9 blocks of 16 tokens are fewer than the 10"
    )
    kept = {"factors": "200"}
    assert "--kv-factors=200: keeps nothing of a prompt of 128 tokens" in refusal(cases(**kept)[1], **kept)
    slow = {"arrival_rate": "0.0005"}
    assert "never drains" in refusal(cases(**slow)[0], **slow)
    # what has all that is not refused
    for typed in ({}, {"arrival_rate": "2"}, {"pool_blocks": "10"}, {"factors": "128"}):
        for case in cases(**typed):
            refuse_load(case, default_options(**typed).of(PipelineOptions))


def test_a_plan_counts_fewer_steps_where_more_requests_decode_at_a_time() -> None:
    common = default_options().of(CommonOptions)
    baseline, compressed = cases(variants="compression-only")
    dense, less = (load_work(case, common, quality=False) for case in (baseline, compressed))
    assert dense.bulk == less.bulk == 7 * 4 * 128
    assert (dense.steps, less.steps) == (7 * 2 * 32, 7 * 1 * 32)


def test_a_capacity_is_part_of_what_is_measured_where_it_is_asked_for() -> None:
    common = default_options().of(CommonOptions)
    (without,), (auto,), (between,) = (cases(variants="baseline", capacity=typed) for typed in ("off", "auto", "0.5:8"))
    assert "capacity" not in without.params
    assert (auto.params["capacity"], between.params["capacity"]) == ("auto", [0.5, 8.0])
    assert without.key != auto.key != between.key
    # 16 times from the lowest to the highest rate: both, and 6 halvings to 5 %
    passes = [load_work(case, common, quality=False).bulk / (4 * 128) for case in (without, auto, between)]
    assert passes == [7, 7 + 8, 7 + 8]
    (open_loop,) = cases(variants="baseline", capacity="auto", arrival_rate="2")
    assert load_work(open_loop, common, quality=False).bulk / (4 * 128) == 7 + 8 + 1


def test_a_lowest_rate_that_takes_hours_is_refused_with_the_one_that_does_not() -> None:
    own = default_options().of(PipelineOptions)
    (case,) = cases(variants="baseline", capacity="0.0001:8")
    with pytest.raises(
        CaseInvalid,
        match=r"--kv-capacity=0\.0001:8: at the lowest rate the last of 4 requests comes after 30000 s; raise",
    ):
        refuse_load(case, own)


def test_the_compressor_takes_its_weights_from_the_option(tmp_path: Path) -> None:
    path = written(tmp_path / "weights.pth")
    typed = {"pipeline_method": "mlp,mean_pool", "factors": "1,5", "compressor_path": path, "variants": VARIANTS}
    found = [case for case in cases(**typed) if case.policy == "mlp"]
    assert {case.id.partition("-bs04-")[2].partition("-mlp")[0].rstrip("]") for case in found} >= {
        "compression-only", "greenctx-only", "auto-tune_greenctx", "triad", "streams-only", "chunked-c64",
    }  # fmt: skip
    assert {case.policy_params["weights"] for case in found} == {path}
    assert {case.policy_params["factor"] for case in found} == {1.0, 5.0}
    assert all("weights" not in case.policy_params for case in cases(**typed) if case.policy == "mean_pool")
    # flaw 12 of the original: without its weights it ran as nothing, or as noise, under its own name
    with pytest.raises(UserError, match=r"--kv-pipeline-method=mlp: has no weights; give --kv-compressor-path=FILE"):
        cases(pipeline_method="mlp")
    with pytest.raises(UserError, match=r"--kv-compressor-path=gone.pth: no such file"):
        cases(pipeline_method="mlp_residual", compressor_path="gone.pth")
    assert unread_options(default_options(compressor_path=path)) == ["--kv-compressor-path"]
    assert unread_options(default_options(compressor_path=path, pipeline_method="mlp")) == []
    with pytest.raises(UserError, match=r"--kv-pipeline-method=mean_pool\(factor=2.5\): so many tokens become one"):
        cases(pipeline_method="mean_pool", factors="2.5")


def test_images_need_an_engine_that_reads_them() -> None:
    (case,) = cases(variants="baseline", pipeline_image="random")
    assert PipelineSuite().needs(case) == (ServesUnderLoad, ReadsImages)
    (text,) = cases(variants="baseline")
    assert PipelineSuite().needs(text) == (ServesUnderLoad,)
    # a case of text is what it was before there were images
    assert "image" not in text.workload
    assert (text.name, case.name) == ("synthetic-long-bs04-baseline", "synthetic-long-image-bs04-baseline")


def test_an_image_is_known_by_what_is_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        Path(name).mkdir()
        Path(name, "cat.png").write_bytes({"c": b"a"}.get(name, name.encode()))
    Path("random").write_bytes(b"no keyword")

    def key(case: Case) -> str:
        return case.key(model_revision=None, dataset_revision=None)

    own = [
        cases(variants="baseline", pipeline_image=image)[0]
        for image in ("a/cat.png", "b/cat.png", "c/cat.png", "./random", "random")
    ]
    assert len({key(case) for case in own}) == 4
    assert key(own[0]) == key(own[2]), "wherever the file is"
    labels = [case.workload["image"] for case in own]
    assert labels[0] == "cat.png@" + hashlib.sha256(b"a").hexdigest()[:12]
    assert labels[3].startswith("random@")
    assert labels[4] == "random"
    # told before anything is loaded or written
    with pytest.raises(UserError, match=r"--kv-pipeline-image=d/cat.png: no such file; give a PNG, JPEG or .npy file"):
        cases(variants="baseline", pipeline_image="d/cat.png")


def test_layers_after_each_token_are_asked_of_what_merges_where_no_controller_chooses() -> None:
    typed = {"pipeline_method": "mean_pool,knorm", "decode_layers_per_step": "off,4", "variants": VARIANTS}
    found = [case for case in cases(**typed) if case.policy is not None]
    paced = [case for case in found if plan(case).layers_per_step is not None]
    assert {case.policy for case in paced} == {"mean_pool"}
    assert {case.params["variant"] for case in paced} == {
        "compression-only",
        "greenctx-only",
        "streams-only",
        "chunked",
    }
    assert {plan(case).layers_per_step for case in paced} == {4}
    assert paced[0].name == "synthetic-long-bs04-compression-only-mean_pool-f5-d4"
    assert len({case.name for case in found}) == len(found)
    # the others are what they were, key and all
    before = [case for case in cases(**typed | {"decode_layers_per_step": "off"}) if case.policy is not None]
    assert [case for case in found if case not in paced] == before
    assert "layers_per_step" not in before[0].params["serving"]
    alone = cases(pipeline_method="mean_pool", decode_layers_per_step="2", variants="compression-only,triad")
    assert [case.name.removeprefix("synthetic-long-bs04-") for case in alone] == [
        "baseline", "compression-only-d2", "triad",
    ]  # fmt: skip
    with pytest.raises(
        UserError, match=r"--kv-decode-layers-per-step=4: .* --kv-pipeline-method=streaming_llm keeps tokens"
    ):
        cases(decode_layers_per_step="4")


@pytest.mark.parametrize("typed", [
    {"pipeline_method": "mean_pool", "variants": "triad"}, {"variants": "triad"}, {"variants": "baseline"},
])  # fmt: skip
def test_layers_after_each_token_that_no_variant_reads_are_named_and_not_refused(typed: dict[str, str]) -> None:
    found = cases(**typed, decode_layers_per_step="4")
    assert {plan(case).layers_per_step for case in found} == {None}
    assert unread_options(default_options(**typed, decode_layers_per_step="4")) == ["--kv-decode-layers-per-step"]


def test_layers_after_each_token_are_those_of_the_model_whose_method_merges(tmp_path: Path) -> None:
    typed = {"models": "qwen3-8b,llava-mlp", "compressor_path": written(tmp_path / "weights.pth")}
    typed |= {"variants": "compression-only", "pipeline_batch_sizes": "1", "decode_layers_per_step": "4"}
    found = [case for case in cases(**typed) if case.policy is not None]
    assert [(case.policy, plan(case).layers_per_step) for case in found] == [("streaming_llm", None), ("mlp", 4)]
    with pytest.raises(UserError, match=r"--kv-decode-layers-per-step=4: .* keeps tokens"):
        cases(**typed | {"models": "qwen3-8b"})
