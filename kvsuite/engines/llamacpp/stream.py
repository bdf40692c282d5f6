"""A sequence in a context: how far it is, what of it is stored, and what a policy takes away again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvsuite.compression.base import Policy

from .context import BatchToken, Context

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Stream:
    """One sequence of a context.

    Parameters
    ----------
    context
        Holds it.
    sequence
        Its number there.
    policy
        Keeps sinks and recent tokens, ``None``: everything.

    Attributes
    ----------
    position
        Of the next token.
    stored
        Tokens that are held.
    """

    def __init__(self, context: Context, sequence: int = 0, policy: Policy | None = None) -> None:
        self._context, self.sequence, self._policy = context, sequence, policy
        self.position = self.stored = self._seen = 0
        self._done = False

    def copy(self, sequence: int) -> Stream:
        """The same tokens as another sequence of the context, whose own are forgotten."""
        self._context.copy(self.sequence, sequence)
        copied = Stream(self._context, sequence, self._policy)
        copied.position, copied.stored, copied._seen, copied._done = self.position, self.stored, self._seen, self._done
        return copied

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed tokens, as many a step as it takes; logits ``[vocabulary]`` behind the last one, valid until the next step."""
        size, last = self._context.settings.step_tokens, len(tokens) - 1
        for first in range(0, len(tokens), size):
            part = tokens[first : first + size]
            self._context.decode(
                [
                    BatchToken(int(token), self.position + at, self.sequence, first + at == last)
                    for at, token in enumerate(part)
                ]
            )
            self.fed(len(part))
        return self._context.logits(len(part) - 1)

    def fed(self, tokens: int) -> None:
        """Note tokens that went through the model."""
        self.position += tokens
        self.stored += tokens
        self._seen += tokens

    def evict(self, *, prompt: bool) -> None:
        """Let the policy act behind the last token: on the whole prompt, or on a step.

        llama.cpp's context shift: what stands between sinks and recent tokens goes, and where positions are those in the cache
        the recent ones move up to the sinks, their keys rotated anew.
        """
        policy = self._policy
        if policy is None or not policy.due(step=self._seen, done=self._done, prompt=prompt):
            return
        size = policy.size_after(self.stored)
        removed = self.stored - size
        if not removed:
            return
        self._done = True
        sinks = min(int(getattr(policy, "start_size", 0)), size - 1)
        first_kept = self.position - (size - sinks)
        self._context.remove(self.sequence, sinks, first_kept)
        if policy.positions == "cache":
            self._context.shift(self.sequence, first_kept, sinks - first_kept)
            self.position = size
        self.stored = size

    @property
    def stored_bytes(self) -> int:
        """Bytes of its keys and values, by llama.cpp."""
        return self._context.stored_bytes(self.sequence, self.stored)
