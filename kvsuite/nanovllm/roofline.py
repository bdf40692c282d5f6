"""What a device should give under load: bytes over bandwidth, prompt tokens over their rate, and how many sequences fit.

A decode step reads the weights once and every stored key and value once. In a steady state the pool is full of requests, and
one that ends makes room for a prompt, during which nobody decodes. Compression changes both what a step reads and how many
sequences share it. A measured throughput stands beside this. It is an estimate and no limit: sequences are counted at their
longest, and a scheduler that admits one while others are shorter lets more of them run.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.errors import UserError


@dataclass(frozen=True)
class Roofline:
    """A model on a device.

    Parameters
    ----------
    step_bytes
        Bytes that a decode step reads whatever it decodes: the weights.
    token_bytes
        Bytes of a stored token's keys and values, all layers.
    bandwidth
        Bytes a second.
    prompt_rate
        Prompt tokens a second.

    Raises
    ------
    UserError
        If one of them is not above 0.
    """

    step_bytes: float
    token_bytes: float
    bandwidth: float
    prompt_rate: float

    def __post_init__(self) -> None:
        for name in ("step_bytes", "token_bytes", "bandwidth", "prompt_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"roofline: {name}={getattr(self, name)} must be above 0")

    def decode_step_s(self, kv_tokens: float) -> float:
        """Seconds of a decode step over so many stored tokens, of all sequences together."""
        return (self.step_bytes + kv_tokens * self.token_bytes) / self.bandwidth

    def output_tokens_s(
        self,
        *,
        prompt: int,
        new_tokens: int,
        pool_tokens: int,
        kept: int | None = None,
        max_num_seqs: int | None = None,
    ) -> float:
        """Output tokens a second in a steady state of equal requests.

        Parameters
        ----------
        prompt, new_tokens
            Tokens of a request in and out.
        pool_tokens
            Tokens that the pool holds.
        kept
            Tokens of the prompt that stay once it is complete; all of them if left out.
        max_num_seqs
            Sequences at most.
        """
        running = sequences_that_fit(prompt=prompt, new_tokens=new_tokens, pool_tokens=pool_tokens, kept=kept)
        running = running if max_num_seqs is None else min(running, max_num_seqs)
        stored = (prompt if kept is None else kept) + new_tokens / 2
        decoding = new_tokens * self.decode_step_s(running * stored) / running
        return new_tokens / (prompt / self.prompt_rate + decoding)


def sequences_that_fit(*, prompt: int, new_tokens: int, pool_tokens: int, kept: int | None = None) -> float:
    """Sequences that a pool holds at their longest, beside the prompt of one that is not compressed yet; a fraction counts.

    Raises
    ------
    UserError
        If not even one fits.
    """
    longest = (prompt if kept is None else kept) + new_tokens
    if max(prompt, longest) > pool_tokens:
        raise UserError(
            f"a pool of {pool_tokens} tokens does not hold one request of {prompt} + {new_tokens} tokens; give a larger pool"
        )
    coming = 0 if kept is None else max(prompt - kept, 0)
    return max((pool_tokens - coming) / longest, 1.0)
