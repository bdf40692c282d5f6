from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.images import ImagePixels, ImageShape
from kvsuite.workloads.prompts import FIRST_BLOCK
from kvsuite.workloads.serving_requests import WorkloadModel, serving_requests
from kvsuite.workloads.serving_workload import LIGHT_OUTPUT, ServingWorkload
from kvsuite.workloads.texts import TextSource
from tests.tiny_checkpoint import byte_tokenizer

DUMMY = WorkloadModel(512)
LONG = ServingWorkload(name="synthetic-long", requests=4, max_model_len=4096)
LIGHT = replace(LONG, name="light-dataset")
HEAVY = replace(LONG, name="heavy-trace")


def own_blocks(prompts: list[list[int]]) -> int:
    return len({tuple(prompt[:FIRST_BLOCK]) for prompt in prompts})


def text_model(tokens: int = 9000) -> WorkloadModel:
    return WorkloadModel(10_000, byte_tokenizer(), list(range(tokens)), (), "a text")


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rows = [(40, 1100, 300), (10, 1300, 400), (30, 1200, 512), (20, 9000, 256), (25, 100, 300)]
    path = tmp_path / "trace.csv"
    path.write_text(
        "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *(",".join(map(str, row)) for row in rows), ""])
    )
    return str(path)


@given(
    requests=st.integers(1, 12),
    context=st.integers(1, 70),
    output=st.integers(-1, 40),
    vocabulary=st.integers(40, 300),
    seed=st.integers(0, 2**31),
    prompts=st.sampled_from(["unique", "identical"]),
)
def test_long_prompts_of_any_vocabulary(
    requests: int, context: int, output: int, vocabulary: int, seed: int, prompts: str
) -> None:
    workload = ServingWorkload(
        name="synthetic-long", requests=requests, max_model_len=64, context=context, output=output, prompts=prompts
    )
    made = serving_requests(workload, WorkloadModel(vocabulary), seed=seed)
    assert {len(prompt) for prompt in made.prompts} == {min(context, 64 - made.new_tokens[0])}
    assert set(made.new_tokens) == {output if output > 0 else 16}
    assert all(0 <= token < vocabulary for prompt in made.prompts for token in prompt)
    assert own_blocks(made.prompts) == (requests if prompts == "unique" else 1)
    assert made.arrivals_s == [0.0] * requests
    assert serving_requests(workload, WorkloadModel(vocabulary), seed=seed) == made
    json.dumps(made.facts, allow_nan=False)


def test_unique_prompts_are_windows_of_the_text() -> None:
    model = text_model()
    made = serving_requests(LONG, model, seed=0)
    assert all(prompt == list(range(prompt[0], prompt[0] + 3072)) for prompt in made.prompts)
    assert made.facts["content"] == "windows of a text; unique"
    assert made.prompts != serving_requests(LONG, model, seed=1).prompts


@pytest.mark.parametrize("model", [DUMMY, text_model()])
def test_a_smaller_batch_has_the_first_prompts_of_a_larger_one(model: WorkloadModel) -> None:
    larger = serving_requests(replace(LONG, requests=12), model, seed=5)
    assert serving_requests(replace(LONG, requests=5), model, seed=5).prompts == larger.prompts[:5]


@pytest.mark.parametrize(
    ("wishes", "named"), [({"token": "Hello"}, "the text 'Hello'"), ({"dialogue": True}, "a dialogue")]
)
def test_patterns(wishes: dict[str, Any], named: str) -> None:
    workload, model = replace(LONG, context=600, output=8, **wishes), text_model()
    same = serving_requests(replace(workload, prompts="identical"), model, seed=0)
    own = serving_requests(workload, model, seed=0)
    assert own_blocks(same.prompts) == 1
    assert own_blocks(own.prompts) == 4
    assert {len(prompt) for prompt in [*same.prompts, *own.prompts]} == {600}
    tails = {tuple(prompt[FIRST_BLOCK:]) for prompt in own.prompts}
    assert tails == {tuple(same.prompts[0][: 600 - FIRST_BLOCK])}
    assert same.facts["content"] == f"{named}, repeated; identical"
    assert named in own.facts["content"]
    with pytest.raises(CaseInvalid, match=r"no tokenizer"):
        serving_requests(workload, DUMMY, seed=0)


