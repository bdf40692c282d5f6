"""Options of the compression suite, and those of the program that it replaces which are refused."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from collections.abc import Mapping
from typing import Annotated, ClassVar

from kvsuite.options.option import Option, OptionGroup, choice, list_of, ratio, switch, text, whole_number

# options of the originals that have no counterpart, and what does the job
_PRESS_INSTEAD = "head_aware is not part of kvsuite; use --kv-method=kvpress:AdaKV"
_SIBLING = (
    "not part of kvsuite; use --kv-method=kvpress:SnapKV, kvpress:PyramidKV or fix_size_l2 with --kv-fix-kv-sizes"
)
_REFUSED = {
    "classifications-path": _PRESS_INSTEAD,
    **dict.fromkeys(
        ("compare-new", "heavy-hitter-sizes", "h2o-recent-size", "observation-windows", "snapkv-keep-sizes", "base-sizes",
         "layer-decay", "min-size", "pyramid-profile", "target-sizes", "soft-limit", "hard-limit"),
        _SIBLING,
    ),
}  # fmt: skip


def _layers(typed: str) -> tuple[int, ...]:
    return () if typed.strip().lower() in ("", "none") else list_of(whole_number(0, 10_000))(typed)


class CompressionOptions(OptionGroup, frozen=True, kw_only=True):
    """Methods and their parameters, and how they are scored."""

    refused_names: ClassVar[Mapping[str, str]] = _REFUSED

    # fmt: off
    method: Annotated[tuple[str, ...], Option(
        list_of(text), "streaming_llm",
        "Compression methods, comma separated: streaming_llm, recent_only, fix_size_l2, l2_compress, snapkv, h2o, tova, knorm, "
        "expected_attention, kvpress:<Name>, with parameters in parentheses, several values in brackets, e.g. "
        "--kv-method='streaming_llm,snapkv(window=32,keep_ratio=[0.2,0.5])'.",
    )]
    compare_all: Annotated[bool, Option(
        switch, "false",
        "Run the originals' cross-section of all methods instead of --kv-method.",
        is_flag=True,
    )]
    no_baseline: Annotated[bool, Option(
        switch, "false",
        "Leave out the full cache.",
        is_flag=True,
    )]
    no_recent_only: Annotated[bool, Option(
        switch, "false",
        "Leave out the recent-only controls.",
        is_flag=True,
    )]
    keep_ratios: Annotated[tuple[float, ...], Option(
        list_of(ratio), "0.8,0.5,0.3",
        "Fractions in (0, 1]: kept by presses and policies that keep a share, protected as recent by fix_size_l2.",
    )]
    prune_after: Annotated[int, Option(
        whole_number(0), "100",
        "l2_compress leaves caches up to this many tokens alone.",
    )]
    l2_mode: Annotated[str, Option(
        text, "single_shot",
        "When l2_compress acts: single_shot (the paper), every_token (the original program) or interval=N.",
        original="every_token",
    )]
    fix_kv_sizes: Annotated[tuple[int, ...], Option(
        list_of(whole_number(1)), "32,64,128",
        "Cache sizes of fix_size_l2, in tokens.",
        original="256,512",
    )]
    strategies: Annotated[tuple[str, ...], Option(
        list_of(choice("keep_low", "keep_high", "random")), "keep_low",
        "Which older tokens fix_size_l2 keeps: keep_low, keep_high (key norm), random (seeded).",
    )]
    start_size: Annotated[int, Option(
        whole_number(0), "4",
        "Attention sinks of streaming_llm.",
    )]
    recent_sizes: Annotated[tuple[int, ...], Option(
        list_of(whole_number(1)), "28,60,124",
        "Recent tokens of streaming_llm; sinks + recent is the cache size.",
        original="252,508,1020",
    )]
    skip_layers: Annotated[tuple[int, ...], Option(
        _layers, "none",
        "Layers never compressed, e.g. --kv-skip-layers=0,1, or none.",
        original="0,1",
    )]
    positions: Annotated[str, Option(
        choice("original", "cache", "both"), "original",
        "original: keys keep their rotation; cache: keys are re-rotated to their place in the cache "
        "(StreamingLLM's paper); both: every group twice.",
    )]
    protocol: Annotated[str, Option(
        choice("auto", "streaming-decode", "prefix-continuation"), "auto",
        "How quality is scored; auto is prefix-continuation when a press is selected (for all groups), else "
        "streaming-decode.",
    )]
    divergence: Annotated[bool, Option(
        switch, "true",
        "Compare the predictions of every cache with the full cache's, token by token (KL divergence, same most likely token, "
        "paired loss): one extra scored pass a text, none where the full cache is in the run; off leaves it out.",
        example="off",
    )]
    max_tokens: Annotated[int, Option(
        whole_number(2), "257",
        "Tokens evaluated of each text.",
        original="2000",
    )]
    # fmt: on
