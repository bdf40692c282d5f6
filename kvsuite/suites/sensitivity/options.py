"""Options of the sensitivity suite."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated

from kvsuite.options.numbers import decimal
from kvsuite.options.option import Option, OptionGroup, list_of, text, whole_number


def _budget(typed: str) -> tuple[float, str]:
    share = typed.strip().endswith("%")
    number = decimal(typed.strip().removesuffix("%"))
    if not 0 < number <= 100:
        raise ValueError("is no number of bits (6.5) and no share of the model's own numbers (40%)")
    return number, "share" if share else "bits"


class SensitivityOptions(OptionGroup, frozen=True, kw_only=True):
    """Which formats are tried in each layer, on how long a text, and what they are mixed for."""

    # fmt: off
    sensitivity: Annotated[tuple[str, ...], Option(
        list_of(text), "int4",
        "Cache formats that the keys, and the values, of each layer are stored in alone, comma separated, keys:values where "
        "they differ, e.g. --kv-sensitivity=int4_channel:int4. Suite sensitivity.",
        example="int4",
    )]
    sensitivity_base: Annotated[str, Option(
        text, "int8",
        "Cache format of what a mixed assignment does not lower, e.g. --kv-sensitivity-base=auto.",
        example="int8",
    )]
    sensitivity_budget: Annotated[tuple[tuple[float, str], ...], Option(
        list_of(_budget), "7.5,7,6,5",
        "Sizes of mixed assignments, comma separated: bits an element, scales included, or a share of the cache in the "
        "model's dtype, e.g. --kv-sensitivity-budget=6.5,40%.",
    )]
    sensitivity_tokens: Annotated[int, Option(
        whole_number(3), "512",
        "Tokens of each text that the sensitivity suite scores, in one forward pass a case.",
    )]
    # fmt: on
