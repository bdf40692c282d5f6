"""From pixels to features: the vision tower of a loaded transformers model, and the projector behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .images import ImagePixels


class ImageReader:
    """Makes what stands in the place of an image's tokens.

    Parameters
    ----------
    model
        A transformers model for whose configuration `kvsuite.models.images.image_shape` names a shape.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def features(self, image: ImagePixels) -> Tensor:
        """Features ``[tokens, hidden]`` of one image.

        One at a time: they depend on nothing else then, so that equal images have equal ones, whoever else is served.
        """
        device, dtype = self._model.device, self._model.dtype
        pixels = torch.from_numpy(image.pixels)[None]
        if device.type == "cuda":
            # a copy from other memory would wait for all that the stream was given
            pixels = pixels.pin_memory().to(device, non_blocking=True)
        pixels = pixels.to(device, dtype)
        with torch.inference_mode():
            found = self._model.get_image_features(pixel_values=pixels, return_dict=True)
            # a list, one an image, or a tensor: by release
            parts = getattr(found, "pooler_output", found)
            return torch.cat(list(parts)).to(dtype)
