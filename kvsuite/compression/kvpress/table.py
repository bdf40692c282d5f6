"""What each of the 44 presses of kvpress 0.5.5 does, found by running it: tests/compression/test_kvpress_matrix.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Compresses = Literal["prefill", "exit", "decode", "prefill+decode"]
Attention = Literal["any", "sdpa", "eager"]

# where the removed ratio goes, beside the name of a constructor argument that takes it as it is
INNER = "inner"
PER_LAYER = "compression_ratios"
TARGET = "target_size"


@dataclass(frozen=True)
class PressInfo:
    """One press: what it needs, what it changes and what it gives back.

    Parameters
    ----------
    name
        The class name without ``Press``, as ``kvpress:<name>`` takes it.
    frees_memory
        Whether cached tensors get smaller. ``False``: the press masks keys or zeroes channels of a full-size cache.
    compresses
        When: ``prefill`` inside the prompt's forward, ``exit`` after it with further forwards over the prompt,
        ``decode`` between generated tokens, ``prefill+decode`` both.
    attention
        ``eager`` needs the attention weights, ``sdpa`` refuses them (any implementation but eager will do).
    uneven_layers
        Layers may keep different numbers of tokens. The model builds one mask for all, so that the continuation has to
        be fed one token at a time, without eager attention.
    ratio
        Constructor argument that takes the removed ratio; ``inner``: the inner presses take it;
        ``compression_ratios``: one per layer, rising linearly with depth around it; ``target_size``: the prompt's
        length times the keep ratio, held while decoding (a keep ratio of 1 evicts nothing); ``None``: the press has no
        ratio.
    inner
        Default inner presses of a wrapper, by constructor argument; a tuple where the argument is a list.
    arguments
        Other constructor arguments in which kvsuite differs from kvpress' defaults, or which have none.
    positions
        ``original``: kept keys keep their rotation and positions go on at the prompt's true length. ``cache``: keys are
        re-rotated to their place in the cache and positions go on at the number of stored tokens.
    random
        Draws from torch's global generator, also where the press has no seed of its own.
    batch_one
        Treats every sequence of a batch as the first one, or fails: only for batches of one.
    needs_tokenizer
        Writes a prompt of its own for its replays.
    unavailable
        Why it cannot run here at all, ``None`` if it can.
    """

    name: str
    frees_memory: bool = True
    compresses: Compresses = "prefill"
    attention: Attention = "any"
    uneven_layers: bool = False
    ratio: str | None = "compression_ratio"
    inner: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict, hash=False)
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    positions: Literal["original", "cache"] = "original"
    random: bool = False
    batch_one: bool = False
    needs_tokenizer: bool = False
    unavailable: str | None = None

    @property
    def takes_ratio(self) -> bool:
        """Whether the keep ratio reaches the press; for one that has none the axis is inert."""
        return self.ratio is not None

    @property
    def class_name(self) -> str:
        """Name of the class in kvpress."""
        return f"{self.name}Press"


def _masking(name: str, **fields: Any) -> PressInfo:
    return PressInfo(name, frees_memory=False, attention="sdpa", **fields)


def _decoding(name: str, base: str, ratio: str, **fields: Any) -> PressInfo:
    # kvpress compresses every 512 tokens by default, so that shorter outputs would never be compressed
    arguments = {"compression_interval": 16}
    return PressInfo(name, compresses="decode", ratio=ratio, inner={"base_press": base}, arguments=arguments, **fields)


def _needs_hub(name: str, what: str, **fields: Any) -> PressInfo:
    return PressInfo(name, unavailable=f"needs {what}, which kvpress downloads for single models", **fields)


_KNORM, _SNAPKV = {"press": "Knorm"}, {"press": "SnapKV"}

PRESSES: Mapping[str, PressInfo] = {
    info.name: info
    for info in (
        # scorers: the tokens with the lowest scores are cut out, per KV head
        PressInfo("CUR"),
        PressInfo("Cap"),
        PressInfo("Compactor", random=True),
        PressInfo("ExpectedAttention"),
        PressInfo("KeyDiff"),
        PressInfo("Knorm"),
        PressInfo("LagKV"),
        PressInfo("LeverageScore", random=True),
        PressInfo("NonCausalAttn"),
        PressInfo("ObservedAttention", attention="eager"),
        PressInfo("PyramidKV", attention="sdpa", uneven_layers=True),
        PressInfo("Random", random=True),
        PressInfo("SnapKV"),
        PressInfo("StreamingLLM"),
        PressInfo("TOVA"),
        # wrappers; the inner press is the one of the method's paper or, where it names none, of kvpress' evaluation
        PressInfo("Block", attention="sdpa", ratio=INNER, inner={"press": "KeyDiff"}),
        PressInfo("Chunk", attention="sdpa", ratio=INNER, inner=_KNORM),
        PressInfo("ChunkKV", attention="sdpa", uneven_layers=True, ratio=INNER, inner=_SNAPKV, batch_one=True),
        PressInfo("EntropyGatedChunkKV", attention="sdpa", ratio=INNER, inner=_SNAPKV, batch_one=True),
        PressInfo("CriticalKV", ratio=INNER, inner=_SNAPKV),
        PressInfo("KeyRerotation", ratio=INNER, inner={"press": "StreamingLLM"}, positions="cache"),
        PressInfo("Merging", ratio=INNER, inner=_SNAPKV),
        PressInfo("PerLayerCompression", attention="sdpa", uneven_layers=True, ratio=PER_LAYER, inner=_KNORM),
        PressInfo("Composed", ratio=INNER, inner={"presses": ("SnapKV", "ThinK")}),
        # masks instead of eviction: the cache stays as large; the threshold masks about half of SmolLM2's keys
        _masking("AdaKV", ratio=INNER, inner=_SNAPKV),
        _masking("CriticalAdaKV", ratio=INNER, inner=_SNAPKV, batch_one=True),
        _masking("DMS", ratio=None, inner={"press": "KeyDiff"}, arguments={"threshold": -0.75}),
        _masking("KVzip", compresses="exit", batch_one=True, needs_tokenizer=True),
        _masking("KVgrad", compresses="exit", batch_one=True, needs_tokenizer=True),
        # zeroes key channels, so that half of the ratio of the cache at most could be saved
        PressInfo("ThinK", frees_memory=False, ratio="key_channel_compression_ratio"),
        PressInfo("KVCompose", compresses="exit", attention="sdpa", uneven_layers=True, batch_one=True),
        # the threshold that kvpress recommends for Llama 3; its default of 1.0 never compresses
        PressInfo("SimLayerKV", attention="sdpa", uneven_layers=True, ratio=None, arguments={"lazy_threshold": 0.9}),
        # between generated tokens
        _decoding("Decoding", "Knorm", TARGET),
        _decoding("CompressionRatioDecoding", "Knorm", "target_compression_ratio"),
        _decoding("CAM", "StreamingLLM", TARGET, random=True),
        PressInfo(
            "PrefillDecoding",
            compresses="prefill+decode",
            ratio=INNER,
            inner={"prefilling_press": "Knorm", "decoding_press": "Decoding"},
        ),
        _needs_hub("DuoAttention", "attention patterns", frees_memory=False, attention="sdpa", ratio=None),
        _needs_hub("ExpectedAttentionStats", "query statistics"),
        _needs_hub("FastKVzip", "trained gates", frees_memory=False, attention="sdpa", compresses="exit"),
        _needs_hub("KVzap", "a trained scorer"),
        _needs_hub("LUKV", "a budget curve", frees_memory=False, attention="sdpa"),
        _needs_hub("QFilter", "trained Q-filters"),
        _needs_hub("RestoreKV", "restore embeddings and LoRA adapters", frees_memory=False, compresses="exit"),
        PressInfo(
            "Finch",
            positions="cache",
            unavailable="needs a question behind a delimiter token it adds to the model's vocabulary; generate() fails",
        ),
    )
}
