"""A context of llama.cpp: a cache for so many sequences, and the steps that go through it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsuite.cache_formats.ggml_format import GgmlFormat
from kvsuite.errors import CaseInvalid
from kvsuite.models.layers import ModelLayers

from .declarations import FLASH_ATTENTION, TYPE_NUMBERS
from .kv_log import MIB, buffers_said, caches_said, flash_attention_said
from .library import failure
from .memory_model import cache_bytes, cells_of
from .model import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

# what llama_state_seq_get_size counts beside keys and values: of the state and each stream, of each layer, of each token
_STATE_BYTES, _STREAM_BYTES, _LAYER_BYTES, _TOKEN_BYTES = 28, 4, 24, 12
_NO_ROOM = 1


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """What a context is made with.

    Parameters
    ----------
    tokens
        Of each sequence at most.
    sequences
        At the same time.
    batch
        Tokens of a step at most (``n_batch``).
    micro_batch
        Tokens that are computed together (``n_ubatch``).
    format
        Of keys and values.
    flash_attention
        ``auto``, ``on`` or ``off``.
    threads
        That compute.
    """

    tokens: int
    sequences: int = 1
    batch: int
    micro_batch: int
    format: GgmlFormat
    flash_attention: str = "auto"
    threads: int

    @property
    def cells(self) -> int:
        """Tokens of a sequence for which there is room."""
        return cells_of(self.tokens)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step at most: no more than there are cells."""
        return min(self.batch, self.cells * self.sequences)

    @property
    def together(self) -> int:
        """Tokens that are computed together at most."""
        return min(self.micro_batch, self.step_tokens)

    def cache_bytes(self, of: ModelLayers) -> int:
        """Bytes of keys and values that are allocated."""
        return self.sequences * cache_bytes(self.format, of, self.cells)


@dataclass(frozen=True)
class BatchToken:
    """One token of a step: its sequence and position, and whether its logits are wanted."""

    token: int
    position: int
    sequence: int = 0
    wanted: bool = False


