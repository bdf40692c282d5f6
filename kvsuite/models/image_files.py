"""Images from files: pictures that are resized as the model's checkpoint says, or pixels as its vision tower takes them."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.errors import UserError

from .images import ImagePixels, ImageShape
from .resolve import ModelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: picture ``[height, width, 3]`` in uint8 -> pixels ``[3, size, size]``
Processor = Callable[["NDArray[Any]"], "NDArray[Any]"]
_FORMATS = ("PNG", "JPEG")
#: of a picture, so that one of few bytes cannot ask for gigabytes: decoded, or resized by its shorter side
_MOST_PIXELS, _MOST_RATIO = 32 << 20, 50
_PROCESSOR = "preprocessor_config.json"


def read_image(path: Path, shape: ImageShape, processor: Processor, *, named: str) -> ImagePixels:
    """Read an image of a model.

    Parameters
    ----------
    path
        A PNG or JPEG file, or a .npy file (never pickled) with a picture, uint8 ``[height, width, 3]``, or with pixels as the
        vision tower takes them, floats ``[3, size, size]``.
    shape
        What the model makes of an image.
    processor
        Makes pixels of a picture.
    named
        The option and its value, for messages.

    Raises
    ------
    UserError
        If the file cannot be read, or holds no such image, or a picture of more than 32 megapixels, of a side more than 50
        times the other, or of more than 8 bits a channel.
    """
    import numpy as np

    if not path.is_file():
        raise UserError(f"{named}: no such file; give a PNG, JPEG or .npy file, or random")
    try:
        found = _stored(path, named) if path.suffix == ".npy" else _picture(path, named)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{named}: Pillow reads pictures and is not installed; pip install pillow, or give .npy"
        ) from error
    except Exception as error:  # whatever a broken file does
        said = textwrap.shorten(str(error), 200, placeholder=" …")
        raise UserError(
            f"{named}: cannot be read ({type(error).__name__}: {said}); give a whole PNG, JPEG or .npy file"
        ) from error
    is_picture = found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size > 0
    expected = (3, shape.size, shape.size)
    if is_picture:
        found = processor(np.array(found))
    if found.shape != expected or not np.issubdtype(found.dtype, np.floating):
        raise UserError(
            f"{named}: holds {found.dtype} {list(found.shape)}, and the model reads {list(expected)} floats; give those, or a "
            "picture of uint8 [height, width, 3]"
        )
    try:
        return ImagePixels(found)
    except UserError as error:
        raise UserError(f"{named}: {error}") from error


def image_processor(spec: ModelSpec, shape: ImageShape) -> Processor:
    """How pictures become pixels: as the checkpoint's ``preprocessor_config.json`` says, as CLIP does where it has none.

    transformers' own processor, the one on Pillow where torchvision is not installed.
    """

    def processed(picture: NDArray[Any]) -> NDArray[Any]:
        try:
            return _pixels(_made(spec, shape), picture)
        except ImportError as error:
            raise UserError(
                f"--kv-model={spec.request}: pictures are resized with Pillow, which is not installed; pip install pillow, or "
                f"give a .npy file of floats [3, {shape.size}, {shape.size}]"
            ) from error
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"--kv-model={spec.request}: its {_PROCESSOR} makes no pixels of a picture ({type(error).__name__}: "
                f"{textwrap.shorten(str(error), 200, placeholder=' …')}); give a .npy file of floats "
                f"[3, {shape.size}, {shape.size}]"
            ) from error

    return processed


def _stored(path: Path, named: str) -> NDArray[Any]:
    import numpy as np

    # its header alone: nothing more is read of what is refused
    found: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    if found.dtype == np.uint8 and found.ndim == 3:
        _refuse_size(found.shape[1], found.shape[0], named)
    return found


def _picture(path: Path, named: str) -> NDArray[Any]:
    import numpy as np
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # of Pillow's own, higher limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(path, formats=_FORMATS)
    with opened:
        _refuse_size(*opened.size, named)
        if opened.mode.startswith(("I", "F")):
            raise UserError(
                f"{named}: has more than 8 bits a channel (Pillow's mode {opened.mode}); give a picture of 8"
            )
        # a camera writes which side is up beside the pixels
        found: NDArray[Any] = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    return found


def _refuse_size(width: int, height: int, named: str) -> None:
    short, long = sorted((width, height))
    if width * height > _MOST_PIXELS or long > _MOST_RATIO * short > 0:
        raise UserError(
            f"{named}: is a picture of {width} x {height} pixels; give one of at most {_MOST_PIXELS >> 20} megapixels whose "
            f"longer side is at most {_MOST_RATIO} times the shorter one"
        )


def _made(spec: ModelSpec, shape: ImageShape) -> Any:
    import transformers
    from transformers.utils import cached_file

    if spec.kind in ("local", "hub"):
        only: dict[str, Any] = {"local_files_only": True}
        own = cached_file(spec.source, _PROCESSOR, _raise_exceptions_for_missing_entries=False, **only)
        if own is not None:
            return transformers.AutoImageProcessor.from_pretrained(spec.source, **only)
    sizes = {"shortest_edge": shape.size}, {"height": shape.size, "width": shape.size}
    # releases before 5.3 had one class, on Pillow
    made: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return made(size=sizes[0], crop_size=sizes[1])


def _pixels(processor: Any, picture: NDArray[Any]) -> NDArray[Any]:
    made = processor(images=picture, input_data_format="channels_last", return_tensors="np")
    found: NDArray[Any] = made["pixel_values"][0]
    return found
