"""KNorm: keep the keys of lowest norm, once, at the end of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .prompt_ranked import PromptRanked
from .prompt_view import PromptView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class KNorm(PromptRanked):
    """Keep the keys of lowest L2 norm of each head (Devoto et al., arXiv 2406.11430); kvpress' ``KnormPress``.

    `kvsuite.compression.l2_compress.L2Compress` is the same idea with a threshold and a schedule.
    """

    name: ClassVar[str] = "knorm"
    heads_apart: ClassVar[bool] = True

    def importance(self, view: PromptView) -> Tensor:
        return -view.key_norms()