class Context:
    """A cache and the threads that compute through it.

    Parameters
    ----------
    model
        The weights.
    of
        What each layer stores.
    settings
        See there.

    Attributes
    ----------
    effective
        What llama.cpp says that it took.
    buffers
        Bytes of its buffers, by its log.

    Raises
    ------
    CaseInvalid
        If llama.cpp makes none, or another one than was asked for.
    """

    def __init__(self, model: Model, of: ModelLayers, settings: ContextSettings) -> None:
        self.settings, self.vocabulary = settings, model.vocabulary
        self._model, self._layers = model, len(of.layers)
        self._library = library = model.library
        parameters = library.c.llama_context_default_params()
        parameters.n_ctx = settings.cells * settings.sequences
        parameters.n_seq_max = settings.sequences
        parameters.n_batch = settings.step_tokens
        parameters.n_ubatch = settings.together
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        parameters.type_k = TYPE_NUMBERS[settings.format.keys]
        parameters.type_v = TYPE_NUMBERS[settings.format.values]
        parameters.flash_attn_type = FLASH_ATTENTION[settings.flash_attention]
        with library.logged() as lines:
            handle = library.c.llama_init_from_model(model.handle, parameters)
        if handle == library.ffi.NULL:
            raise CaseInvalid(
                f"--kv-cache-dtype={settings.format}, --kv-flash-attention={settings.flash_attention}: llama.cpp makes no such "
                f"cache: {failure(lines)}; give another type, or --kv-flash-attention=on"
            )
        self._handle = handle
        self._free = weakref.finalize(self, library.c.llama_free, handle)
        self._memory = library.c.llama_get_memory(handle)
        self._rows = _Rows(library.ffi, settings.step_tokens)
        self.buffers = buffers_said(lines)
        self.effective = {"flash_attention": flash_attention_said(lines)} | self._checked(caches_said(lines), of)

    def _checked(self, caches: Sequence[Any], of: ModelLayers) -> dict[str, Any]:
        """What it took, where that is what was asked for."""
        c, asked = self._library.c, self.settings
        if len(caches) != 1:
            raise CaseInvalid(
                f"llama.cpp made {len(caches)} caches for this model, and one is measured; use --kv-engine=hf"
            )
        [said] = caches
        size = asked.cache_bytes(of)
        taken = {
            "keys": (asked.format.keys, said.keys),
            "values": (asked.format.values, said.values),
            "cells of a sequence": (asked.cells, int(c.llama_n_ctx_seq(self._handle))),
            "cells": (asked.cells, said.cells),
            "layers": (self._layers, said.layers),
            "sequences": (asked.sequences, int(c.llama_n_seq_max(self._handle))),
            "n_batch": (asked.step_tokens, int(c.llama_n_batch(self._handle))),
            "n_ubatch": (asked.together, int(c.llama_n_ubatch(self._handle))),
            "threads": (asked.threads, int(c.llama_n_threads(self._handle))),
            "MiB of keys and values": (f"{size / MIB:.2f}", f"{said.mib:.2f}"),
        }
        if other := [f"{name} {given}, not {wanted}" for name, (wanted, given) in taken.items() if given != wanted]:
            raise CaseInvalid(f"--kv-cache-dtype={asked.format}: llama.cpp took {'; '.join(other)}")
        return {
            "kv_cache_dtype": str(GgmlFormat(said.keys, said.values)),
            "cells": said.cells,
            "sequences": asked.sequences,
            "n_batch": taken["n_batch"][1],
            "n_ubatch": taken["n_ubatch"][1],
            "threads": taken["threads"][1],
        }

    def decode(self, rows: Sequence[BatchToken]) -> None:
        """Feed tokens, no more than a step takes.

        Raises
        ------
        CaseInvalid
            If the cache has no room for them.
        RuntimeError
            If llama.cpp fails, with its reason.
        """
        with self._library.logged() as lines:
            found = int(self._library.c.llama_decode(self._handle, self._rows.filled(rows)))
        if found == _NO_ROOM:
            raise CaseInvalid(
                f"the cache of {self.settings.cells} cells has no room for {len(rows)} tokens more; give a larger context"
            )
        if found:
            raise RuntimeError(f"llama_decode returned {found}: {failure(lines)}")

    def logits(self, index: int) -> NDArray[np.float32]:
        """Logits ``[vocabulary]`` of row ``index`` of the last step, which wanted them; valid until the next one."""
        found = self._library.c.llama_get_logits_ith(self._handle, index)
        if found == self._library.ffi.NULL:
            raise RuntimeError(f"llama.cpp has no logits of row {index}")
        size = self.vocabulary * 4
        return np.frombuffer(self._library.ffi.buffer(found, size), dtype=np.float32)

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on."""
        self._library.c.llama_set_n_threads(self._handle, threads, threads)

    def clear(self) -> None:
        """Forget all tokens; what was stored for them is overwritten by the next ones."""
        self._library.c.llama_memory_clear(self._memory, False)

    def remove(self, sequence: int, first: int, end: int) -> None:
        """Forget the tokens of a sequence at positions ``[first, end)``."""
        if not self._library.c.llama_memory_seq_rm(self._memory, sequence, first, end):
            raise RuntimeError(f"llama.cpp cannot remove the positions {first} to {end - 1} of a sequence")

    def copy(self, sequence: int, onto: int) -> None:
        """Make sequence ``onto`` hold what another one does; the cells are copied before the next step."""
        self._library.c.llama_memory_seq_cp(self._memory, sequence, onto, -1, -1)

    def shift(self, sequence: int, first: int, by: int) -> None:
        """Move the tokens from position ``first`` on; their keys are rotated before the next step."""
        self._library.c.llama_memory_seq_add(self._memory, sequence, first, -1, by)

    def stored_bytes(self, sequence: int, tokens: int) -> int:
        """Bytes of keys and values of a sequence that holds so many tokens, by the state that llama.cpp would save."""
        size = int(self._library.c.llama_state_seq_get_size(self._handle, sequence))
        beside = _STATE_BYTES + _STREAM_BYTES * self.settings.sequences + _LAYER_BYTES * self._layers
        return size - beside - _TOKEN_BYTES * tokens

    def close(self) -> None:
        """Give the cache back."""
        self._free()


class _Rows:
    """The arrays of a ``llama_batch``, seen by numpy."""

    def __init__(self, ffi: Any, size: int) -> None:
        self._ffi = ffi
        self._batch = ffi.new("struct llama_batch *")
        self._kept = {
            name: ffi.new(kind, size)
            for name, kind in (
                ("token", "int32_t[]"), ("pos", "int32_t[]"), ("n_seq_id", "int32_t[]"), ("own", "int32_t[]"),
                ("seq_id", "int32_t *[]"), ("logits", "int8_t[]"),
            )
        }  # fmt: skip
        own = self._kept["own"]
        for at in range(size):
            # every token is of one sequence, whose number stands in an array of ours
            self._kept["seq_id"][at] = own + at
            self._kept["n_seq_id"][at] = 1
        for name in ("token", "pos", "n_seq_id", "seq_id", "logits"):
            setattr(self._batch, name, self._kept[name])
        self._seen = {
            name: np.frombuffer(ffi.buffer(self._kept[name]), dtype=np.int8 if name == "logits" else np.int32)
            for name in ("token", "pos", "own", "logits")
        }

    def filled(self, rows: Sequence[BatchToken]) -> Any:
        count = len(rows)
        self._batch.n_tokens = count
        for name, values in (
            ("token", [row.token for row in rows]), ("pos", [row.position for row in rows]),
            ("own", [row.sequence for row in rows]), ("logits", [row.wanted for row in rows]),
        ):  # fmt: skip
            self._seen[name][:count] = values
        return self._batch[0]
