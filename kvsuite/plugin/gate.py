"""The comparison as a part of pytest: the base read at the start, every case judged when its report arrives.

Works in the process that writes, so with xdist in the controller, where the reports of all workers pass. A verdict changes the
report before the terminal, the JUnit XML and the exit code see it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite.errors import UserError
from kvsuite.options.comparison import ComparisonOptions
from kvsuite.options.option import option_of
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.record import RUN_SCHEMA
from kvsuite.suites.registry import suite_names, usable_cases

from .comparison_base import Base, bracket
from .stash import REPORTER, is_worker

if TYPE_CHECKING:
    from kvsuite.comparison.compare import Comparison
    from kvsuite.comparison.matching import Matcher
    from kvsuite.comparison.rules import Rules
    from kvsuite.comparison.verdicts import Verdict

FILE = "comparison.json"


def register_gate(config: pytest.Config, options: Options) -> None:
    """Register the gate where a comparison is asked for, by us or by pytest-benchmark; workers measure and do not judge."""
    own = options.of(ComparisonOptions)
    asked = own.compare or own.fail or config.getoption("benchmark_compare", default=None)
    if asked and not options.of(SweepOptions).plan and not is_worker(config):
        base = Base(config, options)
        config.pluginmanager.register(base, "kvsuite-comparison-base")
        config.pluginmanager.register(Gate(config, options, base), "kvsuite-comparison")


def rules_of(options: Options) -> Rules:
    """The rules of ``--kv-fail``; whether their metrics exist is asked when those of the hooks and of the base are known.

    Raises
    ------
    UserError
        If one of them is none.
    """
    from kvsuite.comparison.rules import Rules, parse_rules

    text = options.of(ComparisonOptions).fail
    try:
        return Rules() if text is None else parse_rules(text)
    except ValueError as error:
        raise option_of(ComparisonOptions, "fail").refused(str(text), str(error)) from error


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
        self._matcher: Matcher | None = None
        self._family = 1
        self._matched: dict[str, Any] = {}
        self._rows: dict[str, list[Verdict]] = {}
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
        if self._matcher is not None or self._unprepared is not None:
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
        from kvsuite.comparison.compare import Comparison, gated_times, select
        from kvsuite.comparison.matching import Matcher, cases_of_side
        from kvsuite.comparison.rules import Known, known_metrics

        base = self._base.find(ids)
        if base is None:
            return
        rules = rules_of(self._options)
        hooks = self._config.hook.pytest_kvsuite_metrics(config=self._config)
        more = [(one.name, Known(one.unit, one.better, one.metric_class)) for metrics in hooks for one in metrics]
        suites = {row.suite for run in base.runs for row in run.rows} | set(suite_names())
        rules.check(known_metrics(base, more=more), suites, "--kv-fail")
        cases = cases_of_side(base)
        self._selected = ids
        self._matcher = Matcher(cases, ids)
        self._family = gated_times(select(cases, ids), rules)
        self.result = Comparison(base, base, rules, notes=[])

    # verdicts

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None]:
        """Judge the record that a report carries; a wrapper, so that nobody sees the report before its verdict."""
        payload = getattr(report, "kvsuite", None)
        if payload is not None:
            self._ours = True
            lines: list[str] = []
            if self.result is not None:
                lines = self._judge(payload["record"], payload.get("environment"), payload.get("tokens"))
            elif self._unprepared is not None:
                lines = [str(self._unprepared)]
            if lines:
                self._fail(report, lines)
        return (yield)

    def _judge(self, record: dict[str, Any], environment: Any, tokens: Any) -> list[str]:
        """Lines that make the case fail."""
        from kvsuite.comparison.compare import comparison_notes, fails
        from kvsuite.comparison.judge import Judge, Pair
        from kvsuite.comparison.matching import SideCase
        from kvsuite.comparison.records import RunFacts, row_of
        from kvsuite.comparison.sides import Run, Side

        assert self.result is not None
        assert self._matcher is not None
        result, row = self.result, row_of(record)
        facts = RunFacts(RUN_SCHEMA, "now", environment=environment or {})
        now = Side("now", (Run(facts, (row,), None, {row.id: tokens} if tokens else {}),))
        if row.id not in self._matched:
            # a test that is run again has the same case
            self._matched[row.id] = self._matcher.take(row)
        old = self._matched[row.id]
        if old is None:
            self._rows[row.id] = []
            return [f"{row.id}: new, nothing to compare with; rule new"] if "new" in result.rules.words else []
        verdicts = Judge(result.base, now, result.rules, self._family).case(Pair(old, SideCase(((0, row),))))
        self._rows[row.id] = verdicts
        result.notes += [note for note in comparison_notes(result.base, now) if note not in result.notes]
        lines = [verdict.line for verdict in verdicts if fails(verdict, result.rules)]
        if old.first.id != row.id and "renamed" in result.rules.words:
            lines.append(f"{row.id}: was {old.first.id}; rule renamed")
        return lines

    def _fail(self, report: pytest.TestReport, lines: Sequence[str]) -> None:
        text = self._text(lines)
        if report.outcome == "failed" or hasattr(report, "wasxfail"):
            # it has a reason of its own, which stays the first
            report.sections.append(("kvsuite comparison", text))
            return
        report.outcome = "failed"
        report.longrepr = text

    def _text(self, lines: Sequence[str]) -> str:
        against = [] if self.result is None else [f"compared with {self.result.base.label}"]
        return "\n".join([*(f"kvsuite: {line}" for line in lines), *against])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """After the last test: rows that came without a report, and cases that are missing, become failed reports."""
        done = yield
        if self.result is None or self._config.option.collectonly:
            return done
        rows = self._reporter_rows()
        for record in rows:
            if record["id"] not in self._rows:
                self._send(record["id"], self._judge(record, self._environment(), None))
        assert self._matcher is not None
        self.result.missing = [
            case_id
            for (_, case_id), case in self._matcher.left.items()
            if self._is_missing(case_id, case.first.suite, rows)
        ]
        if "missing" in self.result.rules.words:
            for case_id in self.result.missing:
                self._send(case_id, [f"{case_id}: missing, the base has it; rule missing"])
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
        from kvsuite.comparison.compare import case_names
        from kvsuite.comparison.sides import Side
        from kvsuite.store.files import write_atomic

        reporter = self._config.stash.get(REPORTER, None)
        if self.result is None or not self._ours or self._config.option.collectonly:
            return
        result = self.result
        result.rows = [row for rows in self._rows.values() for row in rows]
        result.new = [case for case, old in self._matched.items() if old is None]
        result.renamed = [
            (old.first.id, case) for case, old in self._matched.items() if old is not None and old.first.id != case
        ]
        compared = [old.first for old in self._matched.values() if old is not None]
        result.compared = len(compared)
        if compared:
            result.notes += result.rules.about_nothing(case_names(row) for row in compared)
        else:
            self.problem = (
                f"nothing was compared: {result.base.label} has no case of this run; another model, dtype, device kind or "
                "workload is another case"
            )
            if result.rules and session.exitstatus == 0:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if reporter is None or reporter.folder is None:
            return
        name = reporter.folder.name
        result.now = Side(name, ())
        document = result.to_dict()
        document["now"]["run"] = str(reporter.run.get("run_id", name))
        try:
            write_atomic(reporter.folder / FILE, json.dumps(document, indent=1, allow_nan=False) + "\n")
        except UserError as error:
            self.problem = str(error)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table."""
        if self.result is not None and self._rows:
            from kvsuite.comparison.tables import comparison_text

            writer = self._config.get_terminal_writer()
            terminalreporter.section("kvsuite comparison")
            text = comparison_text(
                self.result, width=writer.fullwidth if writer.hasmarkup else 200, color=writer.hasmarkup,
                everything=self._config.getoption("verbose") > 0, more=f"{FILE} and -v show them",
            )  # fmt: skip
            terminalreporter.write(text)
        for problem in filter(None, (self._base.problem, self.problem)):
            terminalreporter.write_line(f"warning: {problem}", yellow=True)
