"""Fits a compressor end to end: on the divergence of what a model answers from merged keys and values."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvsuite.compression.mean_pool import MeanPool
from kvsuite.compression.merging import Merging
from kvsuite.compression.mlp_weights import Form, MlpWeights
from kvsuite.errors import UserError
from kvsuite.models.load import LoadedModel

from .lessons import Lessons, attention_error, divergence, serve
from .own_samples import own_samples
from .student import Student

#: told how far it is, by a line
Report = Callable[[str], None]
#: shares of the time until prompts are served, and until every layer was fitted by itself; the rest is end to end
_SERVED, _APART = 0.42, 0.55
#: highest learning rates, layer by layer and end to end; each grows at first, then falls to 0 along a cosine. Units of the
#: specified form pass everything on at first, so that all of their weights turn the output at once
_RATES: dict[Form, tuple[float, float]] = {"residual": (2e-3, 1e-3), "specified": (3e-4, 2e-4)}
#: share of a phase in which the rate grows
_GROWING = 0.05
#: prompts that are answered together: of the text at first, so that some are there soon, then of the text, and the model's own
_FIRST, _TOGETHER, _OWN = 8, 32, 48
#: what one of the model's own prompts takes beside one of the text, before that is known
_OWN_COST = 2.5


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a compressor is fitted.

    Parameters
    ----------
    form
        ``specified`` or ``residual``.
    factor
        Tokens that become one.
    cpu_seconds
        Processor time for all of it: answers, steps and checks.
    answer_tokens
        Tokens of each answer.
    batch, step_tokens
        Prompts of a step, and on how many tokens behind each of them it looks at most.
    checks
        How often held-out prompts are looked at.
    seed
        Of the weights and of the order of prompts.
    steps
        Steps in all, in the place of the processor time: as many on every machine, from all prompts.
    lesson_bytes
        Bytes of all that is learnt from, most of them predictions over the whole vocabulary; while it is joined there is twice
        as much. No more prompts are answered then.
    """

    form: Form = "residual"
    factor: int = 5
    cpu_seconds: float = 600.0
    answer_tokens: int = 64
    batch: int = 4
    step_tokens: int = 32
    checks: int = 12
    seed: int = 0
    steps: int | None = None
    lesson_bytes: int = 4 << 30


@dataclass(frozen=True)
class FittedCompressor:
    """What came of it.

    Parameters
    ----------
    weights
        Those of the best check.
    mean_divergence, divergence
        Of mean pooling and of the weights on the held-out prompts, in nats a token.
    steps, best_step
        Steps taken, and the step of the best check.
    prompts
        Prompts learnt from.
    cpu_seconds
        Processor time taken.
    """

    weights: MlpWeights
    mean_divergence: float
    divergence: float
    steps: int
    best_step: int
    prompts: int
    cpu_seconds: float


def fit(
    loaded: LoadedModel,
    prompts: Tensor,
    held_out: Tensor,
    settings: FitSettings,
    report: Report,
    better: Callable[[MlpWeights], None],
    openings: Sequence[Sequence[int]] = (),
) -> FittedCompressor:
    """Fit a compressor for a model.

    Prompts of the text and prompts that the model wrote itself are answered in turn. First every layer is fitted by itself, to
    what the answers attend to, which is quick and brings it near; then all of them together, through the model, on the
    divergence of its predictions.

    Parameters
    ----------
    loaded
        The model, whose own weights do not change.
    prompts, held_out
        Tokens ``[count, length]`` to learn from, of which as many are answered as the time allows, and to check on.
    settings
        How.
    report
        Gets a line now and then.
    better
        Gets the weights of every check that is the best so far.
    openings
        First tokens of the prompts that the model writes; without, it writes none.

    Raises
    ------
    UserError
        If what the model keeps or predicts is not finite in half precision.
    """
    started, model = time.process_time(), loaded.model
    best, best_step, step, checks, losses = math.inf, 0, 0, 0, list[float]()

    def share() -> float:
        if settings.steps is not None:
            return step / settings.steps
        return (time.process_time() - started) / settings.cpu_seconds

    def say(doing: str, what: str) -> None:
        spent = time.process_time() - started
        left = f", {max(0.0, settings.cpu_seconds - spent):.0f} s left" if settings.steps is None else ""
        report(f"{doing}: {what}; {spent:.0f} s of processor time{left}")

    checked = Lessons.joined([serve(model, part, settings.answer_tokens) for part in torch.split(held_out, _TOGETHER)])
    lessons = _lessons(model, prompts, openings, settings, share, say)
    student = Student(factor=settings.factor, form=settings.form)
    student.begin(lessons.keys[..., : lessons.prompt, :], lessons.values[..., : lessons.prompt, :], settings.seed)
    mean = _check(model, checked, MeanPool(factor=settings.factor))
    own = list(student.parameters_fitted())
    order, queue = random.Random(settings.seed), list[int]()
    for doing, rate, end, loss_of in (
        ("layer by layer", _RATES[settings.form][0], _APART, _apart),
        ("end to end", _RATES[settings.form][1], 1.0, _together),
    ):
        optimiser = torch.optim.Adam(own, lr=rate)
        began = share()
        while True:
            done = 1.0 if began >= end else min(1.0, (share() - began) / (end - began))
            if share() * settings.checks >= checks or done >= 1:
                found, checks = _check(model, checked, student), int(share() * settings.checks) + 1
                if found < best:
                    best, best_step = found, step
                    weights = student.weights(model=loaded.spec.label, revision=loaded.spec.revision)
                    better(weights)
                elif best == math.inf:
                    raise UserError(
                        f"--model={loaded.spec.request}: what it keeps or predicts is not finite in half precision; give "
                        "another model"
                    )
                recent = f", learning {sum(losses) / len(losses):.3f}" if losses else ""
                losses.clear()
                say(doing, f"step {step}, held out {found:.3f} nats a token (mean pooling {mean:.3f}){recent}")
            if done >= 1:
                break
            if len(queue) < settings.batch:
                queue += order.sample(range(len(lessons)), len(lessons))
            batch = lessons.part([queue.pop() for _ in range(min(settings.batch, len(queue)))])
            batch = batch.first(settings.step_tokens)
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, done / _GROWING + 0.01) * 0.5 * (1 + math.cos(math.pi * done))
            optimiser.zero_grad(set_to_none=True)
            # groups begin elsewhere at every step, so that a prompt gives as many groupings as a group has tokens
            loss = loss_of(model, batch, student, order.randrange(settings.factor))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
            step += 1
    return FittedCompressor(weights, mean, best, step, best_step, len(lessons), time.process_time() - started)


