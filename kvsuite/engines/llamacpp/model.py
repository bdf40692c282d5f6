"""A GGUF file in llama.cpp: its weights, and what the file says of its layers."""

from __future__ import annotations

import weakref
from pathlib import Path

from kvsuite.errors import UserError
from kvsuite.models.layers import ModelLayers, layers_of

from .kv_log import buffers_said
from .library import Library, failure
from .memory_model import FAMILIES


def refused_family(request: str, family: str) -> UserError:
    """That a model is none that this engine takes."""
    return UserError(
        f"--kv-model={request}: engine llamacpp takes models of the families {', '.join(FAMILIES)}, and this is {family}; use "
        "--kv-engine=hf, or another model"
    )


class Model:
    """Weights in llama.cpp.

    Parameters
    ----------
    library
        llama.cpp.
    path
        The file.
    request
        What the user typed.

    Attributes
    ----------
    family
        Its ``general.architecture``.
    of_layers
        What each layer stores.
    trained_length
        Positions that it promises.
    vocabulary, weights_bytes, parameters
        Counts, by llama.cpp.
    lookup_bytes
        Of weights that a step does not read: an embedding that is not the head too, but for a row a token.
    buffers
        Bytes of its buffers, by the log.

    Raises
    ------
    UserError
        If llama.cpp cannot load it, with its reason, or it is of another family.
    """

    def __init__(self, library: Library, path: Path, request: str) -> None:
        self.library = library
        parameters = library.c.llama_model_default_params()
        # the CPU's kernels alone, also where the wheel has others
        parameters.n_gpu_layers = 0
        with library.logged() as lines:
            handle = library.c.llama_model_load_from_file(str(path).encode(), parameters)
        if handle == library.ffi.NULL:
            raise UserError(f"--kv-model={request}: llama.cpp cannot load {path} ({failure(lines)}); give another file")
        self.handle = handle
        self._free = weakref.finalize(self, library.c.llama_model_free, handle)
        self.buffers = buffers_said(lines)
        self.vocabulary = int(library.c.llama_vocab_n_tokens(library.c.llama_model_get_vocab(handle)))
        self.weights_bytes = int(library.c.llama_model_size(handle))
        self.parameters = int(library.c.llama_model_n_params(handle))
        self.family = self._said("general.architecture") or "unknown"
        if self.family not in FAMILIES:
            self.close()
            raise refused_family(request, self.family)
        self.of_layers = self._layers(request)
        self.lookup_bytes = self._lookup(path)
        length = self._said(f"{self.family}.context_length")
        self.trained_length = None if length is None else int(length)

    def _layers(self, request: str) -> ModelLayers:
        found = {
            field: self._said(f"{self.family}.{name}")
            for field, name in (
                ("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"),
                ("num_attention_heads", "attention.head_count"), ("num_key_value_heads", "attention.head_count_kv"),
                ("head_dim", "attention.key_length"),
            )
        }  # fmt: skip
        try:
            return layers_of({name: int(said) for name, said in found.items() if said} | {"model_type": self.family})
        except (UserError, ValueError) as error:
            raise UserError(
                f"--kv-model={request}: the GGUF does not say its layers as a {self.family} model does ({error}); give another "
                "file"
            ) from error

    def _lookup(self, path: Path) -> int:
        c, null = self.library.c, self.library.ffi.NULL
        file = c.gguf_init_from_file(str(path).encode(), {"no_alloc": True, "ctx": null})
        if file == null:
            return 0
        try:
            head, embedding = (c.gguf_find_tensor(file, name) for name in (b"output.weight", b"token_embd.weight"))
            return 0 if head < 0 or embedding < 0 else int(c.gguf_get_tensor_size(file, embedding))
        finally:
            c.gguf_free(file)

    def _said(self, key: str) -> str | None:
        """Metadata of the file, as text."""
        room = self.library.ffi.new("char[]", 256)
        length = self.library.c.llama_model_meta_val_str(self.handle, key.encode(), room, 256)
        return None if length < 0 else str(self.library.ffi.string(room).decode(errors="replace"))

    def close(self) -> None:
        """Give the weights back; its contexts are closed before."""
        self._free()
