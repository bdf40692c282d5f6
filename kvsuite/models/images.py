"""Images that a vision-language model is given: pixels, where they stand in a prompt, and what is no image for the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvsuite.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageShape:
    """What a model makes of an image.

    Parameters
    ----------
    size
        Pixels on a side.
    tokens
        Places that one image takes in a prompt.
    token
        The id that stands there; it is no token of a text.
    """

    size: int
    tokens: int
    token: int


@dataclass(frozen=True, eq=False)
class ImagePixels:
    """An image as a vision tower takes it: resized, cropped, normalised.

    Parameters
    ----------
    pixels
        ``[3, height, width]``, copied in float32.

    Raises
    ------
    UserError
        If they have another shape, or one is no number.
    """

    pixels: NDArray[Any]

    def __post_init__(self) -> None:
        import numpy as np

        # a copy: whoever has the array may write to it, or may not
        with np.errstate(over="ignore"):  # is infinite then, and refused
            found = np.array(self.pixels, dtype=np.float32, order="C")
        if found.ndim != 3 or found.shape[0] != 3:
            raise UserError(
                f"image of shape {list(found.shape)}: pixels are [3, height, width], red, green and blue; give such an array"
            )
        if not np.isfinite(found).all():
            raise UserError("image: a pixel is infinite or no number; give finite ones")
        object.__setattr__(self, "pixels", found)

    @cached_property
    def digest(self) -> bytes:
        """Of shape and pixels: equal images have equal ones."""
        shape = ",".join(map(str, self.pixels.shape))
        return hashlib.blake2b(shape.encode() + b":" + self.pixels.tobytes(), digest_size=16).digest()


def image_shape(fields: Mapping[str, Any]) -> ImageShape | str:
    """What a model makes of an image, or why it can be given none.

    Parameters
    ----------
    fields
        Of its configuration, all of them.
    """
    kind, vision = fields.get("model_type"), fields.get("vision_config") or {}
    if not vision:
        return f"{kind} has no vision tower"
    if kind != "llava" or vision.get("model_type") != "clip_vision_model":
        tower = vision.get("model_type", "a vision tower")
        return f"images of {kind} with {tower} are not read here, those of llava with CLIP are"
    size = int(vision["image_size"])
    patches = (size // int(vision["patch_size"])) ** 2
    # "full" keeps the class token of the tower
    tokens = patches + (fields["vision_feature_select_strategy"] == "full")
    # transformers calls it by either name
    token = next(fields[name] for name in ("image_token_id", "image_token_index") if fields.get(name) is not None)
    return ImageShape(size, tokens, int(token))


def image_places(shape: ImageShape | str, prompt: Sequence[int]) -> NDArray[Any]:
    """Places of a prompt where an image's features stand, in order, int64 ``[n]``."""
    import numpy as np

    tokens = np.asarray(prompt, dtype=np.int64)
    return np.flatnonzero(tokens == (-1 if isinstance(shape, str) else shape.token))


def image_spans(shape: ImageShape | str, places: NDArray[Any]) -> tuple[tuple[int, int], ...]:
    """Where each image stands, first token and the one behind its last; one that text parts is several."""
    import numpy as np

    if isinstance(shape, str) or not len(places):
        return ()
    begins = np.flatnonzero((np.diff(places, prepend=-2) != 1) | (np.arange(len(places)) % shape.tokens == 0))
    ends = np.append(begins[1:], len(places)) - 1
    return tuple((int(places[begin]), int(places[end]) + 1) for begin, end in zip(begins, ends, strict=True))


def image_problem(shape: ImageShape | str, prompt: Sequence[int], images: Sequence[ImagePixels]) -> str | None:
    """Why a prompt and its images do not belong together, ``None`` if they do."""
    if isinstance(shape, str):
        return f"{shape}; leave the image out, or give a model that has one" if images else None
    for image in images:
        _, height, width = image.pixels.shape
        if (height, width) != (shape.size, shape.size):
            return f"an image of {width} x {height} pixels, and the model reads {shape.size} x {shape.size}; resize it"
    places = len(image_places(shape, prompt))
    if places == shape.tokens * len(images):
        return None
    if not images:
        return (
            f"the prompt has image tokens ({places} times token {shape.token}) and no image; give one, or take them out"
        )
    return (
        f"{len(images)} image(s) of {shape.tokens} tokens each, and the prompt has {places} image tokens ({shape.token}); "
        "give as many as the images take"
    )