def test_the_token_wins_over_the_dialogue() -> None:
    model = text_model()
    both = serving_requests(replace(LONG, token="Hello", dialogue=True, prompts="identical"), model, seed=0)
    assert both.prompts == serving_requests(replace(LONG, token="Hello", prompts="identical"), model, seed=0).prompts


def test_identical_prompts_repeat_the_fill_token() -> None:
    made = serving_requests(replace(LONG, prompts="identical"), text_model(), seed=0)
    (first,) = byte_tokenizer()(" ")["input_ids"]
    assert {token for prompt in made.prompts for token in prompt} == {first}
    assert made.facts["content"] == "one fill token, repeated; identical"


def test_a_text_that_is_too_short_for_the_prompts() -> None:
    with pytest.raises(
        UserError, match=r"^--kv-synthetic-context=3072: the corpus of 3074 tokens .*longer --kv-corpus$"
    ):
        serving_requests(LONG, text_model(3074), seed=0)


def test_heavy_trace(trace: str) -> None:
    made = serving_requests(HEAVY, DUMMY, seed=0, trace=trace)
    assert [len(prompt) for prompt in made.prompts] == [4096 - 256, 1300, 1200, 1100]
    assert made.new_tokens == [256, 400, 512, 300]
    assert own_blocks(made.prompts) == 4
    assert made.arrivals_s == [0.0] * 4
    assert made.facts["notes"] == ["1 of 4 contexts clipped to what the output leaves of 4096"]
    fewer = serving_requests(replace(HEAVY, requests=2), DUMMY, seed=0, trace=trace)
    assert [len(prompt) for prompt in fewer.prompts] == [3840, 1300]


def test_heavy_trace_as_it_arrives(trace: str) -> None:
    made = serving_requests(replace(HEAVY, arrivals="trace", time_scale=10.0), DUMMY, seed=0, trace=trace)
    assert made.arrivals_s == [0.0, 1.0, 2.0, 3.0]
    assert made.new_tokens == [400, 256, 512, 300]
    at_rate = serving_requests(replace(HEAVY, arrivals="trace", arrival_rate=0.5), DUMMY, seed=0, trace=trace)
    assert at_rate.arrivals_s == pytest.approx([0.0, 2.0, 4.0, 6.0])
    assert at_rate.facts["arrivals"]["time_scale"] == pytest.approx(5.0)
    assert at_rate.prompts == made.prompts


def test_arrivals_of_a_trace_for_other_prompts(trace: str) -> None:
    made = serving_requests(replace(LONG, requests=3, arrivals="trace"), DUMMY, seed=0, trace=trace)
    assert made.arrivals_s == [0.0, 10.0, 15.0]


def test_no_trace_and_nothing_left_of_a_context(trace: str) -> None:
    with pytest.raises(UserError, match=r"^--kv-trace-conv: no trace is given, and the heavy-trace workload"):
        serving_requests(HEAVY, DUMMY, seed=0)
    with pytest.raises(UserError, match=r"^--kv-trace-conv: no trace is given, and --kv-arrivals=trace"):
        serving_requests(replace(LONG, arrivals="trace"), DUMMY, seed=0)
    with pytest.raises(UserError, match=rf"^--kv-trace-conv={trace}: 512 output tokens leave no room .*at most 500"):
        serving_requests(replace(HEAVY, max_model_len=500), DUMMY, seed=0, trace=trace)


def test_poisson() -> None:
    workload = replace(LONG, requests=5, arrivals="poisson", arrival_rate=2.0)
    made = serving_requests(workload, DUMMY, seed=0)
    assert made.arrivals_s[0] == 0.0
    assert made.arrivals_s == sorted(set(made.arrivals_s))
    assert made.facts["arrivals"]["rate"] == pytest.approx(4 / made.arrivals_s[-1])
    # arrivals are drawn apart from prompts: other prompts, the same arrivals
    assert serving_requests(replace(workload, context=40), DUMMY, seed=0).arrivals_s == made.arrivals_s
    assert serving_requests(replace(LONG, requests=5), DUMMY, seed=0).prompts == made.prompts


def folder_of(tmp_path: Path, *texts: str) -> str:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(tmp_path)


