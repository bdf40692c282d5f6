"""Requests with images on both engines that hold a transformers model: the tokens of `generate`, and one line for the rest."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_sessions import CountingClock, session
from PIL import Image

from kvsuite.case import Case
from kvsuite.engines.capabilities import ReadsImages, ServesUnderLoad, refuse_load
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.images import ImagePixels, ImageShape

SHAPE = ImageShape(size=28, tokens=4, token=510)
NEW = 8


def case(engine: str, **changes: Any) -> Case:
    fields: dict[str, Any] = {
        "suite": "compression", "engine": engine, "model": "dummy:tiny-llava", "name": "baseline", "device": "cpu",
        "dtype": "float32",
    }  # fmt: skip
    return Case(**(fields | changes))


@functools.cache
def opened(engine: str) -> Any:
    """Weights are widened: with the usual ones attention is flat, and nothing that an image does would show."""
    built = {"hf": HfSession, "nano": NanoSession}[engine](case(engine), EngineSettings(threads=1))
    with torch.no_grad():
        for name, weight in built._loaded.model.named_parameters():
            if "norm" not in name and "embed" not in name:
                weight.mul_(8)
    return built


def image(seed: int) -> ImagePixels:
    return ImagePixels(np.random.default_rng(seed).normal(size=(3, SHAPE.size, SHAPE.size)))


def requests() -> list[ServeRequest]:
    text = np.random.default_rng(0).integers(3, 500, size=60).tolist()
    place = [SHAPE.token] * SHAPE.tokens
    return [
        ServeRequest(place + text[:20], NEW, images=(image(1),)),
        ServeRequest(text[20:50], NEW),
        ServeRequest(text[:5] + place + text[5:11] + place, NEW, images=(image(2), image(1))),
    ]


def png(mode: str, width: int, height: int) -> bytes:
    found = io.BytesIO()
    Image.new(mode, (width, height)).save(found, "PNG")
    return found.getvalue()


def zipped() -> bytes:
    found = io.BytesIO()
    np.savez(found, pixels=np.zeros(3))
    return found.getvalue()


def generated(model: Any, request: ServeRequest) -> list[int]:
    given: dict[str, Any] = {}
    if request.images:
        given["pixel_values"] = torch.from_numpy(np.stack([one.pixels for one in request.images]))
    ids = torch.tensor([list(request.prompt)])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0, **given,
    )  # fmt: skip
    return [int(token) for token in out[0, len(request.prompt) :]]


def test_hf_gives_the_tokens_of_generate() -> None:
    built = opened("hf")
    built.prepare(case("hf"))
    assert built.image_shape == SHAPE
    wanted = [generated(built._loaded.model, one) for one in requests()]
    assert [built.serve([one]).outputs[0] for one in requests()] == wanted
    timed = [built.serve([one], CountingClock()).outputs[0] for one in requests()[:1]]
    assert timed == wanted[:1]
    # the memory pass computes the same request: its cache holds all of it
    assert set(built.memory(requests()[:1]).lengths_decode) == {len(requests()[0].prompt) + NEW - 1}
    # and without its image it would go on in another way
    assert wanted[0] != generated(built._loaded.model, ServeRequest(requests()[0].prompt, NEW, images=(image(3),)))


def test_nano_serves_images_and_text_together() -> None:
    wanted = [generated(opened("hf")._loaded.model, one) for one in requests()]
    built = opened("nano")
    built.prepare(case("nano"))
    assert isinstance(built, ReadsImages)
    assert isinstance(built, ServesUnderLoad)
    assert built.serve(requests()).outputs == wanted
    assert built.serve_dense(requests()).outputs == wanted
    assert set(built.memory(requests()[:1]).lengths_decode) == {len(requests()[0].prompt) + NEW - 1}


def test_ids_of_a_text_end_before_that_of_images() -> None:
    """Prompts of random ids are drawn below it: by chance one would have an image token and no image."""
    assert opened("nano").vocab_size == SHAPE.token


@pytest.mark.parametrize("engine", ["hf", "nano"])
def test_a_request_that_says_something_else_than_its_images_is_refused(engine: str) -> None:
    built = opened(engine)
    built.prepare(case(engine))
    with pytest.raises(
        CaseInvalid, match=r"request of 5 tokens: the prompt has image tokens .4 times token 510. and no"
    ):
        built.serve([ServeRequest([510, 510, 510, 510, 5], 2)])
    with pytest.raises(CaseInvalid, match=r"request of 2 tokens: 1 image.s. of 4 tokens each, and the prompt has 0"):
        built.serve([ServeRequest([5, 6], 2, images=(image(1),))])
    # others go on
    assert len(built.serve([ServeRequest([5, 6], 2)]).outputs[0]) == 2


def test_a_model_without_a_vision_tower() -> None:
    session().prepare(case("hf", model="dummy:tiny"))
    with pytest.raises(
        CaseInvalid, match=r"llama has no vision tower; leave the image out, or give a model that has one"
    ):
        session().serve([ServeRequest([5, 6], 2, images=(image(1),))])
    with pytest.raises(CaseInvalid, match=r"--kv-pipeline-image=x.npy: llama has no vision tower"):
        session().read_image("x.npy", named="--kv-pipeline-image=x.npy")


def test_engines_of_text_alone_refuse_images() -> None:
    with pytest.raises(CaseInvalid, match=r"engine mlc takes text alone, no images; use --kv-engine=nano"):
        refuse_load([ServeRequest([5], 2, images=(image(1),))], "mlc")


def test_a_picture_of_any_size_becomes_pixels(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, size=(40, 31, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", picture)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    built = opened("nano")
    found = [built.read_image(str(tmp_path / name), named="x") for name in ("picture.npy", "picture.png")]
    assert found[0].digest == found[1].digest
    # by hand: the shorter side to 28, the middle of the longer one, CLIP's mean and deviation
    small = Image.fromarray(picture).resize((28, 28 * 40 // 31), resample=Image.Resampling.BICUBIC)
    middle = np.asarray(small, dtype=np.float64)[(small.height - 28) // 2 :][:28] / 255
    by_hand = (middle - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    np.testing.assert_allclose(found[0].pixels, by_hand.transpose(2, 0, 1), atol=1e-5)


def test_a_photograph_stands_as_its_camera_says(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, size=(40, 31, 3), dtype=np.uint8)
    turned, exif = Image.fromarray(picture), Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    np.save(tmp_path / "upright.npy", np.rot90(picture, -1))
    found = [opened("nano").read_image(str(tmp_path / name), named="x") for name in ("turned.png", "upright.npy")]
    assert found[0].digest == found[1].digest


def test_pixels_are_taken_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", image(4).pixels)
    assert opened("hf").read_image(str(tmp_path / "pixels.npy"), named="x").digest == image(4).digest


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [
        ("none.png", None, "no such file; give a PNG, JPEG or .npy file, or random"),
        ("broken.png", b"\x89PNG\r\n\x1a\nrest", "cannot be read .*; give a whole PNG, JPEG or .npy file"),
        ("broken.npy", b"no numpy", "cannot be read .*; give a whole PNG, JPEG or .npy file"),
        ("objects.npy", np.array([{}], dtype=object), "cannot be read .ValueError: .*Python objects"),
        (
            "small.npy",
            np.zeros((3, 14, 28), dtype=np.float32),
            "holds float32 .3, 14, 28., and the model reads .3, 28, 28.",
        ),
        ("whole.npy", np.zeros((3, 28, 28), dtype=np.int64), "holds int64 .3, 28, 28., and the model reads"),
        ("nan.npy", np.full((3, 28, 28), np.nan), "image: a pixel is infinite or no number"),
        ("large.npy", np.full((3, 28, 28), 1e300), "image: a pixel is infinite or no number"),
        ("zipped.npy", zipped, "cannot be read .*; give a whole PNG, JPEG or .npy file"),
        (
            "long.png",
            png("L", 20_000, 1),
            "is a picture of 20000 x 1 pixels; give one of at most 32 megapixels whose longer",
        ),
        (
            "large.png",
            lambda: png("1", 9_500, 9_500),
            "is a picture of 9500 x 9500 pixels; give one of at most 32 megapixels",
        ),
        ("long.npy", np.zeros((1, 51, 3), dtype=np.uint8), "is a picture of 51 x 1 pixels; give one"),
        (
            "deep.png",
            lambda: png("I;16", 30, 30),
            "has more than 8 bits a channel .Pillow's mode I.*; give a picture of 8",
        ),
    ],
)
def test_a_file_that_holds_no_image(name: str, made: Any, said: str, tmp_path: Path) -> None:
    if callable(made):
        made = made()
    if isinstance(made, bytes):
        (tmp_path / name).write_bytes(made)
    elif made is not None:
        np.save(tmp_path / name, made, allow_pickle=True)
    with pytest.raises(UserError, match=rf"^--kv-pipeline-image=I: {said}"):
        opened("nano").read_image(str(tmp_path / name), named="--kv-pipeline-image=I")


def test_images_and_text_are_merged_apart_alike_on_both_engines() -> None:
    merging: Any = {"policy": "mean_pool", "policy_params": {"factor": 2.0}, "name": "mean_pool"}
    hf, nano = opened("hf"), opened("nano")
    nano.prepare(case("nano", **merging))
    together = nano.serve(requests())
    hf.prepare(case("hf", **merging))
    assert together.outputs == [hf.serve([one]).outputs[0] for one in requests()]
    # text of 5, image, text of 6, image: 2 + 1 left over, 2, 3, 2
    [last] = requests()[2:]
    assert set(hf.memory([last]).lengths_decode) == {3 + 2 + 3 + 2 + NEW - 1}
    assert set(nano.memory([last]).lengths_prefill) == {3 + 2 + 3 + 2}
