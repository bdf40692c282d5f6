"""What a case does to the cache on the `hf` engine: nothing, a policy, or a press."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvsuite.case import Case
from kvsuite.compression import get_policy
from kvsuite.compression.base import Policy
from kvsuite.errors import UserError

if TYPE_CHECKING:
    from kvsuite.compression.kvpress.adapter import KvpressMethod


@dataclass
class CacheCompression:
    """Exactly one of ``policy`` and ``press``, or neither for the full cache."""

    policy: Policy | None = None
    press: KvpressMethod | None = None

    @property
    def frees_memory(self) -> bool:
        """Whether what the method removes is given back."""
        return self.press.info.frees_memory if self.press else True

    @property
    def ratio_requested(self) -> float | None:
        """Fraction removed that a ratio-based method was asked for; a size-based one was asked for none."""
        if self.press:
            return self.press.requested_removed_ratio
        return self.policy.ratio_requested if self.policy else None

    def caveats(self, prompt_tokens: int) -> list[str]:
        """What a record must say where a prompt is too short for the method to be what its name says."""
        found = (
            self.press.caveat(prompt_tokens)
            if self.press
            else self.policy.caveat(prompt_tokens)
            if self.policy
            else None
        )
        return [] if found is None else [f"not what its name says: {found}"]

    @property
    def acts_in_decode(self) -> bool:
        """Whether the method may change the cache between generated tokens."""
        if self.policy is not None:
            return self.policy.acts == "decode"
        return self.press is not None and "decode" in self.press.info.compresses

    @property
    def eager_only(self) -> str | None:
        """Why a decode step of this method cannot be captured, ``None`` if it can."""
        if self.press and not self.press.info.frees_memory:
            return "the press masks keys inside a patched attention function"
        if self.press and "decode" in self.press.info.compresses:
            return "the press changes the cache's length while decoding"
        return None


def compression_of(case: Case, *, layers: int) -> CacheCompression:
    """Build the method of ``case``, a new object for every case.

    Raises
    ------
    UserError
        For unknown names or parameters, or a skipped layer that does not exist.
    """
    parameters: dict[str, Any] = dict(case.policy_params)
    if case.policy is None:
        return CacheCompression()
    if case.policy.startswith("kvpress:"):
        from kvsuite.compression.kvpress.adapter import KvpressMethod

        return CacheCompression(press=KvpressMethod.create(case.policy, **parameters))
    policy = get_policy(case.policy, **parameters)
    beyond = [layer for layer in policy.skip_layers if layer >= layers]
    if beyond:
        raise UserError(
            f"--kv-skip-layers={','.join(map(str, sorted(policy.skip_layers)))}: the model has layers 0 to {layers - 1}; "
            f"leave out {', '.join(map(str, sorted(beyond)))}"
        )
    return CacheCompression(policy=policy)
