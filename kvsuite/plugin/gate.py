"""The comparison as a part of pytest: the base read at the start, every case judged when its report arrives.

Works in the process that writes, so with xdist in the controller, where the reports of all workers pass. A verdict changes the
report before the terminal, the JUnit XML and the exit code see it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible
from kvsuite.options.common import CommonOptions
from kvsuite.options.comparison import ComparisonOptions
from kvsuite.options.option import option_of
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.record import RUN_SCHEMA
from kvsuite.suites.registry import suite_names, usable_cases

from .reporter import REPORTER
from .stash import is_worker

if TYPE_CHECKING:
    from kvsuite.comparison.compare import Comparison, ComparisonBuilder
    from kvsuite.comparison.rules import Known, Rules
    from kvsuite.comparison.sides import Side

FILE = "comparison.json"


def register_gate(config: pytest.Config, options: Options) -> None:
    """Register the gate where a comparison is asked for, by us or by pytest-benchmark; workers measure and do not judge."""
    own = options.of(ComparisonOptions)
    asked = own.compare or own.fail or config.getoption("benchmark_compare", default=None)
    if asked and not options.of(SweepOptions).plan and not is_worker(config):
        base = Base(config, options)
        config.pluginmanager.register(base, "kvsuite-comparison-base")
        config.pluginmanager.register(Gate(config, options, base), "kvsuite-comparison")


def rules_of(options: Options, known: Mapping[str, Known] | None = None) -> Rules:
    """The rules of ``--kv-fail``.

    Parameters
    ----------
    options
        Resolved options.
    known
        The metrics, ``None`` before those of the hooks and of the base are known: then nobody asks whether they exist.

    Raises
    ------
    UserError
        If one of them is none.
    """
    from kvsuite.comparison.rules import Rules, parse_rules

    text = options.of(ComparisonOptions).fail
    try:
        return Rules() if text is None else parse_rules(text, known)
    except ValueError as error:
        raise option_of(ComparisonOptions, "fail").refused(str(text), str(error)) from error


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


class Gate:
    """Compares the records of this run with a base.

    Parameters
    ----------
    config
        pytest's configuration.
    options
        Resolved options.
    base
        Finds what it is compared with.
    """

    def __init__(self, config: pytest.Config, options: Options, base: Base) -> None:
        self._config, self._options, self._base = config, options, base
        self._selected: frozenset[str] = frozenset()
        self._deselected: set[str] = set()
        # whether this run has cases of ours, and why they cannot be compared
        self._ours = False
        self._unprepared: UserError | None = None
        self._builder: ComparisonBuilder | None = None
        self._judged: set[str] = set()
        self._missing: list[str] = []
        self.result: Comparison | None = None
        self.problem: str | None = None

    # what is compared with what

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """A case of the base that was deselected is not missing."""
        self._deselected |= {item.nodeid for item in items}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """The cases are known: read the base."""
        ours = [item.nodeid for item in session.items if "kv_run" in getattr(item, "fixturenames", ())]
        option = self._config.option
        if ours and not option.collectonly and not option.setuponly:
            self._expect(frozenset(ours))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """As `pytest_collection_finish`: the controller of xdist collects nothing itself, and sees ids alone."""
        if self._builder is not None or self._unprepared is not None:
            return
        known = self._space_ids(suite_names())
        if any(bracket(node_id) in known for node_id in ids):
            self._expect(frozenset(ids))
            return
        try:
            # they may be cases made by hand, or tests of something else that no base has to know
            self._prepare(frozenset(ids))
        except UserError as error:
            self._unprepared = error

    def _space_ids(self, suites: Any) -> set[str]:
        return {case.id for suite in suites for case in usable_cases(suite, self._options)}

    def _expect(self, ids: frozenset[str]) -> None:
        self._ours = True
        try:
            self._prepare(ids)
        except UserError as error:
            raise pytest.UsageError(f"kvsuite: {error}") from error

    def _prepare(self, ids: frozenset[str]) -> None:
        from kvsuite.comparison.compare import ComparisonBuilder
        from kvsuite.comparison.rules import known_metrics

        base = self._base.find(ids)
        if base is None:
            return
        hooks = self._config.hook.pytest_kvsuite_metrics(config=self._config)
        known = known_metrics(base, more=[metric for metrics in hooks for metric in metrics])
        rules = rules_of(self._options, known)
        suites = {row.suite for run in base.runs for row in run.rows} | set(suite_names())
        rules.check(known, suites, "--kv-fail")
        self._selected = ids
        self._builder = ComparisonBuilder(base, rules, ids)

    # verdicts

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None]:
        """Judge the record that a report carries; a wrapper, so that nobody sees the report before its verdict."""
        payload = getattr(report, "kvsuite", None)
        if payload is not None:
            self._ours = True
            lines: list[str] = []
            if self._builder is not None:
                lines = self._judge(self._builder, payload["record"], payload.get("environment"), payload.get("tokens"))
            elif self._unprepared is not None:
                lines = [str(self._unprepared)]
            if lines:
                self._fail(report, lines)
        return (yield)

    def _judge(self, builder: ComparisonBuilder, record: dict[str, Any], environment: Any, tokens: Any) -> list[str]:
        """Lines that make the case fail."""
        from kvsuite.comparison.matching import SideCase
        from kvsuite.comparison.records import RunFacts, row_of
        from kvsuite.comparison.sides import Run, Side

        row = row_of(record)
        facts = RunFacts(RUN_SCHEMA, "now", environment=environment or {})
        now = Side("now", (Run(facts, (row,), None, {row.id: tokens} if tokens else {}),))
        self._judged.add(row.id)
        # by its id alone: a test that is run again has the same case
        return builder.add(row.id, now, SideCase(((0, row),)))

    def _fail(self, report: pytest.TestReport, lines: Sequence[str]) -> None:
        text = self._text(lines)
        if report.outcome == "failed" or hasattr(report, "wasxfail"):
            # it has a reason of its own, which stays the first
            report.sections.append(("kvsuite comparison", text))
            return
        report.outcome = "failed"
        report.longrepr = text

    def _text(self, lines: Sequence[str]) -> str:
        against = [] if self._builder is None else [f"compared with {self._builder.base.label}"]
        return "\n".join([*(f"kvsuite: {line}" for line in lines), *against])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """After the last test: rows that came without a report, and cases that are missing, become failed reports."""
        from kvsuite.comparison.compare import missing_lines

        done = yield
        builder = self._builder
        if builder is None or self._config.option.collectonly:
            return done
        rows = self._reporter_rows()
        for record in rows:
            if record["id"] not in self._judged:
                self._send(record["id"], self._judge(builder, record, self._environment(), None))
        self._missing = [row.id for row in builder.left if self._is_missing(row.id, row.suite, rows)]
        for case_id in self._missing:
            self._send(case_id, missing_lines(case_id, builder.rules))
        return done

    def _is_missing(self, case_id: str, suite: str, rows: Sequence[dict[str, Any]]) -> bool:
        if case_id in self._selected:
            return True
        # only the cases of a space are known to be all there: of others, what is not selected may have been left out
        if case_id in self._deselected or suite not in suite_names() or suite not in {row["suite"] for row in rows}:
            return False
        if self._config.getoption("dist", default="no") != "no" and (
            self._config.option.keyword or self._config.option.markexpr
        ):
            # the controller of xdist is not told what its workers deselect
            return False
        return bracket(case_id) not in self._space_ids([suite])

    def _send(self, case_id: str, lines: Sequence[str]) -> None:
        """Report a failure of a case that has no test of its own in this run."""
        if not lines:
            return
        path = case_id.partition("::")[0]
        report = pytest.TestReport(
            nodeid=case_id, location=(path, None, case_id.rpartition("::")[2]), keywords={}, outcome="failed",
            longrepr=self._text(lines), when="call",
        )  # fmt: skip
        self._config.hook.pytest_runtest_logreport(report=report)

    def _reporter_rows(self) -> Sequence[dict[str, Any]]:
        reporter = self._config.stash.get(REPORTER, None)
        return [] if reporter is None else reporter.rows

    def _environment(self) -> Any:
        reporter = self._config.stash.get(REPORTER, None)
        return {} if reporter is None else reporter.run.get("environment")

    # what is written and shown

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write ``comparison.json`` into the run's folder, before what is derived from it."""
        from kvsuite.comparison.sides import Side
        from kvsuite.store.files import write_atomic

        reporter = self._config.stash.get(REPORTER, None)
        builder = self._builder
        if builder is None or not self._ours or self._config.option.collectonly:
            return
        folder = None if reporter is None else reporter.folder
        result = self.result = builder.result(Side("now" if folder is None else folder.name, ()), self._missing)
        if not result.compared:
            self.problem = (
                f"nothing was compared: {result.base.label} has no case of this run; another model, dtype, device kind or "
                "workload is another case"
            )
            if result.rules and session.exitstatus == 0:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if reporter is None or folder is None:
            return
        document = result.to_dict()
        document["now"]["run"] = str(reporter.run.get("run_id", folder.name))
        try:
            write_atomic(folder / FILE, json.dumps(document, indent=1, allow_nan=False) + "\n")
        except UserError as error:
            self.problem = str(error)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table."""
        if self.result is not None and self._judged:
            from kvsuite.comparison.tables import comparison_text
            from kvsuite.console import console_width

            writer = self._config.get_terminal_writer()
            terminalreporter.section("kvsuite comparison")
            text = comparison_text(
                self.result, width=console_width(writer.hasmarkup), color=writer.hasmarkup,
                everything=self._config.getoption("verbose") > 0, more=f"{FILE} and -v show them",
            )  # fmt: skip
            terminalreporter.write(text)
        for problem in filter(None, (self._base.problem, self.problem)):
            terminalreporter.write_line(visible(f"warning: {problem}"), yellow=True)


def bracket(node_id: str) -> str:
    """The case's part of a pytest id, the whole id without one."""
    return node_id.rpartition("[")[2].removesuffix("]")
