"""Token windows of the perplexity protocols: which tokens are scored, and what each of them is predicted from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvsuite.errors import UserError
from kvsuite.meters.quality import exponential

PROTOCOLS = ("hf-strided", "hf-docs", "disjoint", "lm-eval-rolling", "llama.cpp-half")
#: protocols that step by ``--kv-stride``; the others step by their window
STRIDED = ("hf-strided", "hf-docs")
_TITLES = {"hf-strided": "strided (original program)", "hf-docs": "strided (Hugging Face documentation)"}
PREFIX_RULES = ("none", "bos_first", "bos_each_window", "bos_over_first")
_RULES = {
    "hf-strided": PREFIX_RULES,
    "hf-docs": ("none",),
    "disjoint": PREFIX_RULES,
    "lm-eval-rolling": ("bos_first",),
    "llama.cpp-half": ("bos_over_first", "none"),
}


@dataclass(frozen=True)
class Window:
    """One forward pass: the tokens ``begin .. end - 2`` go in, the targets ``first_scored .. end - 1`` are scored.

    Parameters
    ----------
    begin
        Position of the window's first token; ``-1`` is the prefix token in front of the text (rule ``bos_first``).
    end
        Position after its last token.
    first_scored
        Position of its first target. Target ``t`` is predicted from the tokens ``begin .. t - 1``, and from the prefix
        token that rule ``bos_each_window`` puts before them.
    """

    begin: int
    end: int
    first_scored: int

    @property
    def targets(self) -> int:
        """Number of scored tokens; 0 for a last window of a single token."""
        return self.end - self.first_scored


def protocol_title(protocol: str) -> str:
    """A protocol as tables and figures name it."""
    return _TITLES.get(protocol, protocol)


def default_prefix(protocol: str, *, has_bos: bool) -> str:
    """Prefix rule of a protocol as its own program has it.

    ``hf-strided``, ``hf-docs`` and ``disjoint`` take the tokens as the tokenizer made them. ``lm-eval-rolling`` puts BOS,
    or EOS where there is none, in front of a text that is tokenised without special tokens. ``llama.cpp-half`` overwrites
    the first token of each chunk where the vocabulary says that a text begins with BOS (``has_bos``).
    """
    if protocol == "lm-eval-rolling":
        return "bos_first"
    return "bos_over_first" if protocol == "llama.cpp-half" and has_bos else "none"


def plan_windows(
    protocol: str,
    n_tokens: int,
    ctx: int,
    stride: int | None = None,
    *,
    prefix: str | None = None,
    typed: str = "--kv-dataset",
) -> list[Window]:
    """Cut a text of ``n_tokens`` tokens into windows.

    Parameters
    ----------
    protocol
        ``hf-strided``: for i = 0, stride, 2 stride, ... the window ``[max(i + stride - ctx, 0), min(i + stride, N))``, whose
        tokens from i on are targets (the program that this suite replaces; only targets that have a token before them
        count: N - 1 in all, and for ``stride == ctx`` N - windows). ``hf-docs``: the windows ``[i, min(i + ctx, N))`` up to
        the first that ends the text, whose tokens from the end of the window before on are targets (the Hugging Face
        documentation's "Perplexity of fixed-length models"); `target_weights` has its weights. ``disjoint``: ``hf-strided``
        with ``stride == ctx``.
        ``lm-eval-rolling``: ctx targets a window, each window conditioned on the one token before it, the first on the
        prefix token; the last window has fewer targets and as much context as fits (``get_rolling_token_windows`` of
        lm-evaluation-harness with ``context_len=1``, then ``make_disjoint_window``): all N tokens are scored.
        ``llama.cpp-half``: whole chunks of ctx tokens, of each the last ctx - ctx // 2 - 1 are scored (llama-perplexity).
    n_tokens
        Tokens of the text, N.
    ctx
        Most tokens that a forward pass may hold.
    stride
        Step of ``hf-strided`` and ``hf-docs``; the other protocols have none and do not read it.
    prefix
        One of `PREFIX_RULES`, ``None`` for the protocol's own. ``none``: the tokens as they are. ``bos_first``: one token
        before the text, which makes its first token a target. ``bos_each_window``: one before every window, which then
        holds ctx - 1 tokens of the text; all N tokens are scored. ``bos_over_first``: the first token of each window is
        overwritten; the targets stay the same.
    typed
        Option and value that gave the text, for messages: ``"--kv-dataset=x.txt"``.

    Returns
    -------
    list[Window]
        In the order of the text; every target once.

    Raises
    ------
    UserError
        If the protocol or the rule is unknown, they do not go together, or the text, ``ctx`` or ``stride`` does not fit.
    """
    if protocol not in PROTOCOLS:
        raise UserError(
            f"--kv-ppl-protocol={protocol}: unknown perplexity protocol; choose one of {', '.join(PROTOCOLS)}"
        )
    rule = default_prefix(protocol, has_bos=True) if prefix is None else prefix
    if rule not in _RULES[protocol]:
        raise UserError(
            f"--kv-bos={rule}: {protocol} cannot have it; choose one of {', '.join(('auto', *_RULES[protocol]))} "
            "or another --kv-ppl-protocol"
        )
    _check_text(n_tokens, typed)
    if ctx < 3:
        raise UserError(f"--kv-max-length={ctx}: a window needs at least 3 tokens; give a longer --kv-max-length")
    if protocol == "llama.cpp-half":
        return _halves(n_tokens, ctx)
    if protocol == "lm-eval-rolling":
        return _rolling(n_tokens, ctx)
    room = ctx - 1 if rule == "bos_each_window" else ctx
    step = room if protocol == "disjoint" else stride
    if step is None or step < 1:
        raise UserError(f"--kv-stride={step}: {protocol} needs a stride of at least 1; give one up to --kv-max-length")
    if step > room:
        raise UserError(
            f"--kv-stride={step}: longer than the window of {room} tokens, so that tokens would be skipped; "
            f"give a --kv-stride of at most {room} or a longer --kv-max-length"
        )
    if protocol == "hf-docs":
        return _documented(n_tokens, ctx, step)
    if rule == "bos_first":
        # the prefix token is a token like any other, in front of position 0
        return [_shift(window, -1) for window in _strided(n_tokens + 1, room, step)]
    return _strided(n_tokens, room, step, own_prefix=rule == "bos_each_window")


def _check_text(n_tokens: int, typed: str) -> None:
    if n_tokens < 2:
        found = "the text is empty" if n_tokens < 1 else "the text has one token only"
        raise UserError(f"{typed}: {found}, and a perplexity needs at least 2; give a longer text")


def _strided(n_tokens: int, ctx: int, stride: int, *, own_prefix: bool = False) -> list[Window]:
    windows = []
    for i in range(0, n_tokens, stride):
        begin, end = max(i + stride - ctx, 0), min(i + stride, n_tokens)
        # a window's first token has nothing to be predicted from, unless a prefix token of its own stands before it
        windows.append(Window(begin, end, i if own_prefix or i > begin else i + 1))
    return windows


def _documented(n_tokens: int, ctx: int, stride: int) -> list[Window]:
    windows: list[Window] = []
    before = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + ctx, n_tokens)
        windows.append(Window(begin, end, max(before, begin + 1)))
        before = end
        if end == n_tokens:
            break
    return windows


def _rolling(n_tokens: int, ctx: int) -> list[Window]:
    windows = []
    for first in range(0, n_tokens, ctx):
        end = min(first + ctx, n_tokens)
        # ctx inputs predict ctx targets: a window spans ctx + 1 positions, the first window from the prefix token on
        begin = -1 if first == 0 else end - ctx - 1
        windows.append(Window(begin, end, first))
    return windows


def _halves(n_tokens: int, ctx: int) -> list[Window]:
    if n_tokens < 2 * ctx:
        raise UserError(
            f"--kv-max-length={ctx}: llama.cpp-half needs a text of at least {2 * ctx} tokens, this one has {n_tokens}; "
            "give a longer text or a shorter --kv-max-length"
        )
    return [Window(at, at + ctx, at + ctx // 2 + 1) for at in range(0, n_tokens - ctx + 1, ctx)]


def _shift(window: Window, by: int) -> Window:
    return Window(window.begin + by, window.end + by, window.first_scored + by)


def merge_windows(windows: Sequence[Window], most: int | None = None) -> list[Window]:
    """Join neighbours that begin at the same token and leave out windows without a target.

    Parameters
    ----------
    windows
        As planned.
    most
        Longest window that is joined: beyond, rotary frequencies follow the length, and nothing is shared. ``None``: any.

    Notes
    -----
    Attention is causal, so windows that begin together share their hidden states exactly: the first ``ctx / stride`` windows
    of ``hf-strided`` are one forward pass. Windows that begin at different tokens share nothing, since every hidden state
    depends on where its window begins; ``disjoint``, ``lm-eval-rolling`` and ``llama.cpp-half`` have no such neighbours.
    """
    merged: list[Window] = []
    for window in windows:
        if window.targets == 0:
            continue
        last = merged[-1] if merged else None
        shared = most is None or window.end - window.begin <= most
        if last is not None and shared and last.begin == window.begin and last.end == window.first_scored:
            merged[-1] = replace(last, end=window.end)
        else:
            merged.append(window)
    return merged


def window_inputs(tokens: Sequence[int], window: Window, *, prefix: str, prefix_token: int | None) -> list[int]:
    """Token ids that go into the model for ``window``; its targets are predicted by the last ``window.targets`` of them.

    Raises
    ------
    UserError
        If the rule needs a prefix token and there is none.
    """
    body = list(tokens[max(window.begin, 0) : window.end - 1])
    if prefix == "none":
        return body
    if prefix_token is None:
        raise UserError(f"--kv-bos={prefix}: the tokenizer has neither a BOS nor an EOS token; give --kv-bos=none")
    if prefix == "bos_over_first":
        return [prefix_token, *body[1:]]
    return [prefix_token, *body] if prefix == "bos_each_window" or window.begin < 0 else body


def target_positions(windows: Sequence[Window]) -> list[int]:
    """Positions of all targets, in the order of the text."""
    return [position for window in windows for position in range(window.first_scored, window.end)]


def target_weights(protocol: str, windows: Sequence[Window]) -> list[float] | None:
    """How much each target's loss counts, in the order of the windows; ``None`` where all count alike.

    The documentation's code (``hf-docs``) multiplies the mean loss of a window by the number of its labels minus one and
    divides by the sum of these numbers. That is right for the first window, whose first label has nothing to be predicted
    from; of every other window it counts one token too few, so that each of its losses weighs ``(labels - 1) / labels``.
    """
    if protocol != "hf-docs":
        return None
    weights: list[float] = []
    before = 0
    for window in windows:
        if window.targets:
            weights += [(window.end - before - 1) / window.targets] * window.targets
        before = window.end
    return weights


def original_perplexity(nll: Sequence[float], windows: Sequence[Window]) -> float | None:
    """Perplexity by the original script's formula, for comparison with published numbers only.

    It weights the mean loss of each window by the tokens that it added, the unscored first one included, and divides by all
    tokens. ``None`` where a window has no target: its loss was not a number there. Only ``hf-strided`` and ``disjoint``
    without a prefix rule have an original.

    Parameters
    ----------
    nll
        Losses of all targets in nats, in the order of the windows.
    windows
        As `plan_windows` returned them.
    """
    total, at, before = 0.0, 0, 0
    for window in windows:
        if window.targets == 0:
            return None
        mean = math.fsum(nll[at : at + window.targets]) / window.targets
        total += mean * (window.end - before)
        at, before = at + window.targets, window.end
    return exponential(total / before)


@dataclass(frozen=True)
class TextCounts:
    """Words and bytes of a scored text, for the perplexities that different tokenizers share.

    Parameters
    ----------
    words
        Pieces between runs of white space, empty ones at the ends counted, as lm-evaluation-harness counts them.
    utf8_bytes
        Length in UTF-8.
    """

    words: int
    utf8_bytes: int

    @classmethod
    def of(cls, text: str) -> TextCounts:
        """Count ``text``, which must be exactly what was scored."""
        return cls(len(re.split(r"\s+", text)), len(text.encode()))

    def word_perplexity(self, nll_sum: float) -> float:
        """``exp(nll_sum / words)``."""
        return exponential(nll_sum / self.words)

    def byte_perplexity(self, nll_sum: float) -> float:
        """``exp(nll_sum / bytes)``."""
        return exponential(nll_sum / self.utf8_bytes)

    def bits_per_byte(self, nll_sum: float) -> float:
        """``nll_sum / (bytes * ln 2)``."""
        return nll_sum / (self.utf8_bytes * math.log(2))
