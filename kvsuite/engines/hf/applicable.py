"""What can be done to a model's cache on this engine: which layers a policy acts on, and what is refused, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.cache_formats.cache_format import undivided
from kvsuite.cache_formats.chosen_format import HqqFormat
from kvsuite.compression.base import Policy
from kvsuite.compression.merging import CacheShape, Merging, unmerged
from kvsuite.engines.cache_compression import CacheCompression
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.layers import Layer, ModelLayers
from kvsuite.models.load import LoadedModel

from .decoder import CachedDecoder
from .hqq_cache import require_hqq


def span_of(workload: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence that is fed through the cache, as far as the case says it."""
    # the last token is chosen and never fed; the last one of a text is scored and never fed
    request = int(workload.get("prompt_tokens") or 1) + int(workload.get("max_new_tokens") or 1) - 1
    return max(request, int(workload.get("max_tokens") or 1) - 1)


def treated_layers(decoder: CachedDecoder, policy: Policy | None, span: int) -> frozenset[int]:
    """Layers on which ``policy`` acts where no sequence is longer than ``span``: those that hold all of it."""
    if policy is None:
        return frozenset()
    return frozenset(range(decoder.layers)) - set(policy.skip_layers) - set(decoder.bounded_layers(span))


def refuse_policy(policy: Policy, decoder: CachedDecoder, treated: Collection[int], span: int) -> None:
    """Refuse what a policy would do wrong on this model.

    Raises
    ------
    CaseInvalid
        With the reason.
    """
    of = decoder.of_layers
    layers = [of.layers[index] for index in treated]
    bounded = decoder.bounded_layers(span)
    if not layers and bounded:
        raise CaseInvalid(
            f"policy {policy.name} has no layer to act on: {_what(of, bounded)} of the model see less than the {span} tokens "
            "of the case, or carry states; give shorter texts, or a model with full attention"
        )
    if of.positions == "alibi":
        raise CaseInvalid(
            f"policy {policy.name}: the model's ALiBi biases count the places of a whole cache, and an evicted one has others; "
            "use a model with rotary positions"
        )
    if policy.positions == "cache" and of.positions == "learned":
        raise CaseInvalid(
            "positions=cache: the model adds positions to its embeddings, so a stored key cannot be moved; use "
            "--kv-positions=original"
        )
    if policy.positions == "cache" and of.learned_length is not None:
        raise CaseInvalid("positions=cache needs a model with one rotary embedding; use --kv-positions=original")
    looks = policy.needs.prompt or policy.merges or not policy.shared_across_heads
    if looks and any(layer.latent for layer in layers):
        raise CaseInvalid(
            f"policy {policy.name} looks at keys, and this model's cache stores latents (MLA); use one that goes by positions"
        )
    # before transformers 5.15 the cache holds what the latents expand to, of which the last part is rotated
    if policy.positions == "cache" and any(layer.latent or layer.key_dim != layer.value_dim for layer in layers):
        raise CaseInvalid(
            "positions=cache: this model's cache stores latents (MLA) or keys made of them; use --kv-positions=original"
        )
    if looks and not policy.merges and len({layer.kv_heads for layer in layers}) > 1:
        raise CaseInvalid(
            f"policy {policy.name} decides for each head, and layers of this model have different numbers of heads"
        )
    if policy.needs.prompt and not getattr(decoder.model, "_supports_attention_backend", False):
        raise CaseInvalid(
            f"policy {policy.name} looks at queries, which {type(decoder.model).__name__} shows to no attention function; use "
            "one that goes by keys or positions"
        )
    if policy.needs.query_statistics is not None and not all(layer.rotary for layer in layers):
        raise CaseInvalid(f"policy {policy.name} predicts rotations, and layers of this model rotate nothing")


def prepare_merging(policy: Policy, loaded: LoadedModel, of: ModelLayers, treated: Collection[int]) -> None:
    """Make a policy that merges ready for the layers it acts on; nothing for others.

    Raises
    ------
    CaseInvalid
        If it is not for this model.
    """
    if not isinstance(policy, Merging):
        return
    layers = [of.layers[index] for index in treated]
    policy.prepare(
        CacheShape(
            model=loaded.spec.label,
            revision=loaded.spec.revision,
            layers=len(of.layers),
            head_dims=frozenset(width for layer in layers for width in (layer.key_dim, layer.value_dim)),
            device=loaded.device,
            dtype=loaded.dtype,
        )
    )


def refuse_press(name: str, decoder: CachedDecoder, span: int) -> None:
    """Refuse a press on a model whose layers are not all alike and full: presses know no other.

    Raises
    ------
    CaseInvalid
        With the reason.
    """
    of = decoder.of_layers
    if bounded := decoder.bounded_layers(span):
        raise CaseInvalid(
            f"{name}: a press works on layers that hold the whole text, and {_what(of, bounded)} of the model see "
            f"less than the {span} tokens of the case, or carry states"
        )
    if any(layer.latent for layer in of.layers):
        raise CaseInvalid(f"{name}: a press works on keys and values, and this model's cache stores latents (MLA)")
    if of.positions == "alibi":
        raise CaseInvalid(
            f"{name}: the model's ALiBi biases count the places of a whole cache, and an evicted one has others"
        )


def _what(of: ModelLayers, indices: Collection[int]) -> str:
    """``layers 0, 1, 2 (sliding_attention of 24)``."""
    words = ", ".join(sorted({_word(of.layers[index]) for index in indices}))
    which = "all layers" if len(indices) == len(of.layers) else f"layers {', '.join(map(str, indices))}"
    return f"{which} ({words})"


