"""What a run is compared with: an earlier run, or the records in a file of pytest-benchmark's own storage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.comparison import ComparisonOptions
from kvsuite.options.resolve import Options

from .stash import REPORTER

if TYPE_CHECKING:
    from kvsuite.comparison.sides import Side


class Base:
    """Finds the base of a comparison; a plugin, because pytest-benchmark hands over what its storage found.

    Parameters
    ----------
    config
        pytest's configuration.
    options
        Resolved options.

    Raises
    ------
    UserError
        If ``--kv-compare`` names what cannot be read.
    """

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self._config = config
        self._options = options.of(ComparisonOptions)
        self._report_dir = Path(options.of(CommonOptions).report_dir)
        self._sections: list[dict[str, Any]] = []
        self._saved_without_records = False
        self._given: Side | None = None
        #: what a reader must know if there is no base
        self.problem: str | None = None
        compare = self._options.compare
        if compare not in (None, "latest"):
            from kvsuite.comparison.sides import read_side

            self._given = read_side(compare, option="--kv-compare")

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_compare_machine_info(self, compared_benchmark: dict[str, Any]) -> None:
        """Keep the records of a file that pytest-benchmark's own storage found for ``--benchmark-compare``."""
        if "kvsuite" in compared_benchmark:
            self._sections.append(compared_benchmark["kvsuite"])
        else:
            self._saved_without_records = True

    def find(self, ids: frozenset[str]) -> Side | None:
        """The base for a run of these cases, ``None`` if none is asked for.

        Raises
        ------
        UserError
            If there is none although one is asked for, naming the option and the mend.
        """
        from kvsuite.comparison.records import section_of
        from kvsuite.comparison.sides import latest_run, side_of_section

        saved = self._config.getoption("benchmark_compare", default=None)
        if saved and self._config.getoption("dist", default="no") != "no":
            raise UserError(
                "--benchmark-compare: pytest-benchmark switches itself off under xdist (-n), so nothing would be compared; "
                "use --kv-compare=latest, or leave out -n"
            )
        if self._options.compare is not None:
            brackets = frozenset(bracket(node_id) for node_id in ids)
            # a resumed run goes on in its own folder, which is no base
            going_on = self._config.stash[REPORTER].folder
            return self._given or latest_run(self._report_dir, option="--kv-compare", brackets=brackets, but=going_on)
        if self._sections:
            section = section_of(self._sections[-1], f"--benchmark-compare={saved}")
            return side_of_section(section)
        if saved and self._saved_without_records:
            self.problem = "--benchmark-compare: that file holds no records of kvsuite, so only its times are compared"
        if self._config.getoption("kv_fail", default=None):
            raise UserError(
                f"--kv-fail={self._options.fail}: there is nothing to compare with; add --kv-compare=latest (or a path) or "
                "--benchmark-compare, after a run that saved records"
            )
        return None


def bracket(node_id: str) -> str:
    """The case's part of a pytest id, the whole id without one."""
    return node_id.rpartition("[")[2].removesuffix("]")
