"""Fitting a compressor to a tiny model: it begins as mean pooling, gets better, and what is written is what was fitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import loaded

from kvsuite.compression.mean_pool import MeanPool
from kvsuite.compression.merging import CacheShape, Merging
from kvsuite.compression.mlp import Mlp, MlpResidual
from kvsuite.compression.mlp_weights import FORMS, Form, MlpWeights
from kvsuite.errors import UserError
from kvsuite.fitting.compressor_fit import FitSettings, _merged, fit
from kvsuite.fitting.lessons import Lessons, attention_error, divergence, serve
from kvsuite.fitting.own_samples import own_samples
from kvsuite.fitting.student import Student

LENGTH, ANSWER = 22, 8


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(4, 250, (12, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lessons(prompts: torch.Tensor) -> Lessons:
    return Lessons.joined([serve(loaded("llama").model, part, ANSWER) for part in prompts.split(5)])


def policy_of(weights: MlpWeights, path: Path) -> Merging:
    weights.write(path)
    policy = {"specified": Mlp, "residual": MlpResidual}[str(weights.form)](factor=weights.factor, weights=str(path))
    of = loaded("llama")
    policy.prepare(
        CacheShape(
            model=of.spec.label, revision=of.spec.revision, layers=3, head_dims=frozenset({16}), device=of.device,
            dtype=torch.float32,
        )
    )  # fmt: skip
    return policy


def of_prompt(lessons: Lessons) -> tuple[torch.Tensor, torch.Tensor]:
    return lessons.keys[..., :LENGTH, :].float(), lessons.values[..., :LENGTH, :].float()


def test_a_full_cache_diverges_from_itself_by_what_half_precision_costs(lessons: Lessons) -> None:
    of, (keys, values) = loaded("llama"), of_prompt(lessons)
    assert lessons.answers.shape == (12, ANSWER)
    assert lessons.queries.shape == lessons.attended.shape == (3, 12, 4, ANSWER - 1, 16)
    assert float(attention_error(lessons, keys, values)) < 1e-5
    assert abs(float(divergence(of.model, lessons, keys, values))) < 1e-4
    merged = MeanPool(factor=3).merge(keys, values, range(3))
    assert float(attention_error(lessons, *merged)) > 1e-3
    assert float(divergence(of.model, lessons, *merged)) > 1e-3
    assert of.model.config._attn_implementation == "sdpa", "the model has its own attention again"


@pytest.mark.parametrize("form", FORMS)
def test_it_begins_as_mean_pooling(form: Form, lessons: Lessons, tmp_path: Path) -> None:
    keys, values = of_prompt(lessons)
    student = Student(factor=3, form=form)
    student.begin(keys, values, seed=0)
    mean = MeanPool(factor=3).merge(keys, values, range(3))
    for found in (
        student.merge(keys, values, range(3)),
        policy_of(student.weights(model="decoder", revision=None), tmp_path / "w.pth").merge(keys, values, range(3)),
    ):
        for own, wanted in zip(found, mean, strict=True):
            torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_it_gets_better_and_what_is_written_is_what_was_fitted(
    form: Form, prompts: torch.Tensor, lessons: Lessons, tmp_path: Path
) -> None:
    of, lines, written = loaded("llama"), list[str](), list[MlpWeights]()
    settings = FitSettings(form=form, factor=3, steps=160, answer_tokens=ANSWER, checks=4, batch=4)
    found = fit(of, prompts, prompts[:4], settings, lines.append, written.append)
    assert found.divergence < 0.9 * found.mean_divergence
    assert found.weights is written[-1]
    assert found.steps == 160
    assert any("held out" in line for line in lines)
    checked = lessons.part(range(4))
    with torch.no_grad():
        policy = policy_of(found.weights, tmp_path / "w.pth")
        again = float(divergence(of.model, checked, *policy.merge(*of_prompt(checked), range(3))))
    assert again == pytest.approx(found.divergence, rel=1e-2)
    # the model's own weights are as they were
    assert all(one.grad is None and not one.requires_grad for one in of.model.parameters())


def test_what_is_not_finite_in_half_precision_is_refused(prompts: torch.Tensor) -> None:
    of = loaded("llama")
    settings = FitSettings(factor=3, cpu_seconds=0.2, answer_tokens=ANSWER)
    # larger than what half precision holds
    hook = of.model.lm_head.register_forward_hook(lambda module, given, found: found * 1e7)
    try:
        with pytest.raises(UserError, match=r"^--model=.* is not finite in half precision; give another model$"):
            fit(of, prompts, prompts[:4], settings, lambda _: None, lambda _: None)
    finally:
        hook.remove()


def test_no_more_prompts_are_kept_than_memory_is_for(prompts: torch.Tensor) -> None:
    lines = list[str]()
    settings = FitSettings(factor=3, steps=2, answer_tokens=ANSWER, lesson_bytes=1)
    found = fit(loaded("llama"), prompts, prompts[:4], settings, lines.append, lambda _: None)
    assert found.prompts == 8 < len(prompts)
    assert any(line.startswith("answering: 8 prompts, and no more: they take ") for line in lines)


def test_the_first_group_is_merged_wherever_the_others_begin(lessons: Lessons) -> None:
    (keys, values), policy = of_prompt(lessons), MeanPool(factor=3)
    for shift in range(3):
        own = _merged(lessons, policy, shift)
        later = policy.merge(keys[..., 3 + shift :, :], values[..., 3 + shift :, :], range(3))
        for found, of, rest in zip(own, (keys, values), later, strict=True):
            parts = [of[..., :3, :].mean(dim=-2, keepdim=True), rest, of[..., 3 : 3 + shift, :]]
            torch.testing.assert_close(found, torch.cat(parts, dim=-2), atol=1e-6, rtol=1e-6)


def test_a_step_looks_at_the_first_tokens_behind_a_prompt(lessons: Lessons) -> None:
    of, (keys, values) = loaded("llama"), of_prompt(lessons)
    few = lessons.first(3)
    assert (few.answers.shape, few.logits.shape[1], few.queries.shape[3]) == ((12, 4), 3, 3)
    assert float(attention_error(few, keys, values)) < 1e-5
    assert abs(float(divergence(of.model, few, keys, values))) < 1e-4
    every = lessons.first(100)
    assert torch.equal(every.keys, lessons.keys)
    assert torch.equal(every.answers, lessons.answers)


def test_a_model_writes_prompts_that_begin_as_they_are_told(prompts: torch.Tensor) -> None:
    of, openings = loaded("llama"), [[7], [8, 9, 10]]
    found = own_samples(of.model, openings, 3, 12, torch.Generator().manual_seed(1))
    assert found.shape == (3, 12)
    begun = [next(one for one in openings if row[: len(one)] == one) for row in found.tolist()]
    assert {len(one) for one in begun} == {1, 3}
    assert torch.equal(found, own_samples(of.model, openings, 3, 12, torch.Generator().manual_seed(1)))
    assert not torch.equal(found, own_samples(of.model, openings, 3, 12, torch.Generator().manual_seed(2)))
    # both are learnt from in turn: 8 of the text, the 4 others, and as many again
    lines = list[str]()
    settings = FitSettings(factor=3, steps=2, answer_tokens=ANSWER)
    assert fit(of, prompts, prompts[:4], settings, lines.append, lambda _: None, openings).prompts == 24
    assert any(line.startswith("answering: 24 prompts, 12 of them the model's own") for line in lines)
