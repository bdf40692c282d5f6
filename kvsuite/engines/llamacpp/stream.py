"""A sequence in a context: how far it is, what of it is stored, and what a policy takes away again."""

from __future__ import annotations

from kvsuite.compression.base import Policy

from .context import Context


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
