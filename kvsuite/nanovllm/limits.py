"""What a runtime may use: lengths, sequences, tokens a step, blocks."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.errors import UserError

ADMISSIONS = ("reserve", "optimistic")


@dataclass(frozen=True)
class Limits:
    """Limits of a runtime. The pool's size is given in one of three ways; the default is a share of free memory.

    Parameters
    ----------
    max_model_len
        Tokens of a request at most, prompt and output together.
    max_num_seqs
        Sequences that hold blocks at the same time.
    max_num_batched_tokens
        Tokens of one step: every running sequence's next token and, in what is left, chunks of prompts.
    block_size
        Tokens a block.
    num_blocks
        Blocks of the pool, for every layer group.
    pool_bytes
        Bytes of keys and values, all layers together.
    memory_share
        Share of the memory that is free once the model is loaded, in (0, 1).
    prefix_caching
        Whether full blocks are found again by the tokens they were computed from.
    sliding_window
        Tokens that a query sees at most, its own among them; ``None`` for all. The sinks come on top.
    attention_sinks
        First tokens of a sequence, which stay visible beside the window.
    prefill_first
        Whether steps that feed prompts feed nothing else: fewer, fuller decode steps, but decoding pauses meanwhile.
    admission
        When a waiting request may run beside others (`kvsuite.nanovllm.reservation`). ``reserve``: as soon as all of them
        could grow to their longest, so that none is preempted and nothing is computed twice. ``optimistic``: as soon as the
        tokens known now fit, which runs more at once where outputs end early, and computes again what it preempts.
    cache_format
        How keys and values are stored, ``None`` for the model's own dtype.

    Raises
    ------
    UserError
        If a limit is impossible, or two contradict each other.
    """

    max_model_len: int = 4096
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_blocks: int | None = None
    pool_bytes: int | None = None
    memory_share: float | None = None
    prefix_caching: bool = True
    sliding_window: int | None = None
    attention_sinks: int = 0
    prefill_first: bool = False
    admission: str = "reserve"
    cache_format: OwnFormat | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            _whole(name, getattr(self, name), 1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UserError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: every one of max_num_seqs={self.max_num_seqs} "
                "sequences needs a token a step; raise the former or lower the latter"
            )
        given = [name for name in ("num_blocks", "pool_bytes", "memory_share") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: the size of the pool is given in more than one way; give one")
        if self.num_blocks is not None:
            _whole("num_blocks", self.num_blocks, 1, "a pool needs a block")
        if self.pool_bytes is not None:
            _whole("pool_bytes", self.pool_bytes, 1)
        if self.memory_share is not None and not 0 < self.memory_share < 1:
            raise UserError(f"memory_share={self.memory_share}: must lie between 0 and 1")
        if self.sliding_window is not None:
            _whole("sliding_window", self.sliding_window, 1, "leave it out for full attention")
        _whole("attention_sinks", self.attention_sinks, 0)
        if self.admission not in ADMISSIONS:
            raise UserError(f"admission={self.admission}: unknown; use {' or '.join(ADMISSIONS)}")
        if self.attention_sinks and self.sliding_window is None:
            raise UserError(
                f"attention_sinks={self.attention_sinks}: without a window every token stays visible; "
                "give sliding_window or leave the sinks out"
            )

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)

    @property
    def most_step_tokens(self) -> int:
        """Tokens of the largest step that there can be: each needs a place in the pool, too."""
        places = self.max_num_seqs * self.max_model_len
        if self.num_blocks is not None:
            places = min(places, self.num_blocks * self.block_size)
        return min(self.max_num_batched_tokens, places)


def _whole(name: str, value: int, minimum: int, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        reason = f": {why}" if why else ""
        raise UserError(f"{name}={value}: must be a whole number of at least {minimum}{reason}")
