"""Cases of the pipeline suite as records: same prompts in the same shape for every arm, identities, what is kept of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from synthetic_session import ENVIRONMENT
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.registry import SessionPool
from kvsuite.engines.results import Served, ServeRequest
from kvsuite.measure.runner import CaseRunner
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.record import Record, schema
from kvsuite.suites.pipeline.cases import pipeline_cases
from kvsuite.suites.registry import suite_named

Call = tuple[str, tuple[tuple[int, int, float], ...], tuple[int, ...]]
Run = Callable[..., dict[str, Record]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text(TEXT * 2, encoding="utf-8")
    return save_checkpoint(folder)


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Run:
    """Records by the name of the case without workload and batch; ``calls`` takes what the session was asked to serve."""

    def measure(calls: list[Call] | None = None, *, backwards: bool = False, **options: str) -> dict[str, Record]:
        given = {
            "model": str(checkpoint), "device": "cpu", "rounds": "2", "num_warmup": "1", "synthetic_context": "30",
            "synthetic_output": "8", "pipeline_batch_sizes": "3", "corpus": str(checkpoint / "text.txt"), "chunk_sizes": "8",
        }  # fmt: skip
        resolved = default_options(**(given | options))
        cases = pipeline_cases(resolved)
        sessions, serve, dense = SessionPool(threads=1), NanoSession.serve_under_load, NanoSession.serve_dense

        def note(kind: str, requests: Sequence[ServeRequest]) -> None:
            if calls is not None:
                shape = tuple((len(one.prompt), one.new_tokens, one.arrival_s) for one in requests)
                calls.append((kind, shape, tuple(requests[0].prompt)))

        def served(self: NanoSession, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served:
            note("forced" if requests[0].forced else "served", requests)
            return serve(self, requests, concurrency=concurrency)

        def served_dense(self: NanoSession, requests: Sequence[ServeRequest]) -> Served:
            note("dense", requests)
            return dense(self, requests)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NanoSession, "serve_under_load", served)
            patch.setattr(NanoSession, "serve_dense", served_dense)
            runner = CaseRunner(resolved, MetricRegistry(), ENVIRONMENT, sessions, suite_named, planned=cases)
            found = {}
            for case in cases[::-1] if backwards else cases:
                record = runner.run(case, f"tests::{case.id}").record
                jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema("record"))
                found[re.sub(r".*-bs\d+-", "", case.name)] = record
            sessions.close()
        return found

    return measure


def test_the_capacity_is_sought_with_the_same_requests_at_other_rates(run: Run) -> None:
    calls: list[Call] = []
    found = run(calls, model="dummy:tiny", variants="compression-only", slo="60s:60s", capacity="100:400", rounds="2")
    assert [record.status for record in found.values()] == ["ok", "ok"]
    # a warm-up, two rounds, the lowest rate and the highest, which is good too
    assert len(calls) == 2 * (3 + 2)
    gaps = []
    for own in (calls[:5], calls[5:]):
        (_, timed, prompt), slow, fast = own[1], own[3], own[4]
        assert slow[2] == fast[2] == prompt
        assert [one[:2] for one in slow[1]] == [one[:2] for one in fast[1]] == [one[:2] for one in timed]
        assert slow[1][-1][2] == pytest.approx(4 * fast[1][-1][2]) == pytest.approx(2 / 100)
        gaps.append([one[2] for one in slow[1]])
    assert gaps[0] == gaps[1]
    for record in found.values():
        assert value(record, "capacity_req_s") == 400
        assert [(one["rate"], one["share"], one["drains"]) for one in record.samples["capacity"]] == [
            (100, 1, None), (400, 1, None),
        ]  # fmt: skip
        assert any("the capacity is at least 400 requests a second" in warning for warning in record.warnings)


def test_an_automatic_range_lies_around_the_closed_loop(run: Run) -> None:
    """Also where the rounds are an open one; a single request has no rate, and its numbers stay."""
    calls: list[Call] = []
    options = {"model": "dummy:tiny", "variants": "baseline", "slo": "60s:60s", "capacity": "auto", "rounds": "1"}
    record = run(calls, **options)["baseline"]
    (measured,) = record.samples["rounds"]
    low, high = [one["rate"] for one in record.samples["capacity"]]
    assert (low, high) == pytest.approx((3 / measured["wall_s"] / 8, 3 / measured["wall_s"] * 2))
    calls.clear()
    record = run(calls, **options, arrival_rate="50")["baseline"]
    _, timed, closed, slow, _ = (shape for _, shape, _ in calls)
    assert [one[2] for one in closed] == [0.0] * 3
    # the gaps of the timed round, scaled
    assert slow[1][2] / slow[2][2] == pytest.approx(timed[1][2] / timed[2][2])
    alone = run(**options, pipeline_batch_sizes="1")["baseline"]
    assert alone.status == "ok"
    assert alone.metrics["capacity_req_s"]["value"] is None
    assert alone.metrics["capacity_req_s"]["reason"].startswith("a single request has no rate")
    assert value(alone, "output_tok_s") > 0


def test_what_compressing_a_prompt_took_is_told_of_each_prompt_and_null_where_none_was(run: Run) -> None:
    options = {"model": "dummy:tiny", "variants": "compression-only,streams-only", "rounds": "2", "num_warmup": "0"}
    found = run(**options, factors="1,5", pipeline_batch_sizes="4")
    reasons = {
        "baseline": "the full cache: there is no compression stage", "compression-only-f1": "factor 1 removes nothing",
        "streams-only-f1": "factor 1 removes nothing",
    }  # fmt: skip
    assert set(found) == {*reasons, "compression-only-f5", "streams-only-f5"}
    for name, record in found.items():
        entry, requests = record.metrics["compress_prompt_s"], record.samples["requests"]
        if name in reasons:
            assert (entry["value"], entry["reason"]) == (None, reasons[name])
            assert all(one["compress_s"] is None for one in requests)
            continue
        assert (entry["prompts"], entry["clock"]) == (2 * 4, "perf_counter")
        assert entry["values"][0] == pytest.approx(sum(one["compress_s"] for one in requests) / 4)
        # it is done within a step, so that all of it is less than the round
        assert 0 < sum(one["compress_s"] for one in requests) < record.samples["rounds"][0]["wall_s"]


def test_prompts_whose_requests_end_before_all_layers_are_merged_have_no_time_of_it(run: Run) -> None:
    options = {"model": "dummy:tiny", "variants": "compression-only", "rounds": "1", "num_warmup": "0"}
    merged = {"pipeline_method": "mean_pool", "decode_layers_per_step": "1", "synthetic_output": "2"}
    record = run(**options, **merged)["compression-only-d1"]
    assert record.status == "ok"
    entry = record.metrics["compress_prompt_s"]
    assert (entry["value"], entry["reason"].rpartition(", ")[2]) == (
        None, "or outputs ended before all of its layers were merged",
    )  # fmt: skip
    assert {one["compress_s"] for one in record.samples["requests"]} == {None}


def outputs(record: Record) -> list[str]:
    return [one["outputs_hash"] for one in record.samples["rounds"]]


def value(record: Record, name: str) -> Any:
    return record.metrics[name]["value"]


def test_each_arm_is_warmed_up_with_the_timed_shape_and_all_serve_the_same_prompts(run: Run) -> None:
    """Flaw 7: no arm pays for what the first one of its shape makes, and none is timed on other prompts."""
    calls: list[Call] = []
    found = run(calls, variants="compression-only", arrival_rate="200")
    assert [record.status for record in found.values()] == ["ok", "ok"]
    first, second = (calls[:5], calls[5:])
    # the dense run of these prompts is there already for the second arm
    assert [kind for kind, *_ in first] == ["dense", "forced", "served", "served", "served"]
    assert [kind for kind, *_ in second] == ["forced", "served", "served", "served"]
    for own in (first, second):
        timed = [call for call in own if call[0] == "served"]
        # a warm-up, then the rounds: lengths alike, prompts of their own
        assert len({tuple(shape[:2] for shape in shapes) for _, shapes, _ in timed}) == 1
        assert len({prompt for *_, prompt in timed}) == 3
        assert all(shapes[-1][2] > 0 for _, shapes, _ in timed)
    assert [call[1:] for call in first[2:]] == [call[1:] for call in second[1:]]


def test_the_order_of_the_arms_changes_no_token_and_no_count(run: Run) -> None:
    forwards, backwards = run(), run(backwards=True)
    assert set(forwards) == set(backwards)
    for name, record in forwards.items():
        assert outputs(record) == outputs(backwards[name])
        assert record.tokens == backwards[name].tokens
        assert value(record, "served_kld") == pytest.approx(value(backwards[name], "served_kld"), abs=1e-6)


def test_what_removes_nothing_and_what_only_schedules_otherwise_gives_the_baselines_tokens(run: Run) -> None:
    """Factor 1, chunks, two lanes and an asynchronous stage are no other model."""
    found = run(variants="compression-only,chunked,streams-only", factors="1")
    base = found.pop("baseline")
    assert set(found) == {"compression-only", "chunked-c8", "chunked-c8-f1", "streams-only"}
    for name, record in found.items():
        assert record.status == "ok", (name, record.reason, record.error)
        assert outputs(record) == outputs(base), name
        assert value(record, "served_kld") == pytest.approx(0, abs=1e-5)


def test_compression_lets_more_run_in_the_same_pool_and_costs_something(run: Run) -> None:
    found = run(variants="compression-only", pipeline_batch_sizes="8", factors="5", rounds="1", num_warmup="0")
    base, less = found["baseline"], found["compression-only"]
    assert base.effective["num_blocks"] == less.effective["num_blocks"]
    assert value(less, "served_kld") > 1e-4
    steps = [record.samples["steps"] for record in (base, less)]
    assert max(steps[1]["running"]) > max(steps[0]["running"])
    assert [len(record.samples["requests"]) for record in (base, less)] == [8, 8]
    # what a factor leaves, and the tokens that came behind it but the last, which nobody reads
    assert {one["stored_tokens"] for one in less.samples["requests"]} == {30 // 5 + 7}


def test_random_weights_and_a_switch_have_no_quality_and_say_why(run: Run) -> None:
    found = run(model="dummy:tiny", variants="baseline", rounds="1", num_warmup="0")["baseline"]
    assert found.metrics["served_kld"]["reason"] == "random weights"
    assert any("no warm-up" in warning for warning in found.warnings)
    calls: list[Call] = []
    found = run(calls, served_quality="off", variants="baseline", rounds="1")["baseline"]
    assert found.metrics["served_kld"]["reason"] == "--kv-served-quality=off"
    assert {kind for kind, *_ in calls} == {"served"}


def test_a_policy_that_keeps_no_more_than_its_window_says_so(run: Run) -> None:
    quick = {"variants": "compression-only", "rounds": "1", "num_warmup": "0", "served_quality": "off"}
    found = run(pipeline_method="snapkv", **quick)["compression-only"]
    assert any(warning.startswith("not what its name says: ") for warning in found.warnings), found.warnings
    found = run(pipeline_method="snapkv(window=2)", **quick)["compression-only"]
    assert not any(warning.startswith("not what its name says") for warning in found.warnings)


def test_a_partition_on_a_machine_without_one_is_skipped_and_no_other_thing_under_its_name(run: Run) -> None:
    """Flaw 9: the original ran on plain streams and kept the label."""
    found = run(variants="greenctx-only", greenctx_sms="64:64", rounds="1", num_warmup="0", served_quality="off")
    record = found["greenctx-only-sm64_64"]
    assert record.status == "skipped"
    assert "needs a CUDA device" in str(record.reason)
    assert record.partition["requested"] == {"decode_sms": 64, "prompt_sms": 64}
    assert record.partition["realised"] is None
    assert found["baseline"].status == "ok"


def test_a_pool_in_bytes_smaller_than_a_request_is_invalid_and_one_that_holds_it_is_served(run: Run) -> None:
    found = run(variants="baseline", pool_bytes="3000", rounds="1", num_warmup="0", served_quality="off")["baseline"]
    assert found.status == "invalid"
    assert str(found.reason).startswith("--kv-pool-bytes=3000: 3000 bytes do not hold one block")
    assert str(found.reason).endswith("; give more")
    found = run(variants="baseline", pool_bytes="20000", rounds="1", num_warmup="0", served_quality="off")["baseline"]
    assert found.status == "invalid"
    assert str(found.reason).startswith(
        "--kv-pool-bytes=20000: 1 block of 16 tokens is fewer than the 3 of one request"
    )
    # the same bytes hold it in fewer bits: 12 of them a vector in the place of 64
    [packed] = run(variants="baseline", pool_bytes="20000", cache_dtype="int4", rounds="1", num_warmup="0").values()
    assert (packed.status, packed.reason) == ("ok", None)
    # all three requests
    assert (packed.effective["num_blocks"], packed.effective["kv_cache_dtype"]) == (9, "int4")
    assert packed.metrics["served_kld"]["value"] > 0
    found = run(variants="baseline", pool_bytes="300000", rounds="1", num_warmup="0", served_quality="off")["baseline"]
    assert found.status == "ok"


def test_a_trace_that_takes_longer_than_anybody_waits_is_invalid_and_names_the_scale(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    days = "".join(f"2024-05-1{day} 00:00:00,9,9\n" for day in range(3))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + days)
    asked = {"variants": "baseline", "rounds": "1", "num_warmup": "0", "served_quality": "off", "arrivals": "trace"}
    found = run(**asked, trace_conv=str(trace))["baseline"]
    assert found.status == "invalid"
    assert str(found.reason).startswith(
        "--kv-trace-time-scale=1: the last of 3 requests comes after 172800 s: a round never drains within 3600 s"
    )
    assert run(**asked, trace_conv=str(trace), trace_time_scale="1000000")["baseline"].status == "ok"


def test_a_closed_loop_has_no_more_under_way_than_it_was_told(run: Run) -> None:
    found = run(
        variants="baseline", concurrency="1", pool_blocks="64", rounds="1", num_warmup="0", served_quality="off"
    )
    assert max(found["baseline"].samples["steps"]["running"]) == 1


IMAGES = {"model": "dummy:tiny-llava", "num_warmup": "0", "rounds": "1", "synthetic_context": "40", "chunk_sizes": "7"}


def test_every_request_has_its_image_in_every_variant(run: Run) -> None:
    calls: list[Call] = []
    found = run(calls, **IMAGES, variants="compression-only,streams-only,chunked", pipeline_image="random")
    assert {name: record.status for name, record in found.items()} == dict.fromkeys(found, "ok")
    # 4 of the 40 tokens are the image's, and its place is the beginning
    assert {(shape, prompt[:4]) for _, shape, prompt in calls} == {(((40, 8, 0.0),) * 3, (510,) * 4)}
    assert not any(510 in prompt[4:] for _, _, prompt in calls)
    facts = [record.dataset["image"] for record in found.values() if record.dataset]
    assert facts == [{"source": "random", "tokens": 4, "size": 28}] * 5
    # the same images for all: full caches give the same tokens however steps cut the prompts
    outputs = {name: record.samples["rounds"][0]["outputs_hash"] for name, record in found.items()}
    assert outputs["baseline"] == outputs["chunked-c7"]
    assert outputs["compression-only"] == outputs["streams-only"] == outputs["chunked-c7-f5"]
    # and others than without: the tower is not for nothing
    text_alone = run(**IMAGES, variants="baseline")["baseline"]
    assert text_alone.samples["rounds"][0]["outputs_hash"] != outputs["baseline"]
    assert any(warning.startswith("the model reads images and its prompts are text") for warning in text_alone.warnings)
    kept = {row["stored_tokens"] for row in found["compression-only"].samples["requests"]}
    assert kept == {40 // 5 + 7}


def test_text_and_image_are_merged_apart_by_the_request_and_not_by_the_model(run: Run) -> None:
    """Flaw 13 of the original: on LLaVA it took 576 tokens of every prompt of text for an image's."""
    merged = {"variants": "compression-only", "pipeline_method": "mean_pool", "factors": "2"}
    sizes = {}
    for image in ("off", "random"):
        options = IMAGES | merged | {"synthetic_context": "41", "pipeline_image": image, "pipeline_batch_sizes": "2"}
        record = run(**options)["compression-only"]
        assert record.status == "ok"
        sizes[image] = {row["stored_tokens"] - 7 for row in record.samples["requests"]}
    # 41 // 2 and one left over; 4 // 2 of the image, and 37 // 2 and one of the text behind it
    assert sizes == {"off": {21}, "random": {2 + 19}}
    three = run(**IMAGES | merged | {"factors": "3", "pipeline_image": "random"})["compression-only"]
    # fewer than two groups of an image stay as they are
    assert {row["stored_tokens"] - 7 for row in three.samples["requests"]} == {4 + 12}
    text = run(**IMAGES | merged | {"factors": "3"})["compression-only"]
    assert {row["stored_tokens"] - 7 for row in text.samples["requests"]} == {13 + 1}


def test_an_image_of_a_file_and_cases_that_cannot_have_one(run: Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((3, 28, 28), dtype=np.float32)
    np.save(tmp_path / "photo.npy", pixels)
    np.save(tmp_path / "small.npy", pixels[:, :14])
    photo = str(tmp_path / "photo.npy")
    record = run(**IMAGES, variants="baseline", pipeline_image=photo)["baseline"]
    assert (record.status, record.case.name) == ("ok", "synthetic-long-image-bs03-baseline")
    assert record.case.workload["image"].startswith("photo.npy@")
    for options, said in (
        (
            {"pipeline_image": str(tmp_path / "small.npy")},
            "small.npy: holds float32 [3, 14, 28], and the model reads [3, 28",
        ),
        (
            {"pipeline_image": "random", "synthetic_context": "4"},
            "4 tokens has no room for an image of 4 tokens and text",
        ),
        ({"pipeline_image": "random", "model": "dummy:tiny"}, "--kv-pipeline-image=random: llama has no vision tower"),
        ({"pipeline_image": photo, "model": "dummy:tiny"}, "photo.npy: llama has no vision tower"),
    ):
        record = run(**(IMAGES | options), variants="baseline")["baseline"]
        assert record.status == "invalid"
        assert said in str(record.reason)
