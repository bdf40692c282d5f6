"""One case under load: warm-ups and timed rounds of the same shape, then the quality of what was served."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.case import Case, digest
from kvsuite.compression import get_policy
from kvsuite.compression.base import ImageSpans
from kvsuite.engines.capabilities import ReadsImages, ServesUnderLoad
from kvsuite.engines.engine import Session
from kvsuite.engines.results import Served, ServeRequest
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.served import preemptions, put_compression, put_served, request_rows, step_columns
from kvsuite.measure.single_request import judge_spread, put_weight_format
from kvsuite.meters.serving_times import Slo, wall_s
from kvsuite.models.images import ImagePixels, image_places, image_spans
from kvsuite.options.paths import expanded
from kvsuite.workloads.serving_requests import ServingRequests

from .capacity import put_case_capacity
from .cases import RANDOM, workload_of
from .options import PipelineOptions
from .quality import put_quality
from .refusals import require_end, require_room


def measure_load(case: Case, session: Session, run: CaseRun) -> None:
    """Measure one case: every warm-up and round serves all requests, each pass with prompts of its own.

    The prompts of a pass follow from the seed and its number alone, so every variant serves the same ones. Quality comes
    first: what it needs beside the case's own runtime is gone before anything is timed.

    Raises
    ------
    CaseInvalid
        If there are no such requests, or the pool cannot hold one.
    """
    own, common, plan = run.options.of(PipelineOptions), run.common, ServingPlan.of(case)
    assert plan is not None
    assert isinstance(session, ServesUnderLoad)  # `PipelineSuite.needs`
    _require_pool(session, plan)
    image = _image(session, own)
    loads = [_requests(run, session, common.seed + index, image) for index in range(common.num_warmup + common.rounds)]
    _put_dataset(run, loads)
    run.found.put("mem_weights_bytes", session.model["weights_bytes"], reason="the engine does not tell them")
    put_weight_format(session, run)
    _warn_of_text(run, session)
    _warn_of_policy(run, session, loads[common.num_warmup])
    run.phase("quality")
    put_quality(
        session, run, requests_of(loads[common.num_warmup]), str(loads[common.num_warmup].facts["prompts_hash"])
    )
    run.phase("decode")
    for index, load in enumerate(loads[: common.num_warmup]):
        run.progress("warm-up", index + 1, common.num_warmup)
        _serve(session, load, own)
    if common.num_warmup == 0:
        run.found.warnings.append("no warm-up: the first round pays for what is made once; raise --kv-num-warmup")
    waiting = iter(loads[common.num_warmup :])
    served: list[Served] = []

    def one_round() -> None:
        served.append(_serve(session, next(waiting), own))
        run.progress("timed rounds", len(served), common.rounds)

    run.rounds(one_round, common.rounds)
    _put_rounds(session, run, served)
    put_case_capacity(session, run, requests_of(loads[common.num_warmup]), served, seed=common.seed + common.num_warmup)


def _image(session: Session, own: PipelineOptions) -> ImagePixels | None:
    """The image of a file that every request has; ``None`` where they have random ones, or none."""
    if own.pipeline_image is None or own.pipeline_image == RANDOM:
        return None
    assert isinstance(session, ReadsImages)  # `PipelineSuite.needs`
    try:
        return session.read_image(str(expanded(own.pipeline_image)), named=f"--kv-pipeline-image={own.pipeline_image}")
    except UserError as error:
        raise CaseInvalid(str(error)) from error


def _warn_of_text(run: CaseRun, session: Session) -> None:
    """Say where a model that reads images is given text alone."""
    if (
        isinstance(session, ReadsImages)
        and not isinstance(session.image_shape, str)
        and "image" not in run.case.workload
    ):
        run.found.warnings.append(
            "the model reads images and its prompts are text; --kv-pipeline-image=random gives each one"
        )


def _warn_of_policy(run: CaseRun, session: Session, load: ServingRequests) -> None:
    """Say where a prompt is so short that the policy is something else than its name says."""
    if run.case.policy is None:
        return
    shortest = min(load.prompts, key=len)
    images: ImageSpans = ()
    if load.images:
        assert isinstance(session, ReadsImages)  # `PipelineSuite.needs`
        images = image_spans(session.image_shape, image_places(session.image_shape, shortest))
    said = get_policy(run.case.policy, **run.case.policy_params).caveat_of_prompt(len(shortest), images)
    if said is not None:
        run.found.warnings.append(f"not what its name says: {said}")


def _put_rounds(session: Session, run: CaseRun, served: list[Served]) -> None:
    found = run.found
    realised = session.partition["realised"]
    sms, unknown = None, "no partition: the device's SMs are shared by everything"
    if realised is not None and "by_share" in realised:
        unknown = "a controller moves the SMs while it runs; the decisions say when"
    elif realised is not None:
        sms = {lane: int(realised[f"{lane}_sms"]) for lane in ("decode", "prompt")}
    put_served(found, served, Slo.parse(str(run.case.params["slo"])), sms=sms, sms_unknown=unknown)
    put_compression(
        found, served, on_cuda=run.case.device.startswith("cuda"), why_not=_why_nothing_is_compressed(run.case)
    )
    judge_spread(run, ("output_tok_s",))
    first = served[0]
    session.effective["served"] = first.counts
    if counters := session.engine_metrics(served):
        found.samples["engine_metrics"] = counters
    found.samples["rounds"] = [
        {
            "wall_s": wall_s(one.requests),
            "preemptions": preemptions(one),
            "outputs_hash": digest(one.outputs or one.texts),
        }
        for one in served
    ]
    # of the first round alone: enough to draw when everything happened
    found.samples["requests"] = request_rows(first)
    found.samples["steps"] = step_columns(first)
    found.samples["decisions"] = first.decisions


def _why_nothing_is_compressed(case: Case) -> str:
    if case.policy is None:
        return "the full cache: there is no compression stage"
    if case.params["factor"] == 1:
        return "factor 1 removes nothing"
    return (
        "no prompt of a round was compressed: the controller chose none, everything of it stays, or outputs ended before all "
        "of its layers were merged"
    )


def requests_of(load: ServingRequests) -> list[ServeRequest]:
    """What an engine is given of a load."""
    images: Sequence[tuple[ImagePixels, ...]] = [(one,) for one in load.images] or [()] * len(load.prompts)
    return [
        ServeRequest(prompt, new_tokens, arrival_s=arrival, images=own)
        for prompt, new_tokens, arrival, own in zip(load.prompts, load.new_tokens, load.arrivals_s, images, strict=True)
    ]


def _serve(session: ServesUnderLoad, load: ServingRequests, own: PipelineOptions) -> Served:
    found = session.serve_under_load(requests_of(load), concurrency=own.concurrency)
    for one, wanted in zip(found.requests, load.new_tokens, strict=True):
        if len(one.token_s) != wanted:
            raise CaseInvalid(f"generated {len(one.token_s)} tokens instead of {wanted}: no timing is comparable")
    return found


def _requests(run: CaseRun, session: Session, seed: int, image: ImagePixels | None) -> ServingRequests:
    own, workload, load = run.options.of(PipelineOptions), run.case.workload, workload_of(run.case)
    try:
        found = run.texts.serving(
            session,
            load,
            seed=seed,
            trace=own.trace_conv,
            dataset_dir=own.dataset_dir,
            corpus=str(workload["corpus"]),
            num_samples=int(workload["num_samples"]),
            image=image,
        )
    except UserError as error:
        # one workload that cannot be made must not end the others
        raise CaseInvalid(str(error)) from error
    # what a trace takes is known once it is read
    require_end(max(found.arrivals_s), load)
    return found


def _put_dataset(run: CaseRun, loads: list[ServingRequests]) -> None:
    """Keep what was served: where the prompts of the first round come from, and a hash of all passes'."""
    facts = loads[run.common.num_warmup].facts
    run.found.dataset = dict(facts) | {"name": str(run.case.workload["workload"])}
    run.found.dataset_revision = digest([load.facts["prompts_hash"] for load in loads])


def _require_pool(session: Session, plan: ServingPlan) -> None:
    if plan.pool_bytes is None:
        return
    # as the runtime counts them: in the case's cache format, beside a block of its own
    # blocks of the plan's size, whatever the engine's own is
    blocks = (
        int(session.effective["num_blocks"]) * int(session.effective.get("block_size", BLOCK_TOKENS)) // BLOCK_TOKENS
    )
    require_room(blocks, plan, option=f"--kv-pool-bytes={plan.pool_bytes}")
