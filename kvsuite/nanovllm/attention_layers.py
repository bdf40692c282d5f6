"""What a transformers decoder hands to its attention function, layer by layer: found out by asking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.compression.base import Policy
from kvsuite.errors import CaseInvalid
from kvsuite.models.layers import ModelLayers, UnknownLayers, layers_of

from .groups import LayerGroup, formats_of, token_bytes, unpaged
from .limits import Limits

_PROBE = "kvsuite_probe"
# per-token tensors that transformers passes along to every attention function
_HARMLESS = {"position_ids", "cache_position", "position_embeddings"}
# two equal computations of another batch shape differ by rounding; tokens that mix differ by their own size
_MIXED = 0.2


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention.

    Parameters
    ----------
    kv_heads, head_dim
        Shape of a token's key and value.
    window
        The model's own sliding window, ``None`` if the layer sees everything.
    rotary
        Whether queries and keys are rotated.
    """

    kv_heads: int
    head_dim: int
    window: int | None
    rotary: bool = True


def stored_bytes(
    layers: Sequence[AttentionLayer], tokens_per_layer: Sequence[int], element_bytes: int, chosen: OwnFormat | None
) -> list[int]:
    """Bytes of the keys and values of each layer that holds so many tokens.

    Parameters
    ----------
    layers, tokens_per_layer
        The layers, and what each holds.
    element_bytes
        Of the model's dtype.
    chosen
        How they are stored, ``None`` for the model's dtype.
    """
    formats = formats_of(chosen, len(layers))
    return [
        tokens * token_bytes(layer.kv_heads, layer.head_dim, element_bytes, own)
        for layer, tokens, own in zip(layers, tokens_per_layer, formats, strict=True)
    ]


def attention_layers(model: Any, text_config: Any) -> list[AttentionLayer]:
    """Feed a token or two and note what every layer passes to its attention.

    Parameters
    ----------
    model
        The transformers model.
    text_config
        Configuration of its language part.

    Raises
    ------
    CaseInvalid
        If the model does not use transformers' attention interface, or asks its attention for something that the paged
        ones do not do, or lets tokens meet outside of attention.
    """
    name = type(model).__name__
    layers: dict[int, AttentionLayer] = {}
    known = _known_layers(text_config)
    kinds = getattr(text_config, "layer_types", None) or []
    configured = getattr(text_config, "sliding_window", None)

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **asked: Any) -> Any:
        index: Any = getattr(module, "layer_idx", None)
        if index is None:
            raise CaseInvalid(f"{name}: its attention does not say which layer it belongs to; use --kv-engine=hf")
        kind = kinds[index] if index < len(kinds) else ""
        window = asked.get("sliding_window") or (configured if "sliding" in kind else None)
        _refuse_what_is_not_done(name, module, key, value, kind, asked)
        rotary = known is None or known.layers[index].rotary
        layers[index] = AttentionLayer(key.shape[1], key.shape[3], None if window is None else int(window), rotary)
        # every token is a sequence of its own here, so it sees its own value and nothing else
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None

    expected = int(text_config.num_hidden_layers)
    failed: Exception | None = None
    with torch.inference_mode(), _AttentionSet(text_config, record):
        try:
            together = _logits(model, [1, 2])
            alone = _logits(model, [2])
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # a class that does not know the interface has no mask to add, or no function to call
            failed = error
    if failed is not None or sorted(layers) != list(range(expected)):
        raise CaseInvalid(
            f"{name}: {len(layers)} of {expected} layers attend through transformers' attention interface, which is where "
            f"paged attention comes in{_why(known)}{_elsewhere(model, known)}"
        ) from failed
    recurrent = known is not None and any(layer.recurrent for layer in known.layers)
    if recurrent or (together[-1] - alone[-1]).norm() > _MIXED * alone[-1].norm():
        raise CaseInvalid(
            f"{name}: its tokens meet outside of attention (convolution or state){_elsewhere(model, known)}"
        )
    return [layers[index] for index in range(expected)]


def without_positions(text_config: Any) -> bool:
    """Whether the model tells its tokens apart by nothing but the causal mask: there is nothing to turn then."""
    known = _known_layers(text_config)
    return known is not None and known.positions == "none"


def _known_layers(text_config: Any) -> ModelLayers | None:
    """What the configuration says of the layers, ``None`` where it does not tell."""
    try:
        return layers_of(text_config.to_dict())
    except UnknownLayers:
        return None


def _why(known: ModelLayers | None) -> str:
    """What the layers are that do not attend through the interface, in brackets; empty where that is not known."""
    if known is None:
        return ""
    if known.positions == "alibi":
        return " (its positions are ALiBi biases)"
    others = [layer for layer in known.layers if layer.attention is None or layer.recurrent]
    if not others:
        return ""
    kinds = ", ".join(sorted({layer.what for layer in others}))
    return f" (layers {', '.join(str(layer.index) for layer in others[:4])}{', …' if len(others) > 4 else ''}: {kinds})"


