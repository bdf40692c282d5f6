"""A resolved value by the name of its field, for tests that go through all options."""

from __future__ import annotations

from typing import Any

from kvsuite.options.groups import option_groups
from kvsuite.options.resolve import Options


def value_of(options: Options, field: str) -> Any:
    (group,) = [group for group in option_groups() if field in group.__struct_fields__]
    return getattr(options.of(group), field)
