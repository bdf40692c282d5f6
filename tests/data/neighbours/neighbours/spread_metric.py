"""A metric: how unequal the requests of a burst are served."""

from kvsuite.metrics import Metric

METRICS = (
    Metric(
        "ttft_spread_s",
        unit="s",
        better="lower",
        metric_class="timed",
        formula="last first token - first first token, of requests that came at the same time",
        title="TTFT spread",
    ),
)
