"""A suite: requests that come at the same time, and how unequally they are served."""

from __future__ import annotations

from kvsuite.case import Case
from kvsuite.engines.engine import Session
from kvsuite.engines.results import ServeRequest
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.measurement import Measurement
from kvsuite.meters.timing import RoundTimes
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.resolve import Options
from kvsuite.suites.suite import Suite

from .burst_options import BurstOptions


class BurstSuite(Suite):
    name = "burst"
    option_group = BurstOptions
    headline = ("ttft_s", "ttft_spread_s", "output_tok_s")

    def cases(self, options: Options) -> list[Case]:
        common = options.of(CommonOptions)
        return [
            Case(
                suite=self.name,
                engine="nano" if common.engine == "auto" else common.engine,
                model=common.model,
                name=f"burst{size:02}",
                device=resolve_device(common.device),
                dtype=common.dtype or "float32",
                workload={"prompt_tokens": 32, "max_new_tokens": common.max_new_tokens, "batch": size},
                params={"requests": size},
            )
            for size in options.of(BurstOptions).burst_sizes
        ]

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        size, new_tokens = int(case.params["requests"]), int(case.workload["max_new_tokens"])
        prompts = run.texts.prompts(session, {"prompt_tokens": 32}, count=size, seed=run.common.seed)
        requests = [ServeRequest(prompt, new_tokens) for prompt in prompts]
        clock = session.clock(run.clock(session.device))
        rounds: list[RoundTimes] = []
        run.phase("decode")
        session.serve(requests)
        run.rounds(
            lambda: rounds.append(RoundTimes(session.serve(requests, clock).times, clock.name)), run.common.rounds
        )
        for name in ("ttft_s", "output_tok_s"):
            run.found.put(name, [float(one.metrics()[name] or 0) for one in rounds], clock=clock.name)
        first = [[request.ttft_s for request in one.requests] for one in rounds]
        run.found.put("ttft_spread_s", [max(times) - min(times) for times in first], clock=clock.name)
        return run.found
