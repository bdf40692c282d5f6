"""Suite: everything that belongs to one suite, as one object. Others ask it and know no suite by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.case import Case
from kvsuite.options.common import CommonOptions
from kvsuite.options.option import OptionGroup
from kvsuite.options.resolve import Options
from kvsuite.reporting.aggregate import Row

from .generic import generic_csv, generic_files, generic_table

if TYPE_CHECKING:
    # the half that measures
    from rich.console import RenderableType

    from kvsuite.engines.engine import Session
    from kvsuite.measure.case_run import CaseRun
    from kvsuite.measure.measurement import Measurement

    from .footprint import Footprint


@dataclass(frozen=True)
class Work:
    """What a case computes.

    Parameters
    ----------
    bulk
        Tokens that are forwarded many at a time: prompts, scored windows.
    steps
        Forwards of one token a sequence: decode steps, scoring through a cache.
    """

    bulk: int
    steps: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bulk + other.bulk, self.steps + other.steps)


@dataclass(frozen=True)
class CsvFigures:
    """What was drawn out of CSV files: figures by file name, of how many rows, and what their reader must know."""

    files: Mapping[str, bytes]
    rows: int
    notes: Sequence[str] = ()


class Suite(ABC):
    """One suite. A subclass needs `name`, `cases` and `measure`; the rest has defaults that work for any rows.

    The half that reads rows (`table`, `files`, `figures`, `gather`) imports no engine and no torch, so that a run is redrawn
    without them; what is heavy is imported inside methods.
    """

    #: the name of its marker, its entry point and its rows
    name: ClassVar[str]
    #: its own ``--kv-*`` options; they are registered by the entry-point group ``kvsuite.options``, which loads no suite
    option_group: ClassVar[type[OptionGroup] | None] = None
    #: metrics in the order in which they are looked at; the first four stand in the line of a finished case
    headline: ClassVar[tuple[str, ...]] = ()
    #: place among the suites of a bare ``pytest``; ``None``: it runs only if it is asked for
    bare_run_place: ClassVar[int | None] = None
    #: whether nothing is left of it without trained weights
    is_quality_alone: ClassVar[bool] = False
    #: whether its cases can have policies; where none can, none reads ``--kv-compressor-path``
    has_policies: ClassVar[bool] = True
    #: whether it also measures cases that a test made by hand, under a name that is no suite's
    measures_by_hand: ClassVar[bool] = False

    # before a run

    @abstractmethod
    def cases(self, options: Options) -> list[Case]:
        """Cases in the order of the suite's space.

        Raises
        ------
        UserError
            Naming the option whose value cannot be, or which leaves no case.
        """

    def check(self, options: Options) -> None:  # noqa: B027
        """Refuse what options of this suite name and is not there (a file, a data set); before anything is collected.

        Raises
        ------
        UserError
            Naming the option, the value and the mend.
        """

    def run_name(self, options: Options) -> str:
        """What the folder of a run is named after, if this suite's row is its first."""
        return self.name

    def unread_options(self, options: Options) -> list[str]:
        """Options that a user set although nothing that was selected reads them, as typed: ``--kv-strategies``."""
        return ["--kv-compressor-path"] if "compressor_path" in options.given and not self.has_policies else []

    def cost(self, case: Case, options: Options) -> Work:
        """Count what a case computes, from the case and the options alone, so that every host cuts the same shards."""
        return served_work(case, options)

    def footprint(self, case: Case, options: Options) -> Footprint:
        """Tell what memory a case needs, from its model's configuration alone; by itself no less than weights and cache."""
        from .footprint import weights_and_cache

        return weights_and_cache(case, options)

    # measuring

    def refuse(self, case: Case, options: Options) -> None:  # noqa: B027
        """Refuse before a model is loaded what is known to be impossible.

        Raises
        ------
        CaseInvalid, CaseSkipped
            With the reason.
        """

    def needs(self, case: Case) -> tuple[type, ...]:
        """Capabilities (`kvsuite.engines.capabilities`) that the case cannot do without; of others a reason is kept."""
        return ()

    @abstractmethod
    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        """Measure the case on a session that is prepared for it: fill ``run.found`` and return it.

        What was found before a failure is kept.

        Raises
        ------
        CaseInvalid, CaseSkipped, UserError
            If there is nothing to measure; any other error becomes the status of the case.
        """

    # CSV files of this suite, the original program's among them, without the run

    def draws_csv(self, name: str, header: Sequence[str]) -> bool:
        """Whether a CSV is one that this suite draws, by the file's name or by its columns."""
        return False

    def csv_figures(self, paths: Sequence[Path], kinds: Sequence[str]) -> CsvFigures:
        """Draw such files together, as pictures of these kinds (``"png"``, ``"svg"``).

        Raises
        ------
        UserError
            If one cannot be read, or there is nothing to draw.
        """
        raise NotImplementedError(f"suite {self.name} draws no CSV")

    # after each case, and after a run: rows are of this suite, in the order of its space

    def case_done(self, options: Options, run: Mapping[str, Any], rows: Sequence[Row]) -> None:  # noqa: B027
        """Take note that another case of a run has its row, which is among ``rows``, those so far.

        Raises
        ------
        UserError
            If what is kept beside the run cannot be written; the run goes on, and says so.
        """

    def table(self, run: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType | None:
        """The console table with what its columns mean, as rich draws it; ``None`` for none. `kvsuite.console` has parts."""
        return generic_table(self.name, rows, self.headline)

    def files(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, str]:
        """CSV and JSON files of a run by file name."""
        return generic_files(self.name, generic_csv(run, rows))

    def figures(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, bytes]:
        """Figures of a run by file name; the caller writes them, so that none is written before all are drawn."""
        return {}

    def check_gathered(self, folder: Path, cases: Sequence[Case]) -> None:  # noqa: B027
        """Find out before anything is measured whether rows of ``cases`` can be added to the CSVs that gather runs.

        Raises
        ------
        UserError
            If a file in ``folder`` cannot take them.
        """

    def gather(self, folder: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
        """Add a run's rows to the CSVs in ``folder`` that gather runs; return the files that grew.

        Raises
        ------
        UserError
            If a file there has another header, or cannot be read or written.
        """
        return []


def served_work(case: Case, options: Options) -> Work:
    """Warm-ups, rounds and the memory pass of the requests that a case serves, by its workload."""
    workload = case.workload
    common = options.of(CommonOptions)
    passes = common.num_warmup + common.rounds + 1
    batch, prompt, new = (
        int(workload.get(name) or default)
        for name, default in (("batch", 0), ("prompt_tokens", 0), ("max_new_tokens", 0))
    )
    served = 2 if workload.get("prefix_caching") else 1
    return Work(passes * batch * prompt, passes * new * served)