def _lessons(
    model: Any,
    prompts: Tensor,
    openings: Sequence[Sequence[int]],
    settings: FitSettings,
    share: Callable[[], float],
    say: Callable[[str, str], None],
) -> Lessons:
    """Answer prompts of the text and the model's own in turn, as many as there are and time and memory allow."""
    generator = torch.Generator().manual_seed(settings.seed)
    learnt: list[Lessons] = []
    # share of the time that a prompt takes, of the text and of the model's own
    cost: dict[bool, float] = {}
    taken = own = 0
    while taken < len(prompts) or (openings and own < taken):
        room = _SERVED - share()

        def fitting(is_own: bool, most: int, room: float = room) -> int:
            each = cost.get(is_own, cost.get(False, 0.0) * _OWN_COST)
            return min(most, int(room / each)) if each else most

        count = fitting(True, min(_OWN, taken - own)) if openings and taken > _FIRST and own < taken else 0
        is_own = count >= _FIRST
        if not is_own:
            count = fitting(False, min(_TOGETHER if taken else _FIRST, len(prompts) - taken))
        if count < 1:
            break
        before = share()
        if is_own:
            part = own_samples(model, openings, count, prompts.shape[1], generator)
            own += count
        else:
            part = prompts[taken : taken + count]
            taken += count
        learnt += [serve(model, some, settings.answer_tokens) for some in torch.split(part, _TOGETHER)]
        cost[is_own] = (share() - before) / count
        full = sum(one.nbytes for one in learnt) >= settings.lesson_bytes
        limit = f", and no more: they take {settings.lesson_bytes / 2**30:.3g} GiB" if full else ""
        written = f", {own} of them the model's own" if own else ""
        say("answering", f"{taken + own} prompts{written}{limit}")
        if full:
            break
    return Lessons.joined(learnt)


def _merged(lessons: Lessons, policy: Merging, shift: int) -> tuple[Tensor, Tensor]:
    """The prompts' keys and values merged, all groups but the first ``shift`` tokens later; the tokens between stay.

    The first group stays where it is, since the first token of a prompt is unlike all others, and nearly all heads look at it.
    """
    first, length = policy.group, lessons.prompt
    keys, values = (one[..., :length, :].float() for one in (lessons.keys, lessons.values))
    rest = torch.tensor([at for at in range(length) if not first <= at < first + shift])
    merged = policy.merge(keys[..., rest, :], values[..., rest, :], range(len(keys)))
    if not shift:
        return merged
    # attention does not ask in which order they lie
    between = slice(first, first + shift)
    return torch.cat([merged[0], keys[..., between, :]], dim=-2), torch.cat(
        [merged[1], values[..., between, :]], dim=-2
    )


def _apart(model: Any, lessons: Lessons, policy: Merging, shift: int) -> Tensor:
    return attention_error(lessons, *_merged(lessons, policy, shift))


def _together(model: Any, lessons: Lessons, policy: Merging, shift: int) -> Tensor:
    return divergence(model, lessons, *_merged(lessons, policy, shift))


@torch.no_grad()
def _check(model: Any, lessons: Lessons, policy: Merging) -> float:
    parts = [lessons.part(range(at, min(at + 4, len(lessons)))) for at in range(0, len(lessons), 4)]
    return sum(float(_together(model, part, policy, 0)) * len(part) for part in parts) / len(lessons)
