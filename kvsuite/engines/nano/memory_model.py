"""Memory of the `nano` engine: weights, the pool of blocks, and the workspace of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvsuite.cache_formats.by_layer import OwnFormat, kv_bytes
from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.cache_formats.chosen_format import PARAMETER
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.design_point import DesignPoint
from kvsuite.memory_model.formats import nano_format
from kvsuite.memory_model.prediction import KEYS_AND_VALUES, Allocation, PooledPredictor, Prediction, Predictor, Term
from kvsuite.quantization.formats import DENSE_TILE

from .formats import refused_format

BLOCK_TOKENS = 16
#: what FlashInfer gets on CUDA (`kvsuite.nanovllm.kernel_attention`), and for what it has kernels
ATTENTION_WORKSPACE = 256 << 20
_FLASHINFER_DTYPES = ("bfloat16", "float16")
_FLASHINFER_HEAD_DIMS = (64, 128, 256)
#: what its ``fa3`` gathers at most, tokens for each of the step's (`kvsuite.nanovllm.prompt_attention`)
MOST_KEYS_A_QUERY = 4
PromptKernel = Literal["fa2", "fa3", "torch"]
#: what cuBLAS keeps on Hopper: 32 MiB for each stream that multiplies, the default one and that of the captured steps
LIBRARY_WORKSPACE = 64 << 20
_LOGIT_BYTES = 4
#: formats of the cache that make a point fit, the largest first
_SMALLER_FORMATS = ("int8", "int8:int4", "int4")
_SHORTEST_ELEMENT = 2


def attention_workspace(*, device: str, dtype: str, head_dim: int) -> int:
    """Bytes of FlashInfer's workspace, 0 where the reference attends: elsewhere than on CUDA, in float32, with odd heads."""
    attends = device == "cuda" and dtype in _FLASHINFER_DTYPES and head_dim in _FLASHINFER_HEAD_DIMS
    return ATTENTION_WORKSPACE if attends else 0


def activation_bytes(*, tokens: int, hidden: int, intermediate: int, element_bytes: int, unpacks: bool = False) -> int:
    """Bytes alive at the widest place of a step, the feed-forward part of a gated layer.

    The residual, the normalised states and what the attention added are ``hidden`` wide, gate, up and their product
    ``intermediate``: ``tokens * 3 * (hidden + intermediate) * element``. Packed weights on CUDA are dequantised by the matrix
    where the product comes from: then it is ``tokens * (3 hidden + 2 intermediate) * element`` and the matrix, if that is more.
    """
    whole = tokens * 3 * (hidden + intermediate) * element_bytes
    if not unpacks:
        return whole
    matrix = min(hidden * intermediate, DENSE_TILE)
    return max(whole, (tokens * (3 * hidden + 2 * intermediate) + matrix) * element_bytes)


def pool_blocks(
    *, context: int, sequences: int, chunk: int, window: int | None, sinks: int, block_tokens: int = BLOCK_TOKENS
) -> int:
    """Blocks with which so many sequences run to their full length at the same time, none of them preempted.

    Without a window each holds its whole length. With one it holds sinks and window and, while its prompt is fed, a chunk
    more; the scheduler admits a sequence only where all of that is free, and the others have decoded on by then.

    Parameters
    ----------
    context
        Tokens of a sequence at most.
    sequences
        At the same time.
    chunk
        Tokens of a step at most (``max_num_batched_tokens``).
    window, sinks
        As in `kvsuite.nanovllm.limits.Limits`.
    block_tokens
        Tokens a block.
    """
    whole = _blocks(context, block_tokens)
    if window is None:
        return sequences * whole
    # any `window` tokens in a row touch one block more than they fill
    steady = min(whole, _blocks(sinks, block_tokens) + _blocks(window - 1, block_tokens) + 1)
    feeding = _blocks(min(context, window + sinks + chunk + 2 * block_tokens), block_tokens)
    return min(sequences * whole, (sequences - 1) * steady + feeding)


