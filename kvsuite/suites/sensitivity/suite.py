"""The sensitivity suite: which layer's keys and values can do with fewer bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.case import Case
from kvsuite.console import stacked
from kvsuite.errors import CaseSkipped
from kvsuite.options.resolve import Options
from kvsuite.reporting.aggregate import Row
from kvsuite.suites.suite import Suite, Work

from .cases import sensitivity_cases
from .options import SensitivityOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvsuite.engines.engine import Session
    from kvsuite.measure.case_run import CaseRun
    from kvsuite.measure.measurement import Measurement


class SensitivitySuite(Suite):
    """Each layer's keys and values alone in few bits, mixed assignments, and uniform formats beside them."""

    name = "sensitivity"
    has_policies = False
    headline = ("kld", "same_top1", "kv_bits", "nll_difference", "perplexity", "kv_bytes_exact")
    is_quality_alone = True
    option_group = SensitivityOptions

    def cases(self, options: Options) -> list[Case]:
        return sensitivity_cases(options)

    def cost(self, case: Case, options: Options) -> Work:
        scored = int(case.workload["max_tokens"]) * int(case.workload["num_samples"])
        # the first case of a model scores the full cache as well; a mixed assignment builds on the layers' cases
        return Work(scored, 0)

    def refuse(self, case: Case, options: Options) -> None:
        if case.model.startswith("dummy:"):
            raise CaseSkipped(f"--kv-model={case.model}: random weights say nothing about layers; name a real model")

    def needs(self, case: Case) -> tuple[type, ...]:
        from kvsuite.engines.capabilities import ScoresInOnePass

        return (ScoresInOnePass,)

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        from .measure import measure_sensitivity

        measure_sensitivity(case, session, run)
        return run.found

    def table(self, run: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType:
        from .table import LEGEND, sensitivity_table

        return stacked([sensitivity_table(rows)], LEGEND)

    def files(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, str]:
        assignments = {
            f"{row['case']['name']}.json": json.dumps(row["samples"]["assignment"], indent=1) + "\n"
            for row in rows
            if row["samples"].get("assignment")
        }
        return {**super().files(run, rows), **assignments}

    def figures(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, bytes]:
        from .figure import render_sensitivity

        return render_sensitivity(run, rows)