def _word(layer: Layer) -> str:
    return layer.what if layer.window is None else f"{layer.what} of {layer.window}"


def refuse_format(chosen: OwnFormat, decoder: CachedDecoder, method: CacheCompression, span: int) -> None:
    """Refuse a cache format that the case's method or the model's layers cannot have.

    Raises
    ------
    CaseInvalid
        With the reason.
    """
    of, asked = decoder.of_layers, f"--kv-cache-dtype={chosen.label}"
    if method.press is not None:
        raise CaseInvalid(
            f"{asked}: {method.press.name} works on a cache of the model's own numbers; use a policy of kvsuite, or "
            "--kv-cache-dtype=auto"
        )
    if method.policy is not None and chosen.token_group > 1:
        raise CaseInvalid(
            f"{asked}: policy {method.policy.name} removes tokens, and groups per channel hold {chosen.token_group} of them "
            "together; use a format whose tokens are packed on their own (int4, int8, fp8_e4m3)"
        )
    if method.policy is not None and method.policy.merges:
        raise CaseInvalid(unmerged(asked, method.policy))
    if bounded := decoder.bounded_layers(span):
        raise CaseInvalid(
            f"{asked}: {_what(of, bounded)} of the model see less than the {span} tokens of the case, or carry states, and are "
            "stored in the model's own numbers alone; give shorter texts, or a model with full attention"
        )
    if any(layer.latent for layer in of.layers):
        raise CaseInvalid(f"{asked}: this model's cache stores latents (MLA), not keys and values of heads")
    for layer, one in zip(of.layers, chosen.of_layers(len(of.layers)), strict=True):
        if reason := None if one is None else one.refused(layer.key_dim, layer.value_dim):
            raise CaseInvalid(f"{asked}: {reason}")
    if chosen.is_mixed and (
        of.positions == "alibi" or not getattr(decoder.model, "_supports_attention_backend", False)
    ):
        raise CaseInvalid(
            f"{asked}: a query sees some tokens packed and some not, for which {type(decoder.model).__name__} takes no mask; "
            "use residual=0 and a format whose tokens are packed on their own"
        )


def refuse_foreign(chosen: HqqFormat, decoder: CachedDecoder, method: CacheCompression, span: int) -> None:
    """Refuse transformers' quantised cache where it is not installed, or is no cache for the case.

    Raises
    ------
    CaseInvalid, CaseSkipped
        With the reason.
    """
    named = method.press.name if method.press else method.policy.name if method.policy else None
    if named is not None:
        raise CaseInvalid(
            f"--kv-cache-dtype={chosen}: transformers' cache takes no method that removes tokens, such as {named}; use "
            "int4, int8 or fp8_e4m3"
        )
    of = decoder.of_layers
    if decoder.bounded_layers(span) or not of.plain:
        raise CaseInvalid(
            f"--kv-cache-dtype={chosen}: transformers' quantised cache is for models with full attention alone"
        )
    if any(layer.key_dim % chosen.group for layer in of.layers):
        raise CaseInvalid(f"--kv-cache-dtype={chosen}: {undivided(chosen.group, of.layers[0].key_dim)}")
    require_hqq(chosen)


def refuse_attention(model: Any, attention: str) -> None:
    """Refuse an attention function that computes something else.

    Raises
    ------
    UserError
        With the reason.
    """
    text = model.config.get_text_config()
    if attention == "eager" and text.model_type == "falcon" and getattr(text, "alibi", False):
        raise UserError(
            "--kv-attention=eager: transformers' eager attention of Falcon adds the ALiBi biases twice; use auto or sdpa"
        )


def check_layers(model: Any, of: ModelLayers) -> None:
    """Compare what was read from a configuration with what the loaded model stores and does.

    Raises
    ------
    CaseInvalid
        Where it stores nothing, keeps a cache of another kind, or a layer is not what was read: nothing is measured on a
        wrong reading.
    """
    if not any(layer.attention for layer in of.layers):
        raise CaseInvalid("the model holds no keys and values, so there is no cache to measure")
    with torch.inference_mode():
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        cache: Any = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if type(cache) is not DynamicCache:
        raise CaseInvalid(
            "the model gives no cache back"
            if cache is None
            else f"the model keeps a cache of its own ({type(cache).__name__}), which no engine of kvsuite handles"
        )
    if len(cache.layers) != len(of.layers):
        raise CaseInvalid(
            f"{len(of.layers)} layers were read from the configuration, and the cache has {len(cache.layers)}"
        )
    for layer, held in zip(of.layers, cache.layers, strict=True):
        found = _shape(getattr(held, "keys", None), getattr(held, "values", None))
        read = (layer.kv_heads, layer.key_dim, layer.value_dim) if layer.attention else None
        if found != read:
            raise CaseInvalid(
                f"layer {layer.index} ({layer.what}) was read as {read} (heads, widths of key and value) and stores {found}; "
                "please report the model"
            )
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        uses = getattr(module, "use_rope", None)
        if isinstance(index, int) and uses is not None and bool(uses) != of.layers[index].rotary:
            raise CaseInvalid(
                f"layer {index} was read as one that {'does not rotate' if uses else 'rotates'}; please report it"
            )


def _shape(keys: Tensor | None, values: Tensor | None) -> tuple[int, int, int] | None:
    if keys is None or values is None or not keys.numel():
        return None
    return keys.shape[1], keys.shape[3], values.shape[3]
