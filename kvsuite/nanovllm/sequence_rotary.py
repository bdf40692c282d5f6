"""Rotary embeddings whose frequencies follow the length of a sequence: in shared steps every token gets those of its own.

transformers takes them from the longest position of a forward pass (dynamic NTK scaling; LongRoPE, Ding et al. 2024,
arXiv:2402.13753), so sequences that share a pass would change each other, and a prompt in chunks is another than one fed whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvsuite.errors import CaseInvalid

from .paged_attention import spans_under_way


class SequenceRotary:
    """Takes the place of a model's rotary embedding between `install` and `close`.

    A token's *span* is the length of the sequence in the forward pass that computes it where the sequence is alone: the whole
    prompt for a prompt's tokens, position + 1 for one that is decoded. The span decides the frequencies.

    Parameters
    ----------
    embedding
        Module of transformers, with the ``rope_type`` ``dynamic`` or ``longrope``.
    switch
        Longest sequence with the frequencies that the model was made with.
    longest
        Tokens of a sequence at most.

    Raises
    ------
    CaseInvalid
        If the frequencies do not come out as the embedding's own.
    """

    def __init__(self, embedding: Any, switch: int, longest: int) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        self.switch = switch
        self._embedding = embedding
        self._own = embedding.forward
        self._long_only = embedding.rope_type == "longrope"
        own = embedding.original_inv_freq
        made = ROPE_INIT_FUNCTIONS[embedding.rope_type]
        spans = torch.arange(switch + 1, (switch + 1 if self._long_only else longest) + 1, device=own.device)
        try:
            # all spans at once; LongRoPE has one set of frequencies for all of them
            beyond, _ = made(embedding.config, own.device, seq_len=switch + 1 if self._long_only else spans[:, None])
            #: a row a span, from the switch on
            self._frequencies = torch.cat([own[None].float(), beyond.reshape(-1, own.shape[0]).float()])
            self._check(longest)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise CaseInvalid(_unlike(embedding)) from error

    def row(self, span: int) -> int:
        """Number of the frequencies of a span: tokens of equal numbers, positions and contents have equal keys."""
        return min(max(span - self.switch, 0), len(self._frequencies) - 1)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[1, T, width]`` of a step's positions, in the dtype of ``x``."""
        spans = spans_under_way()
        if spans is None:
            found: tuple[Tensor, Tensor] = self._own(x, position_ids)
            return found
        return self._turns(x, position_ids, spans)

    def install(self) -> None:
        """Take the embedding's place."""
        self._embedding.forward = self.forward

    def close(self) -> None:
        """Give the model its own embedding back."""
        self._embedding.__dict__.pop("forward", None)

    def _turns(self, x: Tensor, position_ids: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        rows = (spans - self.switch).clamp(0, len(self._frequencies) - 1)
        angles = position_ids[..., None].float() * self._frequencies[rows]
        both = torch.cat([angles, angles], dim=-1)
        scale = self._embedding.attention_scaling
        return (both.cos() * scale).to(x.dtype), (both.sin() * scale).to(x.dtype)

    def _check(self, longest: int) -> None:
        """Compare with what the embedding gives sequences that are alone."""
        device = self._frequencies.device
        like = torch.empty(1, dtype=torch.float32, device=device)
        with torch.inference_mode():
            for span in sorted({self.switch, self.switch + 1, longest}):
                positions = torch.tensor([[0, span // 2, span - 1]], device=device)
                wanted = self._own(like, positions)
                found = self._turns(like, positions, torch.full((3,), span, device=device))
                # it may keep the frequencies of the longest sequence so far until a short one comes
                self._own(like, positions[:, :1])
                for one, other in zip(found, wanted, strict=True):
                    if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
                        raise CaseInvalid(_unlike(self._embedding))


def sequence_rotary(model: nn.Module, longest: int) -> SequenceRotary | None:
    """A model's rotary embedding for every sequence, where those of up to ``longest`` tokens have frequencies of their own.

    Raises
    ------
    CaseInvalid
        If a model's frequencies change with the length in a way that cannot be given to every sequence for itself.
    """
    switch = switch_length(model)
    if switch is None or switch >= longest:
        return None
    changing = _changing(model)
    if len(changing) > 1 or not isinstance(changing[0].rope_type, str):
        raise CaseInvalid(
            f"{type(model).__name__}: rotary frequencies of several kinds of layers change beyond {switch} tokens; keep "
            f"prompt and output within {switch}, or use --kv-engine=hf"
        )
    return SequenceRotary(changing[0], switch, longest)


def switch_length(model: nn.Module) -> int | None:
    """Longest sequence with the frequencies that the model was made with; ``None`` where they never change."""
    return min((_switch(module) for module in _changing(model)), default=None)


def recomputing_switch(model: Any) -> int | None:
    """`switch_length` where ``generate`` computes everything again when an output passes it (Phi-3), else ``None``."""
    from transformers import GenerationMixin

    own = getattr(type(model), "prepare_inputs_for_generation", None)
    if own is GenerationMixin.prepare_inputs_for_generation:
        return None
    kinds = [module.rope_type for module in _changing(model)]
    return switch_length(model) if "longrope" in kinds else None


def passes_switch(switch: int | None, prompt_tokens: int, new_tokens: int) -> str | None:
    """Why a request cannot be served of a model with this `recomputing_switch`, in words; ``None`` if it can."""
    # the last token is never fed
    if switch is None or not prompt_tokens <= switch < prompt_tokens + new_tokens - 1:
        return None
    return (
        f"an output that passes {switch} tokens: there the model changes from its short to its long frequencies and computes "
        f"everything again, which paged attention does not; keep prompt and output within {switch} tokens, or give a prompt "
        f"longer than that (--kv-prompt-tokens, --kv-max-new-tokens)"
    )


def _changing(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _changes(getattr(module, "rope_type", None))]


def _changes(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


def _switch(embedding: Any) -> int:
    """Longest sequence with the frequencies that the model was made with."""
    parameters = embedding.config.rope_parameters
    sets = parameters.values() if isinstance(embedding.rope_type, dict) else [parameters]
    return min(
        int(one["original_max_position_embeddings"])
        if one["rope_type"] == "longrope"
        else int(embedding.original_max_seq_len)
        for one in sets
        if _changes(one.get("rope_type"))
    )


def _unlike(embedding: Any) -> str:
    return (
        f"{type(embedding).__name__}: rope_type {embedding.rope_type!r} changes its frequencies with the length in a way that "
        "requests served together would share; keep prompt and output shorter, or use --kv-engine=hf"
    )
