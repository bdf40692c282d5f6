"""Memory of vLLM: weights, and the pool of blocks that is made for a case."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.design_point import DesignPoint
from kvsuite.memory_model.formats import nano_format
from kvsuite.memory_model.prediction import KEYS_AND_VALUES, Allocation, PooledPredictor, Prediction, Predictor, Term

#: tokens a block if nobody says it: vLLM's own choice by the kind of the device
BLOCK_TOKENS = {"cuda": 16, "cpu": 128}
#: block 0 is nobody's
NULL_BLOCKS = 1
_POOL_SETTINGS = ("context_window_size", "max_batch_size")


def pool_unknown(architecture: Architecture) -> str | None:
    """Why the bytes of a block are not known, ``None`` if they are."""
    if isinstance(architecture.cache, str):
        return architecture.cache
    if architecture.shape is None:
        return f"layers of {architecture.label} store different things, between which vLLM parts its pool by rules of its own"
    return None


def pool_blocks(*, context: int, sequences: int, block_tokens: int) -> int:
    """Blocks with which so many sequences run to their full length at the same time, block 0 among them."""
    return sequences * -(-context // block_tokens) + NULL_BLOCKS


def block_bytes(architecture: Architecture, *, block_tokens: int, element_bytes: int, cards: int = 1) -> int:
    """Bytes of a block in all layers on one card.

    With more cards than heads of keys every card has one head: then they hold copies.
    """
    shape = architecture.shape
    assert shape is not None
    heads = max(1, shape.kv_heads // cards)
    return architecture.kv_bytes_per_token(element_bytes) // shape.kv_heads * heads * block_tokens


@dataclass(frozen=True)
class VllmMemory(PooledPredictor):
    """Predicts memory of engine `vllm`, of all its cards together.

    Parameters
    ----------
    architecture
        The model.
    dtype
        Of the weights.
    element_bytes
        Of a stored key's or value's element.
    block_tokens
        Tokens a block.
    cards
        Tensor parallel size.
    pool_bytes
        Of the pool on each card where it was given, ``None`` where it is made for the point.
    """

    architecture: Architecture
    dtype: str
    element_bytes: int
    block_tokens: int
    cards: int = 1
    pool_bytes: int | None = None
    engine: str = "vllm"
    share: float = 1.0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers, on one card."""
        return block_bytes(
            self.architecture, block_tokens=self.block_tokens, element_bytes=self.element_bytes, cards=self.cards
        )

    def blocks(self, *, context: int, sequences: int) -> int:
        """Blocks of the pool of each card, block 0 among them."""
        if self.pool_bytes is not None:
            return self.pool_bytes // self.block_bytes
        return pool_blocks(context=context, sequences=sequences, block_tokens=self.block_tokens)

    def predict(self, point: DesignPoint) -> Prediction:
        """Weights and pool; what its steps work in is not known beforehand."""
        chosen, model = nano_format(point.quantization, self.dtype), self.architecture
        unknown = model.weights if isinstance(model.weights, str) else None
        size = None if isinstance(model.weights, str) else model.weights.bytes(chosen)
        reason, allocation = pool_unknown(model), None
        if reason is None:
            blocks = self.blocks(context=point.context_window_size, sequences=point.max_batch_size)
            allocation = Allocation(
                blocks=(blocks - NULL_BLOCKS) * self.cards,
                extra=NULL_BLOCKS * self.cards,
                block_bytes=self.block_bytes,
                dtype=self.dtype,
            )
        terms = (
            Term(
                "parameters", "weights", size, "unknown" if size is None else "exact", ("quantization",),
                "sum over matrices, by format", unknown,
            ),
            Term(
                "kv_cache", KEYS_AND_VALUES, None if allocation is None else allocation.bytes,
                "unknown" if allocation is None else "exact", _POOL_SETTINGS, "(B ceil(context / block) + 1) block 2 L Hkv D e",
                reason,
            ),
            Term(
                "temporary", "steps", None, "unknown", ("prefill_chunk_size",), "",
                "what vLLM's steps and captured graphs take is known when it has started",
            ),
        )  # fmt: skip
        return Prediction(self.engine, point, terms, allocation)

    def smaller(self) -> list[tuple[str, int, Predictor]]:
        """None: every setting is an axis."""
        return []
