"""The passes of one case: quality, memory, speed. Each writes its numbers into the record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .case import Case
from .engines.base import MemoryPass, Session
from .errors import CaseInvalid
from .meters.clock import Clock
from .meters.quality import TokenScores, paired_ratio, perplexity
from .meters.timing import RoundTimes
from .record import Record

if TYPE_CHECKING:
    from .measurement import CaseRunner

RunRounds = Callable[[Callable[[], None], int], None]
Phase = Callable[[str, int, int], None]
# a compressed cache that predicts clearly better than the full one saw the future (docs/protocols.md, the leak guard)
_LEAK_NATS, _LEAK_SIGMAS = 0.1, 4.0
# coefficient of variation above which times are shown and not judged
_MAX_CV = 0.10


@dataclass
class Measured:
    """A record, and what belongs beside it: raw per-token rows for the sidecar."""

    record: Record
    tokens: dict[str, list[Any]] | None = None


class CasePasses:
    """Runs the passes of one case on a runner's session; ``phase`` says how far it came."""

    def __init__(
        self, runner: CaseRunner, case: Case, measured: Measured, run_rounds: RunRounds, progress: Phase
    ) -> None:
        self.runner = runner
        self.case = case
        self.measured = measured
        self.record = measured.record
        self.run_rounds = run_rounds
        self.progress = progress
        self.phase = "load"
        self.session: Session | None = None
        self.dataset_revision: str | None = None
        record = self.record
        record.case_key = case.key(model_revision=None, dataset_revision=None)
        record.partition["requested"] = None if case.partition is None else dict(case.partition)

    def run(self) -> None:
        record = self.record
        session = self.session = self.runner.sessions.get(self.case)
        record.model = dict(session.model)
        self._key()
        session.prepare(self.case)
        # a prompt that the corpus cannot give must not be found out after minutes of scoring
        prompts = self._prompts(session)
        self.phase = "quality"
        self._quality(session)
        self._key()
        self.phase = "memory"
        self._speed(session, prompts)
        record.effective = dict(session.effective)
        record.inert |= session.inert
        record.partition = dict(session.partition)

    def finish(self) -> None:
        if self.session is not None:
            self.record.effective = self.record.effective or dict(self.session.effective)
            try:
                self.session.finish()
            except Exception as error:  # a broken device must not take the finished record with it
                self.record.warnings.append(f"cleaning up after the case failed: {error}")

    def _key(self) -> None:
        model = self.record.model
        case = self.case
        if case.dtype == "checkpoint" and self.session is not None:
            case = replace(case, dtype=self.session.dtype_name)
        self.record.case_key = case.key(model_revision=model.get("revision"), dataset_revision=self.dataset_revision)

    def put(self, name: str, samples: Any, **facts: Any) -> None:
        self.record.metrics[name] = self.runner.registry.value(name, samples, **facts)

    def _quality(self, session: Session) -> None:
        names = ("perplexity", "perplexity_se", "nll_sum", "nll_tokens", "next_token_acc", "perplexity_full", "ppl_ratio",
                 "ppl_ratio_se")  # fmt: skip
        if session.model.get("is_dummy"):
            self.record.inert["corpus"] = "random weights: nothing is scored, and prompts are random tokens"
            for name in names:
                self.put(name, None, reason="random weights")
            return
        workload = self.case.workload
        protocol, max_tokens = str(workload["protocol"]), int(workload["max_tokens"])
        prefix = int(workload["prompt_tokens"]) if protocol == "prefix-continuation" else 0
        texts = self.runner.texts.scored(session, workload, tokens=prefix + max_tokens)
        self.record.dataset = texts.facts
        self.dataset_revision = texts.revision
        scores, references = [], []
        for index, tokens in enumerate(texts.tokens):
            report = functools.partial(self.progress, f"scoring text {index + 1}/{len(texts.tokens)}")
            scores.append(session.score(tokens, protocol, prefix, report))
            references.append(self.runner.texts.reference(session, tokens, scores[-1].positions[0]))
        nll = [x for score in scores for x in score.nll]
        reference = [x for score in references for x in score.nll]
        pooled, full, paired = perplexity(nll), perplexity(reference), paired_ratio(nll, reference)
        facts = {"protocol": protocol, "prefix": prefix}
        hits = [hit for score in scores for hit in score.correct]
        self.put("perplexity", pooled.value, **facts)
        self.put("perplexity_se", pooled.standard_error, reason="one token only")
        self.put("nll_sum", pooled.nll_sum, **facts)
        self.put("nll_tokens", pooled.n)
        self.put("next_token_acc", sum(hits) / len(hits), **facts)
        self.put("perplexity_full", full.value, protocol="one teacher-forced forward over the same text")
        self.put("ppl_ratio", paired.ratio, **facts)
        self.put("ppl_ratio_se", paired.standard_error, reason="one token only")
        self.record.samples["texts"] = [
            {
                "index": i,
                "nll_sum": sum(s.nll),
                "tokens": len(s.nll),
                "correct": sum(s.correct),
                "sha256": texts.hashes[i],
            }
            for i, s in enumerate(scores)
        ]
        self.measured.tokens = _token_table(scores, references)
        leak = _LEAK_SIGMAS * (paired.difference_se or 0.0)
        if paired.mean_difference < -max(_LEAK_NATS, leak):
            raise CaseInvalid(
                f"leak guard: perplexity {pooled.value:.3f} is clearly below the full cache's {full.value:.3f} on the same "
                "tokens; the compressed cache saw tokens it should predict"
            )

    def _prompts(self, session: Session) -> list[list[int]]:
        options = self.runner.options
        count = options.num_warmup + options.rounds + 1
        return self.runner.texts.prompts(session, self.case.workload, count=count, seed=options.seed)

    def _speed(self, session: Session, prompts: Sequence[Sequence[int]]) -> None:
        options, workload, record = self.runner.options, self.case.workload, self.record
        length, new_tokens = int(workload["prompt_tokens"]), int(workload["max_new_tokens"])
        for index in range(max(options.num_warmup - 1, 0)):
            self.progress("warm-up", index + 1, options.num_warmup)
            session.warm(prompts[index], new_tokens)
        self._memory(session, session.memory_pass(prompts[-1], new_tokens), length, new_tokens)
        self.phase = "decode"
        session.capture(prompts[0], new_tokens)
        clock = self.runner.clock(session.device)
        if options.num_warmup and session.effective.get("decode_step") == "cuda_graph":
            session.generate(prompts[-1], new_tokens, clock)
        rounds: list[RoundTimes] = []
        waiting = iter(prompts[options.num_warmup :])

        def one_round() -> None:
            times = session.generate(next(waiting), new_tokens, clock)
            if times.generated != new_tokens:
                raise CaseInvalid(
                    f"generated {times.generated} tokens instead of {new_tokens}: no timing is comparable"
                )
            rounds.append(RoundTimes([times], clock.name))
            self.progress("timed rounds", len(rounds), options.rounds)

        reason = session.effective.get("decode_step_reason")
        if reason and options.decode_step == "auto":
            record.warnings.append(f"decode steps ran uncaptured: {reason}")
        self.run_rounds(one_round, options.rounds)
        self._timing(rounds)
        self._judge_spread()
        self._first_step(session, prompts[0][:1], clock)
        record.tokens = {"prompt": length, "prefill_computed": length, "generated": new_tokens, "requested": new_tokens}
        if length + new_tokens > (session.model.get("trained_length") or length + new_tokens):
            record.warnings.append(
                f"{length + new_tokens} positions are more than the trained length {session.model['trained_length']}"
            )

    def _judge_spread(self) -> None:
        """Say in the record where times cannot be compared: too few rounds, or a spread above `_MAX_CV`."""
        metrics, warnings = self.record.metrics, self.record.warnings
        if self.runner.options.rounds < 2:
            warnings.append("one timed round: no spread, so no difference in speed can be judged; raise --kv-rounds")
        for name in ("ttft_s", "tpot_s"):
            cv = metrics[name].get("cv")
            if cv is not None and cv > _MAX_CV:
                warnings.append(
                    f"unstable: {name} varies by {cv:.0%} between rounds (bound {_MAX_CV:.0%}), so its differences mean "
                    "nothing; is the machine busy?"
                )

    def _first_step(self, session: Session, prompt: Sequence[int], clock: Clock) -> None:
        try:
            steps = [session.generate(prompt, 1, clock).ttft_s for _ in range(self.runner.options.rounds)]
        except CaseInvalid as invalid:
            self.put("first_step_s", None, reason=f"a prompt of one token: {invalid}")
            return
        self.put("first_step_s", steps, clock=clock.name)

    def _timing(self, rounds: Sequence[RoundTimes]) -> None:
        rows = [one.metrics() for one in rounds]
        clock = rounds[0].clock
        for name in rows[0]:
            values = [row[name] for row in rows]
            known = [value for value in values if value is not None]
            self.put(name, known or None, clock=clock, reason="needs at least two output tokens")
        gaps = [gap for one in rounds for request in one.requests for gap in request.itl_s]
        self.put("itl_s", gaps or None, clock=clock, pooled="pooled_tokens", reason="needs at least two output tokens")
        self.record.samples["rounds"] = [
            row | {"itl_s": list(one.requests[0].itl_s)} for row, one in zip(rows, rounds, strict=True)
        ]

    def _memory(self, session: Session, found: MemoryPass, length: int, new_tokens: int) -> None:
        record = self.record
        record.warnings += found.warnings
        if self.case.policy and found.kv_bytes_decode == session.full_kv_bytes(length + new_tokens - 1):
            record.warnings.append("nothing was removed in the speed pass: the cache never outgrew the method's size")
        planned = session.planned_kv_bytes(length, new_tokens)
        full = session.full_kv_bytes(length)
        self.put("kv_bytes_exact", found.kv_bytes_decode)
        self.put("kv_bytes_exact_prefill", found.kv_bytes_prefill)
        self.put("mem_predicted_kv_bytes", planned, reason="the press decides how much it keeps")
        for name, value in (
            ("cache_tokens_mean", sum(found.lengths_decode) / len(found.lengths_decode)),
            ("cache_tokens_min", min(found.lengths_decode)),
            ("cache_tokens_max", max(found.lengths_decode)),
        ):
            self.put(name, value)
        asked = session.ratio_requested
        self.put("ratio_requested", asked, reason="the method is given by sizes, not by a ratio")
        self.put("ratio_effective", 1 - found.kv_bytes_prefill / full)
        self.put("mem_weights_bytes", session.model["weights_bytes"])
        for name, seconds in (("compress_s", found.compress_s), ("evict_s", found.evict_s)):
            self.put(name, seconds, clock=self.runner.clock(session.device).name, reason="nothing is compressed then")
        peaks = [found.prefill.peak.value, found.decode.peak.value]
        known = None if None in peaks else max(p for p in peaks if p is not None)
        before = found.prefill.before.value
        reason = found.prefill.peak.reason
        for name, found_bytes, why in (
            ("mem_measured_before_bytes", before, reason),
            ("mem_measured_prefill_peak_bytes", peaks[0], reason),
            ("mem_measured_decode_peak_bytes", peaks[1], reason),
            ("mem_measured_peak_bytes", known, reason),
            ("mem_measured_dynamic_bytes", None if known is None or before is None else known - before, reason),
            ("mem_measured_reserved_bytes", found.decode.reserved.value, reason),
            ("mem_measured_driver_bytes", found.driver.value, found.driver.reason),
            ("mem_measured_rss_peak_bytes", found.resident.value, found.resident.reason),
        ):
            self.put(name, found_bytes, **({"reason": why} if found_bytes is None else {}))
        record.metrics["mem_measured_driver_bytes"] |= found.driver.facts
        floor = (
            session.model["step_weight_bytes"] + (found.kv_bytes_prefill + found.kv_bytes_decode) / 2
        ) / session.bandwidth
        self.put("tpot_floor_s", floor, bandwidth_bytes_s=session.bandwidth)
        record.memory["predicted"] = {"kv_bytes": planned, "weights_bytes": session.model["weights_bytes"]}
        record.memory["measured"] = {
            "kv_bytes_allocated": found.kv_bytes_allocated,
            "cache_tokens_per_layer": found.lengths_decode,
            "cache_tokens_per_layer_prefill": found.lengths_prefill,
        }


def _token_table(scores: Sequence[TokenScores], references: Sequence[TokenScores]) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {"text": [], "position": [], "token": [], "nll": [], "correct": [], "nll_full": []}
    for index, (score, reference) in enumerate(zip(scores, references, strict=True)):
        table["text"] += [index] * len(score.nll)
        table["position"] += score.positions
        table["token"] += score.targets
        table["nll"] += score.nll
        table["correct"] += score.correct
        table["nll_full"] += reference.nll
    return table
