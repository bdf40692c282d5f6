"""Two runs, metric by metric: what became better or worse, what is noise, which rule is broken."""

from .compare import Comparison, compare
from .rules import Rules, default_rules, known_metrics, parse_rules
from .sides import Side, latest_run, read_side

__all__ = [
    "Comparison",
    "Rules",
    "Side",
    "compare",
    "default_rules",
    "known_metrics",
    "latest_run",
    "parse_rules",
    "read_side",
]
