"""Teacher-forced scoring through the paged cache: of known rows, many at a time, or token by token behind a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsuite.models.language_head import token_losses

from .request import Request, Status
from .runtime import Runtime
from .sampling import SamplingParameters
from .step_inputs import ScoredRows

#: called with rows done and in all, and the mean loss so far in nats
Progress = Callable[[int, int, float], None]

# logits of so many bytes are made at a time, in float32: few enough to stay small, enough rows for a fast product
_LOGIT_BYTES = {"cpu": 32 * 2**20}
_LOGIT_BYTES_ELSEWHERE = 512 * 2**20


@dataclass(frozen=True)
class Passage:
    """Tokens that go into the model as one request, and what its last rows should have predicted.

    Parameters
    ----------
    tokens
        Token ids.
    targets
        The tokens that follow the last ``len(targets)`` of them.
    together
        As for `Request`; all tokens if left out.
    """

    tokens: Sequence[int]
    targets: Sequence[int]
    together: int = 0


@dataclass(frozen=True)
class Scores:
    """Loss in nats of every target (float32 log-softmax), and whether the most probable token was it."""

    nll: list[float]
    correct: list[bool]


def score_passages(
    runtime: Runtime, passages: Sequence[Passage], *, rows: int | None = None, progress: Progress | None = None
) -> Scores:
    """Score passages, each a request of its own; several of them share a step, long ones are cut into chunks.

    Logits are made of wanted rows only, and of some hundred at a time.

    Parameters
    ----------
    runtime
        With no policy, and nothing else to do.
    passages
        What to score.
    rows
        Rows projected at a time, `rows_at_once` if left out.
    progress
        Called after every step that scored something; on an accelerator this waits for the step.

    Returns
    -------
    Scores
        In the order of passages and targets.

    Raises
    ------
    RuntimeError
        If a passage could not be served: longer than the limits, or a token outside the vocabulary.
    """
    size = rows or rows_at_once(runtime)
    of = sum(len(passage.targets) for passage in passages)
    targets = torch.tensor([t for p in passages for t in p.targets], dtype=torch.int64, device=runtime.device)
    nll = torch.zeros(of, dtype=torch.float32, device=targets.device)
    correct = torch.zeros(of, dtype=torch.bool, device=targets.device)
    done, total = 0, 0.0

    def score(places: Tensor, states: Tensor) -> None:
        nonlocal done, total
        for at in range(0, len(places), size):
            part = places[at : at + size]
            logits = runtime.runner.logits(states[at : at + size])
            nll[part] = token_losses(logits, targets[part])
            correct[part] = logits.argmax(-1) == targets[part]
            # the next piece is made before the name is bound anew: without this, two would be alive
            del logits
        if progress:
            done += len(places)
            total += float(nll[places].sum(dtype=torch.float64))
            progress(min(done, of), of, total / done)

    visit_rows(runtime, passages, score)
    return Scores(nll.tolist(), correct.tolist())


def visit_rows(runtime: Runtime, passages: Sequence[Passage], visit: Callable[[Tensor, Tensor], None]) -> None:
    """Serve passages, and show the hidden states of their wanted rows as they come.

    Parameters
    ----------
    runtime, passages
        As for `score_passages`.
    visit
        Called with places among all targets, int64 ``[n]``, and hidden states ``[n, hidden]`` for `Runner.logits`, which
        hold until it returns. What a preempted request had shown comes again.

    Raises
    ------
    RuntimeError
        As `score_passages`.
    """
    requests = [Request(list(one.tokens), scored=len(one.targets), together=one.together) for one in passages]
    offsets: dict[Request, int] = {}
    at = 0
    for request, passage in zip(requests, passages, strict=True):
        offsets[request] = at
        at += len(passage.targets)

    def on_rows(found: Sequence[ScoredRows], states: Tensor) -> None:
        places = [torch.arange(offsets[r] + first, offsets[r] + first + count) for r, first, count in found]
        visit(torch.cat(places).to(states.device), states)

    before, runtime.on_rows = runtime.on_rows, on_rows
    try:
        for request in requests:
            runtime.add(request)
            _require(request, failed_only=True)
        runtime.run()
    finally:
        runtime.on_rows = before
        for request in requests:
            runtime.cancel(request)
    for request in requests:
        _require(request)


def score_steps(
    runtime: Runtime,
    prompt: Sequence[int],
    continuation: Sequence[int],
    *,
    first: int = 0,
    take: Callable[[int, Tensor], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a known continuation as if it were decoded: a policy acts behind the prompt and after every token.

    Parameters
    ----------
    runtime
        With or without a policy, and with nothing else to do.
    prompt
        Computed in one go, as far as the limits allow, and compressed.
    continuation
        The tokens that follow, fed one by one.
    first
        First of them that is scored: the logits of number 0 come from the prompt's rows, before any compression.
    take
        Called with each scored row's number, from 0, and its logits ``[1, vocab]``.
    progress
        Called now and then with tokens done and in all.

    Raises
    ------
    RuntimeError
        As `score_passages`.
    """
    count = len(continuation)
    targets = torch.tensor(list(continuation), dtype=torch.int64, device=runtime.device)
    nll = torch.zeros(count, dtype=torch.float32, device=targets.device)
    correct = torch.zeros(count, dtype=torch.bool, device=targets.device)
    sampling = SamplingParameters(max_new_tokens=count, ignore_eos=True)
    request = Request(list(prompt), sampling, forced=list(continuation))
    taken = first

    def on_logits(requests: Sequence[Request], logits: Tensor) -> None:
        # by number: a token that compression's preemption kept from its request is drawn again
        at = request.output_length
        target = targets[at : at + 1]
        nll[at : at + 1] = token_losses(logits, target)
        correct[at : at + 1] = logits.argmax(-1) == target
        nonlocal taken
        if take and at == taken:
            take(at - first, logits)
            taken += 1
        if progress and (at % 16 == 15 or at == count - 1):
            progress(at + 1, count)

    before, runtime.on_logits = runtime.on_logits, on_logits
    try:
        runtime.run([request])
    finally:
        runtime.on_logits = before
        runtime.cancel(request)
    _require(request)
    return Scores(nll[first:].tolist(), correct[first:].tolist())


def rows_at_once(runtime: Runtime) -> int:
    """Rows whose float32 logits fill a fixed number of bytes, small on a CPU."""
    size = _LOGIT_BYTES.get(runtime.device.type, _LOGIT_BYTES_ELSEWHERE)
    return max(1, size // (4 * runtime.vocab_size))


def _require(request: Request, *, failed_only: bool = False) -> None:
    """Raise what became of a request that was not served to its end."""
    if request.status is Status.FINISHED or (failed_only and request.status is not Status.FAILED):
        return
    raise RuntimeError(f"scoring: request {request.id} {request.status.value}: {request.reason}") from request.error
