"""Requests of a run under load: their prompts, how many tokens each one wants, and when each arrives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from kvsuite.case import digest
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.images import ImagePixels, ImageShape

from .arrivals import CLOSED, POISSON, TRACE, mean_rate, poisson_arrivals, trace_arrivals
from .long_prompts import DIALOGUE, clipped_context, fill_token, output_tokens, pattern_ids, repeated
from .prompt_folder import folder_prompts
from .prompts import FIRST_BLOCK, prompts_of
from .request_trace import TraceRow, first_rows, heavy_rows, times_of
from .serving_workload import HEAVY, IDENTICAL, LIGHT, LIGHT_OUTPUT, LIGHT_TOKENS, LONG, ServingWorkload
from .token_rows import require_rows

_RANDOM = "ids drawn evenly from the vocabulary"


@dataclass(frozen=True)
class ServingRequests:
    """Requests in the order of the workload, which is that of arrival where they arrive one after another.

    Parameters
    ----------
    prompts
        Token ids of each.
    new_tokens
        How many each one generates.
    arrivals_s
        When each is scheduled to arrive, in seconds from the start.
    facts
        For the record: where prompts come from, their lengths and hash, how arrivals were made, and notes.
    images
        The image that each prompt begins with; empty where the workload has none.
    """

    prompts: list[list[int]]
    new_tokens: list[int]
    arrivals_s: list[float]
    facts: dict[str, Any] = field(default_factory=dict)
    images: list[ImagePixels] = field(default_factory=list)


@dataclass(frozen=True)
class WorkloadModel:
    """What of a model prompts are made by.

    Parameters
    ----------
    vocab_size
        Ids lie in ``[0, vocab_size)``.
    tokenizer
        Of the model, ``None`` where it has none.
    text
        Tokens of a real text, of which long prompts are windows; empty: ids are drawn from the vocabulary.
    passages
        Token lists of the same text's paragraphs, which are the prompts of light-dataset.
    text_name
        What text that is, for the record.
    image_shape
        What the model makes of an image, or why it can be given none.
    """

    vocab_size: int
    tokenizer: Any = None
    text: Sequence[int] = ()
    passages: Sequence[Sequence[int]] = ()
    text_name: str = ""
    image_shape: ImageShape | str = "the model reads no images"


def serving_requests(
    workload: ServingWorkload,
    model: WorkloadModel,
    *,
    seed: int,
    trace: str | None = None,
    dataset_dir: str | None = None,
    image: ImagePixels | None = None,
) -> ServingRequests:
    """Make the requests of a workload, the same ones for the same arguments.

    Parameters
    ----------
    workload
        What is asked.
    model
        The model that is served.
    seed
        Decides which unique prompts there are, and the gaps of Poisson arrivals.
    trace
        CSV of a trace.
    dataset_dir
        Folder of texts for light-dataset, in the place of the text that kvsuite has.
    image
        Of every request, where the workload has images; ``None``: random ones, of each request another where prompts are
        unique.

    Raises
    ------
    UserError
        If a file is missing, cannot be read or gives too little, or nothing is left of a prompt.
    CaseInvalid
        If the model has no tokenizer for a text that is asked for, a token has no row in the model's embedding, or images are
        asked for and the model reads none.
    """
    shape = _shape(workload, model)
    if workload.needs_trace and not trace:
        why = "the heavy-trace workload" if workload.name == HEAVY else "--kv-arrivals=trace"
        raise UserError(
            f"--kv-trace-conv: no trace is given, and {why} is made of one; give AzureLLMInferenceTrace_conv.csv of the "
            "repository Azure/AzurePublicDataset"
        )
    rows: list[TraceRow] | None = None
    if workload.name == HEAVY:
        rows = heavy_rows(str(trace), workload.requests)
        if workload.arrivals == TRACE:
            times = times_of(rows, str(trace))
            rows = [rows[at] for at in sorted(range(len(rows)), key=times.__getitem__)]
        prompts, new_tokens, facts = _of_rows(rows, workload, model, seed, str(trace))
    elif workload.name == LIGHT:
        prompts, new_tokens, facts = _light(workload, model, seed, dataset_dir)
    else:
        prompts, new_tokens, facts = _long(workload, model, seed)
    require_rows((max(prompt) for prompt in prompts), model.vocab_size, model.tokenizer)
    images: list[ImagePixels] = []
    hashed: Any = prompts
    if shape is not None:
        prompts = [[shape.token] * shape.tokens + prompt for prompt in prompts]
        images = [image] * len(prompts) if image is not None else _random_images(shape, workload, seed)
        hashed = [prompts, [one.digest.hex() for one in images]]
        facts["image"] = {"source": workload.image, "tokens": shape.tokens, "size": shape.size}
    arrivals, scale = _arrivals(workload, seed, rows, trace)
    notes = facts.pop("notes", [])
    lengths = [len(prompt) for prompt in prompts]
    facts |= {
        "requests": len(prompts),
        "prompt_tokens": _spread(lengths),
        "new_tokens": _spread(new_tokens),
        "prompts_hash": digest(hashed),
        "seed": seed,
        "arrivals": {
            "kind": workload.arrivals,
            "rate_asked": workload.arrival_rate,
            "time_scale": scale,
            "rate": mean_rate(arrivals),
            "span_s": max(arrivals),
        },
        "notes": notes,
    }
    return ServingRequests(prompts, new_tokens, arrivals, facts, images)


def _shape(workload: ServingWorkload, model: WorkloadModel) -> ImageShape | None:
    """Of the image that every prompt begins with, ``None`` where there is none."""
    if workload.image is None:
        return None
    if isinstance(model.image_shape, str):
        raise CaseInvalid(
            f"--kv-pipeline-image={workload.image}: {model.image_shape}; leave it out, or give a model that has one"
        )
    return model.image_shape


def _text_lengths(
    lengths: Sequence[int], workload: ServingWorkload, model: WorkloadModel, *, typed: str
) -> Sequence[int]:
    """What an image leaves for text of prompts of these lengths."""
    shape = _shape(workload, model)
    if shape is None:
        return lengths
    if min(lengths) <= shape.tokens:
        raise UserError(
            f"{typed}: a prompt of {min(lengths)} tokens has no room for an image of {shape.tokens} tokens and text; ask for "
            f"more than {shape.tokens}, or leave --kv-pipeline-image out"
        )
    return [length - shape.tokens for length in lengths]


def _random_images(shape: ImageShape, workload: ServingWorkload, seed: int) -> list[ImagePixels]:
    import numpy as np

    def drawn(*key: int) -> ImagePixels:
        # as pixels are once they are normalised
        pixels = np.random.default_rng(key).standard_normal((3, shape.size, shape.size), dtype=np.float32)
        return ImagePixels(pixels)

    if workload.prompts == IDENTICAL:
        return [drawn(0)] * workload.requests
    return [drawn(seed, 1 + index) for index in range(workload.requests)]


_Made = tuple[list[list[int]], list[int], dict[str, Any]]


def _of_rows(rows: Sequence[TraceRow], workload: ServingWorkload, model: WorkloadModel, seed: int, trace: str) -> _Made:
    lengths = [
        clipped_context(
            row.context, row.generated, max_model_len=workload.max_model_len, typed=f"--kv-trace-conv={trace}"
        )
        for row in rows
    ]
    prompts, content = _contents(lengths, workload, model, seed, typed=f"--kv-trace-conv={trace}")
    clipped = sum(length < row.context for length, row in zip(lengths, rows, strict=True))
    notes = [f"{clipped} of {len(rows)} contexts clipped to what the output leaves of {workload.max_model_len}"]
    facts = {"source": trace, "content": content, "notes": notes if clipped else []}
    return prompts, [row.generated for row in rows], facts


def _long(workload: ServingWorkload, model: WorkloadModel, seed: int) -> _Made:
    output = output_tokens(workload.output, max_model_len=workload.max_model_len)
    length = clipped_context(
        workload.context, output, max_model_len=workload.max_model_len, typed=f"--kv-synthetic-output={workload.output}"
    )
    lengths = [length] * workload.requests
    prompts, content = _contents(lengths, workload, model, seed, typed=f"--kv-synthetic-context={workload.context}")
    notes = [f"context of {workload.context} clipped to {length}"] if length < workload.context else []
    return prompts, [output] * workload.requests, {"source": "synthetic", "content": content, "notes": notes}


def _contents(
    lengths: Sequence[int], workload: ServingWorkload, model: WorkloadModel, seed: int, *, typed: str
) -> tuple[list[list[int]], str]:
    """Prompts of these lengths without the tokens of their image, and what is in them."""
    lengths = _text_lengths(lengths, workload, model, typed=typed)
    pattern, named = _pattern(workload, model)
    if workload.prompts == IDENTICAL:
        pattern = pattern or [fill_token(model.tokenizer)]
        return [repeated(pattern, length) for length in lengths], f"{named or 'one fill token'}, repeated; identical"
    if not pattern:
        name = f"windows of {model.text_name}" if model.text else _RANDOM
        return _unique(lengths, model, seed, typed), f"{name}; unique"
    own = _unique([min(length, FIRST_BLOCK) for length in lengths], model, seed, typed)
    prompts = [
        head + repeated(pattern, length)[: length - len(head)] for head, length in zip(own, lengths, strict=True)
    ]
    return prompts, f"{FIRST_BLOCK} tokens of its own, then {named}, repeated; unique"


def _unique(lengths: Sequence[int], model: WorkloadModel, seed: int, typed: str) -> list[list[int]]:
    return prompts_of(
        lengths,
        typed=typed,
        vocab_size=model.vocab_size,
        seed=seed,
        token_pool=model.text or None,
        mend="ask for shorter ones or smaller batches, or give a longer --kv-corpus",
    )


def _pattern(workload: ServingWorkload, model: WorkloadModel) -> tuple[list[int], str]:
    """Tokens that are repeated and their name; none for a prompt of text."""
    if workload.name == LONG and workload.token:
        typed = f"--kv-synthetic-token={workload.token}"
        return pattern_ids(workload.token, model.tokenizer, typed=typed), f"the text {workload.token!r}"
    if workload.name == LONG and workload.dialogue:
        return pattern_ids(DIALOGUE, model.tokenizer, typed="--kv-synthetic-dialogue"), "a dialogue"
    return [], ""


def _light(workload: ServingWorkload, model: WorkloadModel, seed: int, folder: str | None) -> _Made:
    fewest, most = LIGHT_TOKENS
    shape = _shape(workload, model)
    longest = most if shape is None else shape.tokens + most
    if workload.max_model_len - LIGHT_OUTPUT < longest:
        raise UserError(
            f"--kv-max-model-len={workload.max_model_len}: light-dataset has prompts of up to {longest} tokens and "
            f"{LIGHT_OUTPUT} of output; raise it, or leave light-dataset out of --kv-workloads"
        )
    new_tokens = [LIGHT_OUTPUT] * workload.requests
    if model.tokenizer is None and folder is None:
        import numpy as np

        lengths = np.random.default_rng([seed, 1]).integers(fewest, most + 1, size=workload.requests).tolist()
        typed = f"--kv-workloads={workload.name}"
        prompts = _unique(lengths, WorkloadModel(model.vocab_size), seed, typed)
        return prompts, new_tokens, {"source": "no tokenizer", "content": f"{_RANDOM}; unique"}
    candidates: Iterable[Sequence[int]] = model.passages
    if folder is not None:
        typed = f"--kv-dataset-dir={folder}"
        candidates = (_tokens(text, model.tokenizer, typed) for text in folder_prompts(folder))
    found: dict[tuple[int, ...], None] = {}
    seen = repeats = 0
    for ids in candidates:
        seen += 1
        if fewest <= len(ids) <= most:
            repeats += tuple(ids) in found
            found.setdefault(tuple(ids))
        if len(found) == workload.requests:
            break
    if len(found) < workload.requests:
        typed = f"--kv-dataset-dir={folder}" if folder else f"--kv-workloads={workload.name}"
        raise UserError(
            f"{typed}: {len(found)} different texts of {fewest} to {most} tokens among {seen}, {workload.requests} are needed; "
            f"give {'more' if folder else 'a --kv-dataset-dir that has more'}, or ask for smaller batches"
        )
    prompts = [list(ids) for ids in found]
    shared = len(prompts) - len({tuple(prompt[:FIRST_BLOCK]) for prompt in prompts})
    notes = [f"{repeats} texts came again and were left out"] * (repeats > 0)
    notes += [f"{shared} prompts begin with the same {FIRST_BLOCK} tokens as an earlier one"] * (shared > 0)
    return prompts, new_tokens, {"source": folder or model.text_name, "content": "whole texts", "notes": notes}


def _tokens(text: str, tokenizer: Any, typed: str) -> list[int]:
    if tokenizer is None:
        raise CaseInvalid(
            f"{typed}: the model has no tokenizer; leave the folder out, and prompts are drawn from the vocabulary"
        )
    return [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]


def _arrivals(
    workload: ServingWorkload, seed: int, rows: Sequence[TraceRow] | None, trace: str | None
) -> tuple[list[float], float | None]:
    """Scheduled arrivals and, of a trace, how many times as fast they are."""
    if workload.arrivals == CLOSED:
        return [0.0] * workload.requests, None
    if workload.arrivals == POISSON:
        assert workload.arrival_rate is not None
        return poisson_arrivals(workload.requests, rate=workload.arrival_rate, seed=seed), None
    times = times_of(rows or first_rows(str(trace), workload.requests), str(trace))
    scale = workload.time_scale
    if workload.arrival_rate is not None:
        natural = mean_rate(times)
        if natural is None:
            raise UserError(
                f"--kv-arrival-rate={workload.arrival_rate:g}: the rows of --kv-trace-conv={trace} all came at once, which no "
                "scale makes a rate; take --kv-arrivals=poisson"
            )
        scale = workload.arrival_rate / natural
    return trace_arrivals(times, time_scale=scale), scale


def _spread(numbers: Sequence[int]) -> dict[str, float]:
    return {"min": min(numbers), "median": median(numbers), "max": max(numbers), "sum": sum(numbers)}
