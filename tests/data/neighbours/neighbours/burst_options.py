"""The suite's options: this module loads nothing but what an option is."""

from typing import Annotated

from kvsuite.options.option import Option, OptionGroup, list_of, whole_number


class BurstOptions(OptionGroup, frozen=True, kw_only=True):
    """How many requests come at once."""

    burst_sizes: Annotated[
        tuple[int, ...],
        Option(list_of(whole_number(1)), "1,2", "Requests that come at once, e.g. --kv-burst-sizes=1,4."),
    ]
