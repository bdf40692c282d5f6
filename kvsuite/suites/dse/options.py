"""Options of the design-space suite."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated

from kvsuite.options.numbers import MOST_REQUESTS
from kvsuite.options.option import Option, OptionGroup, share, switch, text, whole_number


def _window(typed: str) -> int:
    """A sliding window as in ``--kv-space``; -1 for none."""
    return -1 if typed.lower() in ("off", "-1") else whole_number(1)(typed)


class DseOptions(OptionGroup, frozen=True, kw_only=True):
    """The space, and what is served at each of its points."""

    # fmt: off
    space: Annotated[str, Option(
        text, "small",
        "Design space of the KV cache: small (6 points), schemes (3), full (396), or the values of its axes, "
        'e.g. --kv-space="ctx=4096,8192;batch=1,4;window=off,2048;sink=0,4"; several joined by |.',
    )]
    dse: Annotated[bool, Option(
        switch, "false",
        "Short for --kv-space=full.",
        is_flag=True,
    )]
    context_window_size: Annotated[int | None, Option(
        whole_number(1), "",
        "Tokens of a sequence at most, of a single design point in place of --kv-space.",
        original="8192", example="1024",
    )]
    prefill_chunk_size: Annotated[int | None, Option(
        whole_number(1), "",
        "Prompt tokens of a step at most, of a single design point.",
        original="8192", example="256",
    )]
    max_batch_size: Annotated[int | None, Option(
        whole_number(1, MOST_REQUESTS), "",
        "Sequences at the same time, of a single design point.",
        original="4", example="4",
    )]
    sliding_window_size: Annotated[int | None, Option(
        _window, "",
        "Tokens that a query sees at most, of a single design point; off or -1 for all.",
        original="-1", example="off",
    )]
    attention_sink_size: Annotated[int | None, Option(
        whole_number(0), "",
        "First tokens that stay visible beside the window, of a single design point.",
        original="0", example="4",
    )]
    prompt_share: Annotated[float, Option(
        share, "0.5",
        "Prompt of the design-space suite, as a share of the context window.",
    )]
    prefix_caching: Annotated[bool, Option(
        switch, "false",
        "Serve every prompt of the design-space suite a second time from the prefix cache, for a cached TTFT "
        "beside the computed one.",
        is_flag=True,
    )]
    # fmt: on