def _elsewhere(model: Any, known: ModelLayers | None) -> str:
    """Where the model is measured, for a message; empty where it keeps a cache that engine `hf` does not handle either."""
    from transformers import DynamicCache

    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
            cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return ""
    if type(cache) is not DynamicCache:
        return ""
    if known is not None and known.positions == "alibi":
        return "; --kv-engine=hf measures its full cache"
    return "; use --kv-engine=hf"


def group_layers(layers: list[AttentionLayer], limits: Limits, policy: Policy | None) -> list[LayerGroup]:
    """Sort layers into groups that store the same tokens. A policy acts on those that see everything.

    Raises
    ------
    CaseInvalid
        If two sliding windows would act on the same layers, a policy has no layer left to act on, or the limits' cache format
        is nothing for pages or the model's heads.
    """
    formats = formats_of(limits.cache_format, len(layers))
    if limits.cache_format is not None:
        _refuse_format(limits.cache_format, formats, layers)
    own = {layer.window for layer in layers if layer.window is not None and layer.window < limits.max_model_len}
    if own and limits.sliding_window is not None:
        raise CaseInvalid(
            f"sliding_window={limits.sliding_window}: the model has its own sliding window of {max(own)}; leave it out"
        )
    if policy is not None and limits.sliding_window is not None:
        raise CaseInvalid(
            f"policy {policy.name}: it would act on top of a sliding window of {limits.sliding_window}; use one or the other"
        )
    if policy is not None and own and all(layer.window in own for layer in layers):
        raise CaseInvalid(
            f"policy {policy.name}: every layer has the model's own sliding window of {max(own)}, and none a full cache to "
            "act on; keep prompt and output within the window, or use a model with layers of full attention"
        )
    members: dict[LayerGroup, list[int]] = {}
    for index, layer in enumerate(layers):
        window = layer.window if layer.window in own else limits.sliding_window
        treated = policy is not None and window is None and index not in policy.skip_layers
        turned = policy is not None and (policy.positions == "cache" or policy.needs.query_statistics is not None)
        key = LayerGroup(
            layers=(),
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            window=window,
            sinks=limits.attention_sinks if window is not None else 0,
            compressed=treated,
            places=treated and policy is not None and policy.positions == "cache" and layer.rotary,
            rotary=layer.rotary or not (treated and turned),
            format=formats[index],
        )
        members.setdefault(key, []).append(index)
    return [replace(key, layers=tuple(indices)) for key, indices in members.items()]


def _refuse_format(chosen: OwnFormat, formats: Sequence[CacheFormat | None], layers: Sequence[AttentionLayer]) -> None:
    reasons = [unpaged(chosen)]
    reasons += [own.refused(one.head_dim, one.head_dim) for own, one in zip(formats, layers, strict=True) if own]
    for reason in filter(None, reasons):
        raise CaseInvalid(f"--kv-cache-dtype={chosen.label}: {reason}")


class _AttentionSet:
    """Language layers attend through a function of ours inside the block, through what they had before behind it."""

    function: Callable[..., Any]

    def __init__(self, text_config: Any, function: Callable[..., Any]) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_PROBE, _probe)
        self._config, self._function = text_config, function

    def __enter__(self) -> None:
        _AttentionSet.function = self._function
        self._before = set_attention(self._config, _PROBE)

    def __exit__(self, *error: object) -> None:
        set_attention(self._config, self._before)


def _probe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float = 0.0, **asked: Any
) -> Any:
    # always the same object: kvpress wraps all functions that are registered when it is imported, and the wrapped one is
    # found from then on whatever is registered anew
    return _AttentionSet.function(module, query, key, value, mask, **asked)


def set_attention(text_config: Any, implementation: str) -> str:
    """Choose the attention function of the layers that read this configuration; return the one they had.

    The language part's own configuration is written: the public setter would change an image encoder's as well.
    """
    before: str = text_config._attn_implementation
    text_config._attn_implementation_internal = implementation
    return before


def _logits(model: Any, tokens: list[int]) -> Tensor:
    """Logits ``[n, vocab]`` in float32 of tokens that all stand at position 0."""
    ids = torch.tensor([tokens], device=model.device)
    found: Tensor = model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False).logits[0]
    return found.float()


def _refuse_what_is_not_done(
    name: str, module: nn.Module, key: Tensor, value: Tensor, kind: str, asked: dict[str, Any]
) -> None:
    reasons = [
        f"its attention takes {option}"
        for option, given in asked.items()
        if (option == "softcap" and given is not None) or (isinstance(given, Tensor) and option not in _HARMLESS)
    ]
    if asked.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        reasons.append("its attention is not causal")
    if "chunked" in kind:
        reasons.append("it has chunked attention layers")
    if key.shape[1:] != value.shape[1:]:
        reasons.append("its keys and values differ in shape")
    if getattr(module, "is_kv_shared_layer", False) and hasattr(module, "k_proj"):
        # releases before 5.9: without transformers' cache such a layer makes keys and values of its own
        reasons.append("its layers share keys and values through transformers' cache")
    if reasons:
        raise CaseInvalid(f"{name}: {reasons[0]}, which paged attention does not do; use --kv-engine=hf")
