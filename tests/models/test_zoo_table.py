from __future__ import annotations

from zoo_table import lines, parts


def test_the_page_has_the_zoo_as_it_is() -> None:
    """Out of step? ``python tests/models/zoo_table.py`` writes the table anew."""
    _, table, _ = parts()
    assert table.splitlines(keepends=True) == lines()
