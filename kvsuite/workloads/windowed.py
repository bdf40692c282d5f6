"""Texts of a run cut into the windows of a perplexity protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvsuite.errors import UserError

from .windows import TextCounts, Window, default_prefix, plan_windows


@dataclass(frozen=True)
class WindowedText:
    """One text: its tokens, its windows, and its words and bytes.

    ``counts`` is ``None`` where the tokenizer cannot say which characters the tokens are.
    """

    tokens: list[int]
    windows: list[Window]
    counts: TextCounts | None


@dataclass(frozen=True)
class WindowedTexts:
    """What a perplexity case scores.

    Parameters
    ----------
    texts
        One after another; no window crosses from one into the next.
    rule
        Prefix rule, resolved.
    prefix_token
        Its token, ``None`` where the tokenizer has neither BOS nor EOS.
    revision
        Hash of all tokens.
    facts
        For the record's ``dataset``.
    """

    texts: tuple[WindowedText, ...]
    rule: str
    prefix_token: int | None
    revision: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class WindowRule:
    """Protocol, window and prefix rule as a case asks for them; ``rule`` ``None`` is the protocol's own."""

    protocol: str
    max_length: int
    stride: int
    rule: str | None
    eval_tokens: int | None

    def resolved(self, tokenizer: Any) -> str:
        """The prefix rule for texts of this tokenizer.

        Raises
        ------
        UserError
            If the rule needs a token that the tokenizer does not have.
        """
        rule = self.rule or default_prefix(self.protocol, has_bos=adds_bos(tokenizer))
        if rule != "none" and prefix_token(tokenizer) is None:
            # its only rule
            mend = "another --kv-ppl-protocol" if self.protocol == "lm-eval-rolling" else "--kv-bos=none"
            raise UserError(
                f"--kv-bos={rule}: {self.protocol} needs a token before the text, and the tokenizer has neither a BOS nor an "
                f"EOS token; give {mend}"
            )
        return rule

    def cut(self, tokenizer: Any, text: str, rule: str, *, typed: str = "--kv-dataset") -> WindowedText:
        """Tokenise one text and plan its windows; ``typed`` is the option and value that gave it, for messages.

        Raises
        ------
        UserError
            If the text is too short, or window and rule do not fit.
        """
        ids, cut = _tokenise(tokenizer, text, special=rule in ("none", "bos_over_first"), most=self.eval_tokens)
        windows = plan_windows(self.protocol, len(ids), self.max_length, self.stride, prefix=rule, typed=typed)
        if not any(window.targets for window in windows):
            raise UserError(
                f"--kv-max-length={self.max_length}: no token of the text has another one before it in its window; give "
                "a longer --kv-max-length"
            )
        return WindowedText(ids, windows, None if cut is None else TextCounts.of(cut))


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with BOS by itself."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def prefix_token(tokenizer: Any) -> int | None:
    """BOS, or EOS where there is none."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return None if found is None else int(found)


def _tokenise(tokenizer: Any, text: str, *, special: bool, most: int | None) -> tuple[list[int], str | None]:
    """At most ``most`` tokens of ``text``, and the characters that they are."""
    offsets = bool(tokenizer.is_fast)
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=offsets, verbose=False)
    ids = list(found["input_ids"])
    if most is None or len(ids) <= most:
        return ids, text
    return ids[:most], text[: found["offset_mapping"][most - 1][1]] if offsets else None
