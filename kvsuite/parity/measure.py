"""Engines one after the other on one model: losses and divergence of the same tokens, bytes of the cache, times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from kvsuite.case import Case, digest
from kvsuite.engines.capabilities import GivesLogits, ScoresWindows, lacking
from kvsuite.engines.engine import Engine, EngineSettings, Session
from kvsuite.engines.registry import get_engine
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.foreign_text import MESSAGE_LIMIT, visible
from kvsuite.meters.clock import clock_for
from kvsuite.meters.divergence import summarise_divergence
from kvsuite.meters.quality import paired_ratio, perplexity
from kvsuite.meters.reference_rows import ReferenceRows, RowComparison
from kvsuite.meters.timing import RoundTimes
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE, dtype_of
from kvsuite.workloads.texts import TextSource
from kvsuite.workloads.windows import Window

from .engine_result import REFERENCE, EngineResult

#: the protocol of all engines that hand out logits: the prompt at once, then token by token through the cache
_PROTOCOL = "prefix-continuation"
_NO_LOGITS = "it hands out no logits"


@dataclass
class Parity:
    """The work that every engine is given.

    Parameters
    ----------
    options
        Model, device, dtype, corpus, rounds, prompt and output lengths; those of engines beside them.
    text_tokens
        Tokens of the text behind its prompt; all of them but the first are scored.
    say
        Told what is going on.
    """

    options: Options
    text_tokens: int
    say: Callable[[str], None] = lambda line: None
    tokens: list[int] = field(default_factory=list)
    _prompts: list[list[int]] = field(default_factory=list)
    _rows: ReferenceRows = field(default_factory=ReferenceRows)
    _nll: list[float] = field(default_factory=list)

    @property
    def _common(self) -> CommonOptions:
        return self.options.of(CommonOptions)

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return self.text_tokens - 1

    @property
    def text_hash(self) -> str:
        """Of the tokens."""
        return digest(self.tokens)

    def run(self, engines: Sequence[str]) -> list[EngineResult]:
        """Measure the reference, then the others in their order.

        Raises
        ------
        UserError
            If an engine is unknown, or the reference cannot be had: there is nothing to compare with then.
        """
        if self._common.model.startswith("dummy:"):
            raise UserError(f"--model={self._common.model}: random weights have no perplexity; name a real model")
        known = {name: get_engine(name, self.options) for name in (REFERENCE, *engines)}
        first = self._measured(REFERENCE, known[REFERENCE])
        if first.state != "ok":
            raise UserError(f"--engines: the reference {REFERENCE} cannot be measured: {first.reason}")
        return [first, *(self._measured(name, engine) for name, engine in known.items() if name != REFERENCE)]

    def _measured(self, name: str, engine: Engine) -> EngineResult:
        result = EngineResult(name)
        self.say(f"{name}: loading")
        try:
            self._measure(engine, result)
        except CaseSkipped as skip:
            result.state, result.reason = "missing", str(skip)
        except (CaseInvalid, UserError) as refused:
            if name == REFERENCE and isinstance(refused, UserError):
                raise
            result.state, result.reason = "invalid", str(refused)
        except Exception as error:  # engines are others' too, and the next one may work
            result.state, result.reason = "error", visible(f"{type(error).__name__}: {error}", MESSAGE_LIMIT)
        return result

    def _measure(self, engine: Engine, result: EngineResult) -> None:
        case = self._case(result.engine)
        if reason := engine.unavailable(case.device):
            raise CaseSkipped(reason)
        engine.refuse(case)
        result.versions = engine.version()
        session = engine.load(case, EngineSettings.of(self.options))
        try:
            session.prepare(case)
            if not self.tokens:
                self._take_texts(session, case)
            result.dtype = session.dtype_name
            result.bound = engine.perplexity_bounds.get(session.dtype_name)
            self.say(f"{result.engine}: {self.scored} tokens are scored")
            self._score(session, result)
            self.say(f"{result.engine}: {self._common.rounds} timed requests")
            self._speed(session, result)
        finally:
            session.close()

    def _case(self, engine: str) -> Case:
        common = self._common
        device = resolve_device(common.device)
        return Case(
            suite="parity",
            engine=engine,
            model=common.model,
            name="parity",
            device=device,
            dtype=dtype_of(self.options, device, NONE),
            workload={
                "protocol": _PROTOCOL,
                "prompt_tokens": common.prompt_tokens,
                "max_tokens": self.text_tokens,
                # of the one window in which engines without logits score the text
                "max_length": common.prompt_tokens + self.text_tokens,
                "max_new_tokens": common.max_new_tokens,
                "batch": 1,
                "corpus": common.corpus,
                "num_samples": 1,
            },
        )

    def _take_texts(self, session: Session, case: Case) -> None:
        """Text and prompts, by the reference's tokenizer: the same ids for every engine."""
        texts, common = TextSource(), self._common
        length = common.prompt_tokens + self.text_tokens
        [self.tokens] = texts.scored(session, case.workload, tokens=length).tokens
        self._prompts = texts.prompts(session, case.workload, count=common.rounds + 2, seed=common.seed)

    def _score(self, session: Session, result: EngineResult) -> None:
        prompt = self._common.prompt_tokens
        if isinstance(session, GivesLogits):
            is_reference = result.engine == REFERENCE
            rows = self._rows if is_reference else RowComparison(self._rows)
            scores = session.score_rows(self.tokens, _PROTOCOL, prompt, rows.add, full=False)
            if isinstance(rows, ReferenceRows):
                rows.scores = scores
            else:
                found = summarise_divergence(rows.found(scores))
                result.kld, result.kld_se, result.kld_max = found.kld_mean, found.kld_se, found.kld_max
                result.same_top1 = found.same_top1
            nll = scores.nll
        elif isinstance(session, ScoresWindows):
            window = Window(0, len(self.tokens), prompt + 1)
            nll = session.score_windows(self.tokens, [window], prefix="none", prefix_token=None).tokens.nll
            result.unknown |= dict.fromkeys(("kld", "kld_max", "same_top1"), _NO_LOGITS)
        else:
            reason = str(lacking(session, ScoresWindows))
            result.unknown |= dict.fromkeys(("perplexity", "kld", "kld_max", "same_top1"), reason)
            return
        if not all(map(math.isfinite, nll)):
            raise CaseInvalid(
                f"losses that are not finite: the model overflows in {session.dtype_name}; give another --dtype"
            )
        result.perplexity = perplexity(nll).value
        if result.engine == REFERENCE:
            self._nll = nll
            return
        pair = paired_ratio(nll, self._nll)
        result.difference, result.difference_se = pair.ratio - 1, pair.standard_error

    def _speed(self, session: Session, result: EngineResult) -> None:
        new_tokens = self._common.max_new_tokens
        warm, first, *timed = [ServeRequest(prompt, new_tokens) for prompt in self._prompts]
        memory = session.memory([warm])
        if memory.kv_bytes_decode is None or not memory.lengths_decode:
            result.unknown["kv_bytes_token"] = memory.unseen or "the engine does not tell what its cache holds"
        else:
            result.kv_bytes_token = memory.kv_bytes_decode / fmean(memory.lengths_decode)
        session.capture([first])
        clock = session.clock(clock_for(session.device))
        session.serve([first], clock)
        served = [session.serve([one], clock).times for one in timed]
        for times in served:
            if times[0].generated != new_tokens:
                raise CaseInvalid(
                    f"generated {times[0].generated} tokens instead of {new_tokens}, so its times are those of another request"
                )
        rounds = [RoundTimes(times, clock.name).metrics() for times in served]
        result.clock = clock.name
        result.ttft_s = _median(row["ttft_s"] for row in rounds)
        result.tpot_s = _median(row["tpot_s"] for row in rounds)


def _median(seconds: Iterable[float | None]) -> float | None:
    """Of what is known; ``None`` of nothing."""
    known = [one for one in seconds if one is not None]
    return median(known) if known else None
