"""Long synthetic prompts: how long they come out, and the token, text or dialogue that the original repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsuite.errors import CaseInvalid, UserError

_FILL_TEXTS = (" Hello", " hello", " the", " test", " a")
DIALOGUE = (
    "User: What does a key-value cache keep while a language model writes its answer?\n"
    "Assistant: The keys and values of all tokens so far, so that a new token can attend to them without more work.\n"
    "User: Then why does it grow so large when many people ask at the same time?\n"
    "Assistant: Because each request keeps its own, layer by layer, for every token of its prompt and of its answer.\n"
    "User: Explain how that memory could be made smaller, and what it would cost.\n"
)


def output_tokens(asked: int, *, max_model_len: int) -> int:
    """Tokens to generate: as asked, or a quarter of the longest request but no more than 512 where 0 or less is asked."""
    return asked if asked > 0 else max(1, min(512, max_model_len // 4))


def clipped_context(context: int, output: int, *, max_model_len: int, typed: str) -> int:
    """Tokens of a prompt: as asked, or what the output leaves of ``max_model_len``.

    Raises
    ------
    UserError
        If nothing is left; ``typed`` is the option and value that ask for the output.
    """
    if context < 1:
        raise UserError(f"--kv-synthetic-context={context}: a prompt needs at least 1 token")
    left = min(context, max_model_len - output)
    if left < 1:
        raise UserError(
            f"{typed}: {output} output tokens leave no room for a prompt in requests of at most {max_model_len}; ask for "
            "fewer, or raise --kv-max-model-len"
        )
    return left


def fill_token(tokenizer: Any) -> int:
    """The token that a prompt without content repeats.

    The first id of " Hello", " hello", " the", " test", " a"; else the unknown token, the end of text, or 0 (also without
    tokenizer).
    """
    if tokenizer is None:
        return 0
    for text in _FILL_TEXTS:
        if ids := _ids(tokenizer, text):
            return ids[0]
    found = (tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in found if token is not None), 0)


def repeated(pattern: Sequence[int], length: int) -> list[int]:
    """``length`` tokens of a pattern that begins anew whenever it is over."""
    times = -(-length // len(pattern))
    return (list(pattern) * times)[:length]


def pattern_ids(text: str, tokenizer: Any, *, typed: str) -> list[int]:
    """Tokens of a text to repeat, without those that a tokenizer puts around texts.

    Raises
    ------
    CaseInvalid
        If the model has no tokenizer; ``typed`` names the option that asks for the text.
    UserError
        If the text has no tokens.
    """
    if tokenizer is None:
        raise CaseInvalid(
            f"{typed}: the model has no tokenizer; leave it out, and prompts are drawn from the vocabulary"
        )
    ids = _ids(tokenizer, text)
    if not ids:
        raise UserError(f"{typed}: gives no token; give a text that has one")
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
