"""What the sessions share that hold a transformers model in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from kvsuite.case import Case
from kvsuite.errors import CaseInvalid
from kvsuite.models.image_files import image_processor, read_image
from kvsuite.models.images import ImagePixels, ImageShape, image_shape
from kvsuite.models.load import LoadedModel

from .decoder import Decoder
from .engine import EngineSettings, Session
from .loading import load_case_model
from .threads import choose_threads


class LoadedSession(Session):
    """A loaded transformers model.

    Parameters
    ----------
    case
        Names model, device and dtype.
    settings
        Without ``threads`` a probe chooses them.
    attention
        ``sdpa``, ``eager``, or ``auto``: sdpa where the model has it.
    sdpa
        What transformers calls the function that computes sdpa here.
    """

    #: of what kind `decoder` is
    decoder_class: ClassVar[type[Decoder]] = Decoder

    def __init__(self, case: Case, settings: EngineSettings, *, attention: str, sdpa: str = "sdpa") -> None:
        super().__init__()
        made = load_case_model(case, attention=attention, sdpa=sdpa, seed=settings.seed, cache_dir=settings.cache_dir)
        self._loaded: LoadedModel = made.loaded
        self.model = made.facts
        #: what the model makes of an image, or why it can be given none
        self.image_shape: ImageShape | str = image_shape(self._loaded.model.config.to_dict())
        self.decoder = self.decoder_class(self._loaded.model, self._loaded.text_config, self._loaded.device)
        threads = settings.threads
        if case.device_kind != "cpu":
            threads = None
        elif threads is None:
            threads = choose_threads(self.decoder.probe_step)
        else:
            torch.set_num_threads(threads)
        self._facts: dict[str, Any] = {
            "device": str(self.device),
            "dtype": self.dtype_name,
            "weight_format": made.weight_format,
            "threads": threads,
        }

    @property
    def dtype_name(self) -> str:
        return str(self._loaded.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        return self._loaded.device

    @property
    def tokenizer(self) -> Any:
        return self._loaded.tokenizer

    @property
    def vocab_size(self) -> int:
        rows, shape = int(self._loaded.text_config.vocab_size), self.image_shape
        if self.tokenizer is not None or isinstance(shape, str):
            return rows
        # prompts are drawn: what stands for an image is no token of a text, and lies behind those
        return min(rows, shape.token)

    def read_image(self, path: str, *, named: str) -> ImagePixels:
        """An image from a file, as the model's vision tower takes it.

        Raises
        ------
        UserError
            If it cannot be read.
        CaseInvalid
            If the model reads no images.
        """
        if isinstance(self.image_shape, str):
            raise CaseInvalid(f"{named}: {self.image_shape}; give a model that has one, dummy:LLaVA-1.5-7B say")
        processor = image_processor(self._loaded.spec, self.image_shape)
        return read_image(Path(path), self.image_shape, processor, named=named)

    def full_kv_bytes(self, tokens: int) -> int:
        return self.decoder.kv_bytes(self.decoder.full_lengths(tokens))
