"""Whether a checkpoint is something that can be measured: a causal language model, with a cache, and with numbers in it."""

from __future__ import annotations

from typing import Any

import torch

from kvsuite.errors import CaseInvalid, UserError

# logits of equal tokens in one forward differ by rounding; those of an encoder by their own size
_SEES_MORE = 0.05


def require_causal_class(config: Any, named: str) -> None:
    """Refuse a configuration that makes no causal language model, before its weights are read.

    Parameters
    ----------
    config
        transformers' configuration.
    named
        The option and its value, for the message.

    Raises
    ------
    UserError
        If it is encoder-decoder, or transformers has no causal language model for it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{named}: {kind} is encoder-decoder, no causal language model; give a decoder-only model")
    if getattr(config, "vision_config", None) is None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{named}: {kind} is no causal language model; give a decoder-only model")


def require_decoder(model: Any, named: str) -> None:
    """Feed two texts that differ in their last token: the first must not know, and a cache must hold its key and value.

    Parameters
    ----------
    model
        The loaded transformers model.
    named
        The option and its value, for the message.

    Raises
    ------
    UserError
        If what a token sees depends on the tokens behind it, or nothing is cached that grows with the text.
    """
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([[0, 1], [0, 2]], device=model.device), use_cache=True)
    one, other = output.logits[:, 0].float()
    name = type(model).__name__
    if (one - other).norm() > _SEES_MORE * one.norm():
        raise UserError(
            f"{named}: {name} is an encoder, no causal language model: a token sees those behind it; give a decoder"
        )
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    if not any(getattr(layer, "keys", None) is not None and layer.keys.numel() for layer in layers):
        raise UserError(
            f"{named}: {name} holds no keys and values: its state does not grow with the text, so there is no KV cache to "
            "measure; give a model with attention layers that cache"
        )


def require_finite_weights(model: Any) -> None:
    """Refuse weights that are no numbers.

    Raises
    ------
    CaseInvalid
        If a weight is infinite or NaN; the message names the first.
    """
    for name, weight in model.named_parameters():
        # one pass without a copy: a sum in float32 is finite exactly if all of its terms are, but for sizes no weight has
        if weight.is_floating_point() and not torch.isfinite(weight.sum(dtype=torch.float32)):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise CaseInvalid(
                f"weight {name} is not finite in {dtype}: the checkpoint is damaged, or its values do not fit {dtype}; give "
                "another checkpoint or another --kv-dtype"
            )
