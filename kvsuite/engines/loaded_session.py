"""What the sessions share that hold a transformers model in this process."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from kvsuite.case import Case
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
        return int(self._loaded.text_config.vocab_size)

    def full_kv_bytes(self, tokens: int) -> int:
        return self.decoder.kv_bytes(self.decoder.full_lengths(tokens))