def test_light_texts_of_a_folder(tmp_path: Path) -> None:
    texts = ["x" * 31, "a" * 32, "b" * 129, "c" * 128, "a" * 32, "d" * 50, "d" * 60, "e" * 50]
    folder = folder_of(tmp_path, *texts)
    model = WorkloadModel(258, byte_tokenizer())
    made = serving_requests(LIGHT, model, seed=0, dataset_dir=folder)
    assert [len(prompt) for prompt in made.prompts] == [32, 128, 50, 60]
    assert made.new_tokens == [LIGHT_OUTPUT] * 4
    assert made.facts["notes"] == [
        "1 texts came again and were left out",
        "1 prompts begin with the same 16 tokens as an earlier one",
    ]
    with pytest.raises(
        UserError, match=r"--kv-dataset-dir=.*: 5 different texts of 32 to 128 tokens among 8, 6 are needed"
    ):
        serving_requests(replace(LIGHT, requests=6), model, seed=0, dataset_dir=folder)
    with pytest.raises(CaseInvalid, match=r"^--kv-dataset-dir=.*no tokenizer"):
        serving_requests(LIGHT, DUMMY, seed=0, dataset_dir=folder)


def test_light_dataset_of_a_model_without_tokenizer() -> None:
    made = serving_requests(replace(LIGHT, requests=200), DUMMY, seed=0)
    lengths = {len(prompt) for prompt in made.prompts}
    assert min(lengths) == 32
    assert max(lengths) == 128
    assert own_blocks(made.prompts) == 200
    assert made.facts["source"] == "no tokenizer"
    with pytest.raises(UserError, match=r"^--kv-max-model-len=191: light-dataset"):
        serving_requests(replace(LIGHT, max_model_len=191), DUMMY, seed=0)


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    model = WorkloadModel(50, byte_tokenizer())
    with pytest.raises(CaseInvalid, match=r"embedding has 50 rows"):
        serving_requests(replace(LIGHT, requests=1), model, seed=0, dataset_dir=folder_of(tmp_path, "a" * 40))


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"name": "heavy"}, r"^--kv-workloads=heavy: unknown; use heavy-trace, light-dataset, synthetic-long"),
        ({"prompts": "same"}, r"^serving workload: prompts=same: unknown; use unique, identical"),
        ({"arrivals": "open"}, r"^--kv-arrivals=open: unknown; use closed, poisson, trace"),
        ({"requests": 0}, r"0 requests"),
        ({"arrivals": "poisson"}, r"^--kv-arrivals=poisson: give --kv-arrival-rate"),
        ({"arrival_rate": 1.0}, r"^--kv-arrival-rate=1: all requests arrive at once"),
        ({"arrivals": "trace", "arrival_rate": -1.0}, r"^--kv-arrival-rate=-1: must be a number above 0"),
        ({"time_scale": 2.0}, r"^--kv-trace-time-scale=2: goes with"),
        ({"arrivals": "trace", "arrival_rate": 1.0, "time_scale": 2.0}, r"^--kv-trace-time-scale=2: goes with"),
    ],
)
def test_impossible_workloads(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(LONG, **wishes)


def test_a_workload_as_json() -> None:
    workload = replace(HEAVY, arrivals="trace", time_scale=3.0)
    assert ServingWorkload.of(json.loads(json.dumps(workload.to_dict())) | {"batch": 4}) == workload


def test_texts_inside_kvsuite() -> None:
    tokenizer = byte_tokenizer()
    session: Any = SimpleNamespace(tokenizer=tokenizer, vocab_size=258)
    texts = TextSource()
    light = texts.serving(session, replace(LIGHT, requests=8), seed=0)
    assert all(32 <= len(prompt) <= 128 for prompt in light.prompts)
    assert len({tuple(prompt) for prompt in light.prompts}) == 8
    long = texts.serving(session, LONG, seed=0)
    assert light.facts["source"] == "default and pydoc"
    assert long.facts["content"] == "windows of default and pydoc; unique"
    assert any(" the " in tokenizer.decode(prompt) for prompt in long.prompts)
    blind: Any = SimpleNamespace(tokenizer=None, vocab_size=64)
    assert "vocabulary" in texts.serving(blind, LONG, seed=0).facts["content"]


def test_a_corpus_in_the_place_of_those_inside(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("one two three " * 400 + "\n\n" + "four " * 20)
    session: Any = SimpleNamespace(tokenizer=byte_tokenizer(), vocab_size=258)
    corpus = str(tmp_path / "own.txt")
    made = TextSource().serving(session, replace(LONG, context=200, requests=3), seed=0, corpus=corpus)
    assert set(byte_tokenizer().decode([token for prompt in made.prompts for token in prompt])) <= set("onetwhrfu \n")
    assert made.facts["content"] == "windows of own.txt; unique"
    light = TextSource().serving(session, replace(LIGHT, requests=1), seed=0, corpus=corpus)
    assert byte_tokenizer().decode(light.prompts[0]).strip() == ("four " * 20).strip()


SEES = WorkloadModel(500, image_shape=ImageShape(size=28, tokens=576, token=510))
IMAGE = replace(LONG, image="random")


def test_an_image_takes_its_tokens_of_the_prompt() -> None:
    """The lengths of the original: 4096 clipped to 3968, of which 576 are the image's."""
    made = serving_requests(replace(IMAGE, context=4096, output=128), SEES, seed=3)
    assert {len(prompt) for prompt in made.prompts} == {3968}
    assert {tuple(prompt[:576]) for prompt in made.prompts} == {(510,) * 576}
    assert {sum(token == 510 for token in prompt) for prompt in made.prompts} == {576}
    # what stands behind it is no two requests' own, and neither is the image
    assert own_blocks([prompt[576:] for prompt in made.prompts]) == 4
    assert len({one.digest for one in made.images}) == 4
    assert made.facts["image"] == {"source": "random", "tokens": 576, "size": 28}
    again, other = (serving_requests(replace(IMAGE, context=4096, output=128), SEES, seed=seed) for seed in (3, 4))
    assert [one.digest for one in again.images] == [one.digest for one in made.images]
    assert again.facts["prompts_hash"] == made.facts["prompts_hash"]
    assert not {one.digest for one in other.images} & {one.digest for one in made.images}


def test_identical_prompts_have_one_image_and_a_file_is_everybodys() -> None:
    identical = replace(IMAGE, context=600, output=8, prompts="identical")
    made = [serving_requests(identical, SEES, seed=seed) for seed in (1, 2)]
    assert len({one.digest for requests in made for one in requests.images}) == 1
    photo = ImagePixels(np.ones((3, 28, 28)))
    of_file = serving_requests(replace(IMAGE, context=600, output=8, image="photo.png"), SEES, seed=1, image=photo)
    assert {one.digest for one in of_file.images} == {photo.digest}
    # what is in the file is part of what was served
    other = serving_requests(
        replace(IMAGE, context=600, output=8, image="photo.png"), SEES, seed=1, image=ImagePixels(np.zeros((3, 28, 28)))
    )
    assert other.prompts == of_file.prompts
    assert other.facts["prompts_hash"] != of_file.facts["prompts_hash"]


def test_texts_of_light_dataset_come_behind_the_image() -> None:
    made = serving_requests(replace(LIGHT, image="random"), SEES, seed=1)
    assert all(prompt[:576] == [510] * 576 and 32 <= len(prompt) - 576 <= 128 for prompt in made.prompts)
    with pytest.raises(UserError, match=r"--kv-max-model-len=700: light-dataset has prompts of up to 704 tokens"):
        serving_requests(replace(LIGHT, image="random", max_model_len=700), SEES, seed=1)


def test_a_prompt_without_room_and_a_model_without_a_tower() -> None:
    with pytest.raises(
        UserError, match=r"--kv-synthetic-context=576: a prompt of 576 tokens has no room for an image of 576"
    ):
        serving_requests(replace(IMAGE, context=576, output=8), SEES, seed=1)
    with pytest.raises(
        CaseInvalid, match=r"--kv-pipeline-image=random: qwen3 has no vision tower; leave it out, or give"
    ):
        serving_requests(IMAGE, WorkloadModel(512, image_shape="qwen3 has no vision tower"), seed=1)


def test_a_workload_without_an_image_is_what_it_was() -> None:
    assert "image" not in LONG.to_dict()
    assert ServingWorkload.of(IMAGE.to_dict()) == IMAGE