def stored_tokens(window: int | None, sinks: int, position: int) -> int:
    """Tokens of a request in a layer once the one at a position is stored: whole blocks leave the window."""
    if window is None:
        return position + 1
    head = _blocks(sinks, BLOCK_TOKENS) * BLOCK_TOKENS
    return position + 1 - max(0, (position + 1 - window - head) // BLOCK_TOKENS) * BLOCK_TOKENS


def prompt_blocks(*, prompt: int, sequences: int, chunk: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Blocks that the prompts of one step see at most: the end of one, whole ones behind it, the beginning of another.

    Of prompts of one length, of which none is found in the prefix cache.

    Parameters
    ----------
    prompt
        Tokens of each.
    sequences
        At the same time.
    chunk
        Tokens of a step at most.
    block_tokens
        Tokens a block.
    """
    # one token by itself is attended to as in a decode step
    if min(prompt, chunk) < 2:
        return 0
    left = chunk - 2
    whole = min(left // prompt, sequences - 1)
    cut = left - whole * prompt if whole < sequences - 1 else 0
    return (1 + whole) * _blocks(prompt, block_tokens) + _blocks(cut if cut > 1 else 0, block_tokens)


def gathered_blocks(kernel: PromptKernel, blocks: int, chunk: int) -> int:
    """Blocks of tokens that are copied out of their pages at most, of the ``blocks`` that the prompts of a step see.

    Torch's flash attention reads no pages. ``fa3`` does only where a step of ``chunk`` tokens brings few of them itself.
    """
    if kernel == "fa3":
        return min(blocks, _blocks(MOST_KEYS_A_QUERY * chunk, BLOCK_TOKENS))
    return 0 if kernel == "fa2" else blocks


def prompt_kernel(attention: str) -> PromptKernel:
    """What attends to prompts, by ``effective.attention`` of a record. The reference gathers keys as torch's does."""
    if "flashinfer fa3" in attention:
        return "fa3"
    return "fa2" if "flashinfer fa2" in attention else "torch"


def unpacked_bytes(blocks: int, *, kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of the keys and values of packed ``blocks`` in one layer, as FlashInfer reads them."""
    return 2 * blocks * BLOCK_TOKENS * kv_heads * head_dim * element_bytes


@dataclass(frozen=True)
class NanoMemory(PooledPredictor):
    """Predicts memory of the `nano` engine.

    Parameters
    ----------
    architecture
        The model.
    dtype
        Of weights that no format prescribes one for: ``float32``, ``float16`` or ``bfloat16``.
    device
        Kind of the device, ``cuda`` or ``cpu``.
    prompt_tokens
        Tokens of each prompt, where that is known: a step feeds no more than all prompts have.
    """

    architecture: Architecture
    dtype: str = "bfloat16"
    device: str = "cuda"
    prompt_tokens: int | None = None
    #: how keys and values are stored, ``None`` for the model's own dtype
    cache_format: OwnFormat | None = None
    engine: str = "nano"
    #: what attends to prompts on CUDA; FlashInfer's where they are built, ``fa3`` on Hopper
    prompts: PromptKernel = "fa3"
    #: `kvsuite.nanovllm.limits.Limits.memory_share`
    share: float = 0.9

    def predict(self, point: DesignPoint) -> Prediction:
        """Memory of a runtime whose limits are the point's, with a pool of `pool_blocks`.

        Raises
        ------
        UserError
            If the weight format is not known.
        """
        chosen = nano_format(point.quantization, self.dtype)
        model, batch = self.architecture, point.max_batch_size
        # every running sequence has a token in a step
        step = max(point.prefill_chunk_size, batch)
        unknown = model.weights if isinstance(model.weights, str) else None
        size = None if isinstance(model.weights, str) else model.weights.bytes(chosen)
        reason = self._unpaged() or self._clash(point)
        allocation = None
        if reason is None:
            allocation = Allocation(
                blocks=pool_blocks(
                    context=point.context_window_size,
                    sequences=batch,
                    chunk=step,
                    window=point.sliding_window_size if point.has_window else None,
                    sinks=point.attention_sink_size,
                ),
                extra=1,
                block_bytes=BLOCK_TOKENS * self._token_bytes(chosen.element_bytes),
                dtype=chosen.dtype,
            )
        tokens = min(step, batch * (self.prompt_tokens or point.context_window_size))
        activations = activation_bytes(
            tokens=tokens, hidden=model.hidden, intermediate=model.intermediate, element_bytes=chosen.element_bytes,
            unpacks=self.device == "cuda" and chosen.group is not None,
        )  # fmt: skip
        logits = batch * model.vocabulary * (chosen.element_bytes + _LOGIT_BYTES)
        pool = (
            "context_window_size",
            "max_batch_size",
            "sliding_window_size",
            "attention_sink_size",
            "prefill_chunk_size",
        )
        terms = [
            Term(
                "parameters", "weights", size, "unknown" if size is None else "exact", ("quantization",),
                "sum over matrices, by format", unknown,
            ),
            Term(
                "kv_cache", KEYS_AND_VALUES, None if allocation is None else allocation.bytes,
                "unknown" if allocation is None else "exact", pool,
                self._pool_formula(), reason,
            ),
            Term("temporary", "activations", activations, "rough", ("prefill_chunk_size",), "step 3 (hidden + wide) e"),
            Term("temporary", "logits", logits, "exact", ("max_batch_size",), "B V (e + 4)"),
        ]  # fmt: skip
        if self.device == "cuda":
            terms.append(Term("temporary", "matrix products", LIBRARY_WORKSPACE, "rough", (), "2 streams 32 MiB"))
        widths = set() if isinstance(model.cache, str) else {layer.key_dim for layer in model.cache.layers}
        # the reference attends everywhere where one layer needs it
        workspace = min(
            (attention_workspace(device=self.device, dtype=chosen.dtype, head_dim=width) for width in widths), default=0
        )
        if workspace and self._without_window(point):
            sizes = ("context_window_size", "max_batch_size", "prefill_chunk_size")
            if self.prompts != "torch":
                terms.append(Term("temporary", "attention workspace", workspace, "exact", (), "256 MiB"))
            blocks = self._prompt_blocks(point, step)
            if gathered := self._seen(point, gathered_blocks(self.prompts, blocks, step), chosen.element_bytes):
                terms.append(
                    Term(
                        "temporary", "gathered prompts", gathered, "rough", sizes, "tokens of a step's prompts 2 Hkv D e",
                    )
                )  # fmt: skip
            if unpacked := self._seen(point, blocks, chosen.element_bytes, packed=True):
                terms.append(
                    Term(
                        "temporary", "unpacked prompts", unpacked, "rough", sizes,
                        "blocks of a step's prompts 16 2 Hkv D e",
                    )
                )  # fmt: skip
        return Prediction(self.engine, point, tuple(terms), allocation, self._notes())

    def _without_window(self, point: DesignPoint) -> list[int]:
        """Layers whose tokens see everything before them."""
        cache = self.architecture.cache
        if isinstance(cache, str) or point.has_window:
            return []
        context = point.context_window_size
        return [at for at, layer in enumerate(cache.layers) if layer.window is None or layer.window >= context]

    def _prompt_blocks(self, point: DesignPoint, step: int) -> int:
        return prompt_blocks(
            prompt=self.prompt_tokens or point.context_window_size, sequences=point.max_batch_size, chunk=step
        )

    def _seen(self, point: DesignPoint, blocks: int, element_bytes: int, *, packed: bool = False) -> int:
        """Bytes of so many blocks in one layer that has no window, or in one of these that is ``packed``."""
        cache = self.architecture.cache
        if isinstance(cache, str) or self._unpaged() is not None:
            return 0
        count = len(cache.layers)
        formats = [None] * count if self.cache_format is None else self.cache_format.of_layers(count)
        layers = [cache.layers[at] for at in self._without_window(point) if formats[at] is not None or not packed]
        return max(
            (
                unpacked_bytes(blocks, kv_heads=layer.kv_heads, head_dim=layer.key_dim, element_bytes=element_bytes)
                for layer in layers
            ),
            default=0,
        )

    def window_tokens(self, window: int, tokens: int) -> int:
        """Tokens of a text that a layer with the model's own sliding window holds: whole blocks leave it."""
        return stored_tokens(window, 0, tokens - 1)

    def most_window_tokens(self, window: int, tokens: int) -> int:
        """The most that it holds on the way there."""
        return min(tokens, window + BLOCK_TOKENS - 1)

    def smaller(self) -> Sequence[tuple[str, int | str, Predictor]]:
        """The cache in fewer bits: every other setting is an axis."""
        found = []
        for name in _SMALLER_FORMATS:
            chosen = replace(self, cache_format=CacheFormat.parse(name))
            if chosen._unpaged() is None and chosen._token_bytes(_SHORTEST_ELEMENT) < self._token_bytes(
                _SHORTEST_ELEMENT
            ):
                found.append((PARAMETER, name, chosen))
        return found

    def _token_bytes(self, element_bytes: int) -> int:
        """Bytes of a token's keys and values in all layers, as they are stored."""
        model, chosen = self.architecture, self.cache_format
        if chosen is None or isinstance(model.cache, str):
            return model.kv_bytes_per_token(element_bytes)
        return kv_bytes(chosen, model.cache, [1] * model.layers, 1, element_bytes)

    def _pool_formula(self) -> str:
        if self.cache_format is not None:
            return "(blocks + 1) 16 sum over layers Hkv (codes + float16 scales of a key and a value)"
        return "(blocks + 1) 16 2 L Hkv D e" if self.architecture.shape else "(blocks + 1) 16 sum over layers 2 Hkv D e"

    def _unpaged(self) -> str | None:
        """Why there is no pool for the model, or none in the format."""
        cache = self.architecture.cache
        if isinstance(cache, str):
            return cache
        for layer in cache.layers:
            if layer.latent:
                return f"layer {layer.index} attends to latents (MLA), and nano stores keys and values of heads"
            if layer.attention is None or layer.recurrent:
                return (
                    f"layer {layer.index} ({layer.what}) is not one of keys and values of its own, and nano is modelled for no "
                    "other"
                )
            if layer.attention == "chunked":
                return f"layer {layer.index} attends by chunks, and nano does not"
            if layer.key_dim != layer.value_dim:
                return (
                    f"layer {layer.index} has keys of {layer.key_dim} and values of {layer.value_dim}, and nano stores them in "
                    "one shape"
                )
        return None if self.cache_format is None else refused_format(self.cache_format, cache)

    def _clash(self, point: DesignPoint) -> str | None:
        own = self.architecture.window
        if own is None or not point.has_window or own >= point.context_window_size:
            return None
        return f"the model has its own sliding window of {own}, and nano takes no other on top; leave the window off"

    def _notes(self) -> tuple[str, ...]:
        return ("captured decode steps and the allocator's slack are not predicted",) if self.device == "cuda" else ()


def _blocks(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)
