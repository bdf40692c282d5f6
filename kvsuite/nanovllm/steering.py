"""When the controller is asked, what it is fed, the log of its decisions, and replaying one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from kvsuite.errors import CaseInvalid, UserError

from .controller import (
    ControllerInputs,
    ControllerSettings,
    Decision,
    PhaseInputs,
    choose_phase,
    decide,
    inert_axes,
)

T = TypeVar("T")
SCHEMA = "kvsuite.decisions/1"
_ALPHA = 0.2
#: steps of a kind of which one is timed
SAMPLED = 4
#: inputs that the requests decide, not the machine: a replayed run has to have the same ones
_OF_REQUESTS = ("counter", "batch", "seq_len", "expected_output")


class Meter:
    """An exponentially weighted mean: the first sample, then 0.2 of each new one."""

    def __init__(self) -> None:
        self.mean: float | None = None
        self.samples = 0

    def add(self, value: float) -> None:
        """Take a sample. One that is not positive is a clock that failed, not a fast step: it is left out."""
        if not 0 < value < float("inf"):
            return
        self.mean = value if self.mean is None else self.mean + _ALPHA * (value - self.mean)
        self.samples += 1


class Controller:
    """Asks for a decision at the first step with prompts and at every fourth, keeps it in between, and logs it.

    Parameters
    ----------
    settings
        What stays the same.
    replay
        A log to take the decisions from (`read_log`).
    now
        Seconds: of the log, and of steps where no device has a clock of its own.

    Raises
    ------
    CaseInvalid
        If the log was made with other settings, or says what its own inputs do not.
    """

    def __init__(
        self,
        settings: ControllerSettings,
        *,
        replay: Sequence[Mapping[str, Any]] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._log = replay
        self._replay = None if replay is None else _Replay(replay, settings)
        # how fast the memory was is a fact of the run that was recorded
        self.settings = settings = settings if self._replay is None else self._replay.settings
        self.prefill, self.decode, self.compress, self.decode_tokens = Meter(), Meter(), Meter(), Meter()
        #: the decision in force, ``None`` before the first
        self.decision: Decision | None = None
        #: entries as JSON: the settings, then each decision and each choice of a phase that was one
        self.log: list[dict[str, Any]] = [{"schema": SCHEMA, "settings": asdict(settings)}]
        self.inert = inert_axes(settings)
        self.now = now
        self._started = now()
        self._counter, self._steps = 0, [0, 0]
        self._entry: dict[str, Any] = {}
        self._slot = self._decoded = 0

    def renewed(self) -> Controller:
        """One like this at the beginning of a run, with the same log to replay."""
        return Controller(self.settings, replay=self._log, now=self.now)

    def next_step_is_sampled(self, *, decode_only: bool) -> bool:
        """Count a step, and say whether it is one of the fourth of its kind, which are timed.

        The original counts steps of both kinds together: where outputs have a multiple of four tokens it never times a prompt.
        """
        self._steps[decode_only] += 1
        return self._steps[decode_only] % SAMPLED == 0

    def prompts(self, *, batch: int, seq_len: int, expected_output: float, pending: int) -> tuple[Decision, bool]:
        """The decision for a step with prompts, and whether it is a new one.

        Parameters
        ----------
        batch, seq_len, expected_output, pending
            See `ControllerInputs`.

        Raises
        ------
        CaseInvalid
            If a replayed log has another step here, or none.
        """
        self._counter += 1
        last = self.decision
        if last is not None and self._counter % self.settings.interval:
            return last, False
        inputs = ControllerInputs(
            counter=self._counter,
            batch=batch,
            seq_len=seq_len,
            expected_output=expected_output,
            pending=pending,
            sm_ratio=self.settings.first_ratio if last is None else last.sm_ratio,
            streams=self.settings.streams if last is None else last.compression_streams,
            layers_per_step=self.settings.layers_per_step if last is None else last.decode_layers_per_step,
            prefill_s=self.prefill.mean,
            decode_s=self.decode.mean,
            compress_s=self.compress.mean,
            compress_samples=self.compress.samples,
            decode_tokens=self.decode_tokens.mean,
        )
        if self._replay is not None:
            inputs = self._replay.inputs_of(inputs)
        self.decision = decide(self.settings, inputs)
        self._entry = {
            "counter": self._counter,
            "time_s": self.now() - self._started,
            "inputs": asdict(inputs),
            "decision": self.decision.to_dict(),
            "applied": None,
        }
        self.log.append(self._entry)
        return self.decision, True

    def applied(self, what: Mapping[str, Any]) -> None:
        """Note what really came of the last decision."""
        self._entry["applied"] = dict(what)

    def phase(self, *, waiting: int, running: int) -> str:
        """``prefill`` or ``decode`` for the next step (rule 7); logged where there was something to choose."""
        inputs = PhaseInputs(
            waiting=waiting,
            running=running,
            pipeline="none" if self.decision is None else self.decision.pipeline,
            slot=self._slot,
            decoded=self._decoded,
            prefill_s=self.prefill.mean,
            decode_s=self.decode.mean,
        )
        is_choice = self.settings.dual and waiting and running and inputs.pipeline == "decode"
        if is_choice and self._replay is not None:
            inputs = self._replay.phase_of(inputs)
        chosen, reason = choose_phase(self.settings, inputs)
        if is_choice:
            time_s = self.now() - self._started
            self.log.append({"time_s": time_s, "inputs": asdict(inputs), "phase": chosen, "reason": reason})
        self._slot, self._decoded = self._slot + 1, self._decoded + (chosen == "decode")
        if self._slot == self.settings.dual_interval:
            self._slot = self._decoded = 0
        return chosen


class _Replay:
    """Inputs of a log's decisions in turn. The log has to be of this case, and to say what its inputs give.

    Raises
    ------
    CaseInvalid
        If it is no log, of another case, or was changed.
    """

    def __init__(self, log: Sequence[Mapping[str, Any]], settings: ControllerSettings) -> None:
        try:
            head, *entries = log
            if head["schema"] != SCHEMA:
                raise CaseInvalid(f"replayed decisions: schema {head['schema']}; {SCHEMA} is wanted")
            recorded = dict(head["settings"])
            self._decisions = [ControllerInputs(**entry["inputs"]) for entry in entries if "phase" not in entry]
            self._phases = [PhaseInputs(**entry["inputs"]) for entry in entries if "phase" in entry]
            said = [Decision.of(entry["decision"]) for entry in entries if "phase" not in entry]
            phases = [entry["phase"] for entry in entries if "phase" in entry]
        except (KeyError, TypeError, ValueError) as error:
            raise CaseInvalid(f"replayed decisions: no log of decisions: {type(error).__name__}: {error}") from None
        own = asdict(settings) | {name: recorded.get(name) for name in ("bandwidth", "bandwidth_source")}
        other = sorted(name for name in own.keys() | recorded.keys() if own.get(name) != recorded.get(name))
        if other:
            told = ", ".join(f"{name} {recorded.get(name)} there and {own.get(name)} here" for name in other)
            raise CaseInvalid(f"replayed decisions: the log is of another case: {told}")
        self.settings = ControllerSettings(**recorded)
        try:
            given = [decide(self.settings, inputs) for inputs in self._decisions]
            chosen = [choose_phase(self.settings, inputs)[0] for inputs in self._phases]
        except (TypeError, ArithmeticError, ValueError) as error:
            raise CaseInvalid(f"replayed decisions: inputs that cannot be: {error}") from None
        if given != said or chosen != phases:
            raise CaseInvalid("replayed decisions: the log does not say what its inputs give; it was changed")

    def inputs_of(self, now: ControllerInputs) -> ControllerInputs:
        """The recorded inputs of a decision."""
        return _next(self._decisions, now, _OF_REQUESTS, f"counter {now.counter}")

    def phase_of(self, now: PhaseInputs) -> PhaseInputs:
        """The recorded inputs of a choice between prompts and decoding."""
        return _next(self._phases, now, ("waiting", "running", "slot", "decoded"), "a choice of prompts or decoding")


def _next(rest: list[T], now: T, of_requests: Sequence[str], where: str) -> T:
    if not rest:
        raise CaseInvalid(f"replayed decisions: the log ends before {where}; it is of a shorter run")
    recorded = rest.pop(0)
    for name in of_requests:
        there, here = getattr(recorded, name), getattr(now, name)
        if there != here:
            raise CaseInvalid(
                f"replayed decisions: at {where} {name} is {here:g}, and {there:g} in the log: it is of other requests, "
                "or of arrivals that the clock batched otherwise"
            )
    return recorded


def read_logs(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Logs by case id of a file of ``--kv-replay-decisions``; a log that stands alone has the id ``*``.

    Raises
    ------
    UserError
        If it cannot be read, or is something else.
    """
    named = f"--kv-replay-decisions={path}"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{named}: {error.strerror or error}; name a file of decisions that a run wrote") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named}: not JSON ({error}); name a file of decisions that a run wrote") from None
    logs = {"*": document} if isinstance(document, list) else document
    if not isinstance(logs, dict) or not logs or not all(_is_log(log) for log in logs.values()):
        raise UserError(
            f"{named}: neither a log of decisions nor an object of them by case id; give one that a run wrote"
        )
    return logs


def log_for(logs: Mapping[str, list[dict[str, Any]]], case_id: str) -> list[dict[str, Any]]:
    """The log of a case.

    Raises
    ------
    CaseInvalid
        If the file has none for it.
    """
    found = logs.get(case_id, logs.get("*"))
    if found is None:
        raise CaseInvalid(
            f"--kv-replay-decisions: the file has no decisions of {case_id}, only of {', '.join(sorted(logs))}"
        )
    return found


def _is_log(log: object) -> bool:
    return isinstance(log, list) and bool(log) and all(isinstance(entry, dict) for entry in log) and "schema" in log[0]
