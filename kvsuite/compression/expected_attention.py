"""Expected attention: keep what queries still to come are expected to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvsuite.errors import UserError

from .base import Needs, require_size
from .prompt_ranked import PromptRanked
from .prompt_view import PromptView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class ExpectedAttention(PromptRanked):
    """Keep the first ``sinks`` tokens, and the others by the attention that future queries are expected to pay them.

    Devoto et al., "Expected Attention" (arXiv 2510.00636), as kvpress' ``ExpectedAttentionPress`` 0.5.5 computes it. Queries
    before rotation are taken for normal with the prompt's mean ``mu`` and covariance ``S``; ``R`` is the rotation averaged
    over the next ``future`` positions. Then

    ``importance_j = (softmax_j(k_j R mu / sqrt(d) + k_j R S R^T k_j / (2 d)) + epsilon) |v_j|``,

    the softmax averaged over the query heads of a key head.

    Parameters
    ----------
    future
        Positions behind the prompt over which the rotation is averaged, at least 1.
    sinks
        First tokens that always stay, and whose queries do not count.
    covariance
        Whether the covariance is used beside the mean.
    value_norm
        Whether the expected attention is weighted with the norm of the value.
    epsilon
        Added to the expected attention before the weighting, at least 0.
    """

    name: ClassVar[str] = "expected_attention"
    heads_apart: ClassVar[bool] = True

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size("expected_attention(future)", self.future)
        require_size("expected_attention(sinks)", self.sinks, minimum=0)
        if not self.epsilon >= 0:
            raise UserError(f"--kv-method=expected_attention(epsilon={self.epsilon}): must be at least 0")

    @property
    def needs(self) -> Needs:
        return Needs(prompt=True, query_statistics=self.sinks, beyond=self.future)

    def caveat(self, length: int) -> str | None:
        kept = self.size_after(length)
        if kept == length or kept > self.sinks:
            return None
        return f"{kept} tokens stay, no more than the {self.sinks} sinks: attention decides nothing"

    def importance(self, view: PromptView) -> Tensor:
        import torch

        if view.length <= self.sinks:
            return torch.full(view.keys.shape[:2], float("inf"), device=view.keys.device)
        mean, covariance = view.query_statistics()
        rotation = view.mean_rotation(view.length, self.future)
        mean = mean @ rotation.T
        keys, width = view.keys[:, self.sinks :].float(), view.head_dim
        shared = mean.shape[0] // keys.shape[0]
        keys = keys.repeat_interleave(shared, dim=0)
        expected = (keys @ mean[..., None])[..., 0] / width**0.5
        if self.covariance:
            turned = rotation @ covariance @ rotation.T
            expected = expected + ((keys @ turned) * keys).sum(dim=-1) / (2 * width)
        found = view.per_kv_head(expected.softmax(dim=-1))
        if self.value_norm:
            found = (found + self.epsilon) * view.values[:, self.sinks :].float().norm(dim=-1)
        return torch.nn.functional.pad(found, (self.sinks, 0), value=float("inf"))
