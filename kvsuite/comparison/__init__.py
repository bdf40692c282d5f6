"""Two runs, metric by metric: what became better or worse, what is noise, which rule is broken."""

from .compare import Comparison, compare
from .rules import DEFAULT_RULES, Rules, known_metrics, parse_rules
from .sides import Side, latest_run, read_side

__all__ = [
    "DEFAULT_RULES",
    "Comparison",
    "Rules",
    "Side",
    "compare",
    "known_metrics",
    "latest_run",
    "parse_rules",
    "read_side",
]
