"""Re-rotation of cached keys: what ``positions="cache"`` needs from a transformers model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from kvsuite.errors import CaseInvalid
from kvsuite.models.layers import layers_of

from .decoder import refuse_while_capturing

_CHANGING_ROPE = ("dynamic", "longrope")


def forget_longer_sequences(model: nn.Module) -> None:
    """Let dynamic frequencies begin anew with every sequence.

    transformers goes back to the frequencies of training only where a sequence is shorter than those: until then a sequence
    has the frequencies of a longer one that went before.
    """

    def begin(embedding: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        positions = named["position_ids"] if "position_ids" in named else arguments[1]
        # releases before 5.3 do not remember that they changed them
        if embedding.inv_freq is not embedding.original_inv_freq and not int(positions.min()):
            embedding.register_buffer("inv_freq", embedding.original_inv_freq.to(positions.device), persistent=False)
            embedding.max_seq_len_cached = embedding.original_max_seq_len

    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and hasattr(module, "original_inv_freq"):
            module.register_forward_pre_hook(begin, with_kwargs=True)


class Rotary:
    """Rotates keys to any positions with the model's own rotary embedding, in float32.

    Parameters
    ----------
    model
        A transformers decoder with one rotary embedding for all layers.

    Raises
    ------
    CaseInvalid
        If the model's positions are not rotary, depend on the length, or do not compose as rotations do.
    """

    def __init__(self, model: nn.Module) -> None:
        embeddings = [m for name, m in model.named_modules() if name.endswith("rotary_emb") and hasattr(m, "inv_freq")]
        attention = next((m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_dim")), None)
        attention = attention or next((m for m in model.modules() if hasattr(m, "layer_idx")), None)
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None) if attention else None
        if len(embeddings) != 1 or apply is None:
            raise CaseInvalid("positions=cache needs a model with one rotary embedding; use --kv-positions=original")
        self._embedding: Any = embeddings[0]
        rope_type = getattr(self._embedding, "rope_type", "default")
        if rope_type in _CHANGING_ROPE:
            raise CaseInvalid(
                f"positions=cache: rope_type {rope_type!r} changes its frequencies with the length; "
                "use --kv-positions=original"
            )
        self._apply: Any = apply
        self._scale = float(getattr(self._embedding, "attention_scaling", 1.0))
        self._cos = self._sin = torch.empty(0)
        # frequencies may be of a part of a key alone, or given once for both halves
        config: Any = model.config
        layers = layers_of(config.get_text_config().to_dict()).layers
        # the widest where no layer rotates: there is nothing to turn
        widths = [layer.key_dim for layer in layers if layer.rotary] or [max(layer.key_dim for layer in layers)]
        self._width = self._turned = widths[0]
        self._check()

    def table(self, length: int) -> None:
        """Make the cosines and sines of positions ``0 .. length - 1`` ready, so that a captured step only indexes them."""
        if self._cos.shape[0] >= length:
            return
        refuse_while_capturing("the table of rotations")
        device = self._embedding.inv_freq.device
        size = max(length, 2 * self._cos.shape[0], 64)
        probe = torch.empty(1, dtype=torch.float32, device=device)
        cos, sin = self._embedding(probe, torch.arange(size, device=device)[None])
        self._cos, self._sin = cos[0].float(), sin[0].float()

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate unrotated ``keys`` ``[batch, heads, n, head_dim]`` to ``positions`` ``[n]`` or ``[batch, heads, n]``."""
        return self._turn(keys, positions, direction=1).to(keys.dtype)

    def unrotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Undo `rotate`; also undoes the model's own rotation (and its attention scaling) at ``positions``."""
        return (self._turn(keys, positions, direction=-1) / self._scale**2).to(keys.dtype)

    def _turn(self, keys: Tensor, positions: Tensor, direction: int) -> Tensor:
        batch, heads, n, dim = keys.shape
        cos, sin = self._cos[positions], self._sin[positions] * direction
        if positions.dim() == 1:
            cos, sin = cos[None], sin[None]
            flat = keys.float()
        else:
            # one row a head: the model's function shares positions between heads
            cos, sin = (t.expand(batch, heads, n, t.shape[-1]).reshape(batch * heads, n, -1) for t in (cos, sin))
            flat = keys.float().reshape(batch * heads, 1, n, dim)
        part = flat[..., : self._turned]
        turned: Tensor = self._apply(part, part, cos, sin)[1]
        if self._turned < dim:
            turned = torch.cat([turned, flat[..., self._turned :]], dim=-1)
        return turned.reshape(keys.shape)

    def _check(self) -> None:
        self.table(16)
        device = self._cos.device
        key = torch.linspace(-1, 1, self._width, device=device).reshape(1, 1, 1, self._width)
        at = [torch.tensor([p], device=device) for p in (3, 8, 5)]
        try:
            self.rotate(key, at[0])
        except RuntimeError:
            # the layers hand the first part of a key to the function, and leave the others as they are
            self._turned = self._cos.shape[-1]
        same_gap = (self.rotate(key, at[0]) * self.rotate(key, at[1])).sum()
        from_zero = (self.rotate(key, at[0] - 3) * self.rotate(key, at[2])).sum()
        back = self.unrotate(self.rotate(key, at[1]), at[1])
        if not (torch.allclose(same_gap, from_zero, rtol=1e-4, atol=1e-4) and torch.allclose(back, key, atol=1e-4)):
            raise CaseInvalid(
                "positions=cache: this model's rotary embedding is not a rotation; use --kv-positions=original"
            )
