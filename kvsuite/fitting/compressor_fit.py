"""Fits a compressor end to end: on the divergence of what a model answers from merged keys and values."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsuite.compression.mean_pool import MeanPool
from kvsuite.compression.mlp_weights import Form, MlpWeights
from kvsuite.models.load import LoadedModel

from .lessons import Lessons, divergence, serve
from .student import Student

#: told how far it is, by a line
Report = Callable[[str], None]
# shares of the time: answers to learn from, and the first steps with a growing rate
_SERVING_SHARE = 0.3
_GROWING = 0.05
_SERVED_TOGETHER = 8


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
        Tokens served behind each prompt.
    batch
        Prompts of a step.
    rate
        Highest learning rate; it grows at first, then falls to 0 along a cosine.
    checks
        How often held-out prompts are looked at.
    seed
        Of the weights and of the order of prompts.
    """

    form: Form = "residual"
    factor: int = 5
    cpu_seconds: float = 600.0
    answer_tokens: int = 64
    batch: int = 2
    rate: float = 2e-3
    checks: int = 12
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
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
    loaded: LoadedModel, prompts: Tensor, held_out: Tensor, settings: FitSettings, report: Report
) -> Fitted:
    """Fit a compressor for a model.

    Parameters
    ----------
    loaded
        The model, whose own weights do not change.
    prompts, held_out
        Tokens ``[count, length]`` to learn from, of which as many are served as the time allows, and to check on.
    settings
        How.
    report
        Gets a line now and then.
    """
    started = time.process_time()
    model, order = loaded.model, random.Random(settings.seed)

    def spent() -> float:
        return time.process_time() - started

    checked = _served(model, held_out, settings)
    learnt: list[Lessons] = []
    for at in range(0, len(prompts), _SERVED_TOGETHER):
        learnt.append(serve(model, prompts[at : at + _SERVED_TOGETHER], settings.answer_tokens))
        report(_line("serving", spent(), settings, f"{sum(map(len, learnt))} prompts"))
        if spent() > _SERVING_SHARE * settings.cpu_seconds:
            break
    lessons = Lessons.joined(learnt)
    learnt.clear()
    student = Student(factor=settings.factor, form=settings.form)
    student.begin(lessons.keys, lessons.values, settings.seed)
    own = list(student.parameters_fitted())
    optimiser = torch.optim.Adam(own, lr=settings.rate)
    mean = _check(model, checked, MeanPool(factor=settings.factor))
    best, best_step, best_weights = math.inf, 0, [one.detach().clone() for one in own]
    began, step, checks_done = spent(), 0, 0
    queue: list[int] = []
    losses: list[float] = []
    while True:
        share = min(1.0, (spent() - began) / max(1e-9, settings.cpu_seconds - began))
        if share * settings.checks >= checks_done or share >= 1:
            found = _check(model, checked, student)
            checks_done += 1
            if found < best:
                best, best_step, best_weights = found, step, [one.detach().clone() for one in own]
            recent = f", learning {sum(losses) / len(losses):.3f}" if losses else ""
            losses.clear()
            report(_line("fitting", spent(), settings, f"step {step}, held out {found:.3f} (mean pooling {mean:.3f}){recent}"))
            if share >= 1:
                break
        if len(queue) < settings.batch:
            queue += order.sample(range(len(lessons)), len(lessons))
        batch = lessons.part([queue.pop(0) for _ in range(min(settings.batch, len(queue)))])
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * min(1.0, share / _GROWING) * 0.5 * (1 + math.cos(math.pi * share))
        optimiser.zero_grad(set_to_none=True)
        loss = _loss(model, batch, student)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        step += 1
    with torch.no_grad():
        for one, kept in zip(own, best_weights, strict=True):
            one.copy_(kept)
    weights = student.weights(model=loaded.spec.label, revision=loaded.spec.revision)
    return Fitted(weights, mean, best, step, best_step, len(lessons), spent())


def _served(model: object, prompts: Tensor, settings: FitSettings) -> Lessons:
    parts = [
        serve(model, prompts[at : at + _SERVED_TOGETHER], settings.answer_tokens)
        for at in range(0, len(prompts), _SERVED_TOGETHER)
    ]
    return Lessons.joined(parts)


def _loss(model: object, lessons: Lessons, student: Student | MeanPool) -> Tensor:
    layers = range(lessons.keys.shape[0])
    keys, values = student.merge(lessons.keys.float(), lessons.values.float(), layers)
    return divergence(model, lessons, keys, values)


@torch.no_grad()
def _check(model: object, lessons: Lessons, student: Student | MeanPool) -> float:
    parts: Sequence[Lessons] = [lessons.part(range(at, min(at + 4, len(lessons)))) for at in range(0, len(lessons), 4)]
    return sum(float(_loss(model, part, student)) * len(part) for part in parts) / len(lessons)


def _line(doing: str, spent: float, settings: FitSettings, what: str) -> str:
    left = max(0.0, settings.cpu_seconds - spent)
    return f"{doing}: {what}; {spent:.0f} s of processor time, {left:.0f} s left"
