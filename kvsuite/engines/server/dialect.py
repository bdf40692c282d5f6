"""What a server understands beside the protocol: found by asking it, once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import ClientClock

from .endpoint import Endpoint
from .failure import Refused, ServerFailed
from .served_model import ServedModel
from .streams import COMPLETIONS, Streams

TOKEN_IDS, TEXT = "token ids", "text"
PROMPT_LOGPROBS, ECHO = "prompt_logprobs", "echo"
#: enough tokens that a server which takes them for something else is found out
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Dialect:
    """How requests to a server are written.

    Parameters
    ----------
    prompt
        ``token ids``, or ``text`` where it takes none: then the tokens of a prompt are those that it makes of the text.
    extends
        Whether it takes fields that are no part of OpenAI's protocol: that an end of text ends nothing, that token ids come
        back, and which prompts may share a prefix cache.
    scores
        By which fields it gives log-probabilities of a prompt: ``prompt_logprobs`` or ``echo``; ``None`` where it does not.
    """

    prompt: str
    extends: bool
    scores: str | None

    def body(
        self, model: ServedModel, prompt: Sequence[int], new_tokens: int, tokenizer: Any, *, salt: str | None
    ) -> dict[str, Any]:
        """A request for exactly ``new_tokens`` tokens, greedily, as a stream.

        Parameters
        ----------
        salt
            Prompts of other salts share no prefix cache with this one; ``None``: any may be found again.
        """
        text: Any = list(prompt)
        if self.prompt == TEXT:
            text = tokenizer.decode(list(prompt), skip_special_tokens=False)
        found: dict[str, Any] = {
            "model": model.id,
            "prompt": text,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.extends:
            found |= {"ignore_eos": True, "return_token_ids": True, "cache_prompt": salt is None}
            if salt is not None:
                found["cache_salt"] = salt
        return found


def find_dialect(endpoint: Endpoint, model: ServedModel, tokenizer: Any) -> Dialect:
    """Ask a server what it takes: token ids before text, with extensions before without.

    Raises
    ------
    ServerFailed
        If it fails on one of these requests.
    CaseInvalid
        If it refuses every one.
    """
    ids = list(range(1, _PROBE_TOKENS + 1))
    if tokenizer is not None:
        ids = [int(token) for token in tokenizer("One two three, four five six.")["input_ids"]]
    refusal = ""
    for prompt in (TOKEN_IDS, *([] if tokenizer is None else [TEXT])):
        for extends in (True, False):
            dialect = Dialect(prompt, extends, None)
            try:
                body = dialect.body(model, ids, 2, tokenizer, salt=None)
                [reply] = Streams(endpoint, model.names, ClientClock()).complete([body])
            except Refused as error:
                refusal = str(error)
                continue
            taken = reply.usage.get("prompt_tokens", len(ids))
            if prompt == TOKEN_IDS and taken != len(ids):
                refusal = f"it takes a prompt of {len(ids)} token ids for {taken} tokens"
                if tokenizer is None:
                    refusal += ", and the model has no tokenizer here with which text could be sent"
                break
            scores = _scores(endpoint, model, ids) if prompt == TOKEN_IDS else None
            return Dialect(prompt, extends, scores)
    raise CaseInvalid(
        f"the server at {endpoint.url} refuses a completion: {refusal}; engine server needs {COMPLETIONS}"
    )


def prompt_losses(
    endpoint: Endpoint, model: ServedModel, scores: str, tokens: Sequence[int]
) -> list[tuple[float, bool]]:
    """``-log p`` in nats of every token but the first, and whether it was the most likely one.

    Raises
    ------
    ServerFailed
        If the answer does not tell them of these tokens.
    """
    asked = {"prompt_logprobs": 1} if scores == PROMPT_LOGPROBS else {"echo": True, "logprobs": 1}
    body = {"model": model.id, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, **asked}
    answer = endpoint.post(COMPLETIONS, body)
    try:
        said = answer.get("model")
        if said is not None and said not in model.names:
            raise ServerFailed(
                f"{endpoint.url}{COMPLETIONS}: answered for the model {endpoint.shown(said)}, not for {model.id}"
            )
        [choice] = answer["choices"]
        found = _by_rank(choice, tokens) if scores == PROMPT_LOGPROBS else _echoed(choice, tokens)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise ServerFailed(f"{endpoint.url}{COMPLETIONS}: gave no log-probabilities of the prompt's tokens") from None
    return found


def _scores(endpoint: Endpoint, model: ServedModel, ids: Sequence[int]) -> str | None:
    for scores in (PROMPT_LOGPROBS, ECHO):
        try:
            found = prompt_losses(endpoint, model, scores, ids)
        except (Refused, ServerFailed):
            # what cannot answer here, or knows no such field, has no perplexity; whether it serves was found out before
            continue
        if all(math.isfinite(loss) for loss, _ in found):
            return scores
    return None


def _by_rank(choice: Mapping[str, Any], tokens: Sequence[int]) -> list[tuple[float, bool]]:
    """vLLM's: for each position the tokens that it names, by id, with their ranks; nothing for the first."""
    positions = choice["prompt_logprobs"]
    if len(positions) != len(tokens):
        raise ValueError
    entries = [position[str(token)] for position, token in zip(positions[1:], tokens[1:], strict=True)]
    return [(-float(entry["logprob"]), int(entry["rank"]) == 1) for entry in entries]


def _echoed(choice: Mapping[str, Any], tokens: Sequence[int]) -> list[tuple[float, bool]]:
    """OpenAI's: the log-probabilities of the echoed prompt come first, then those of what was generated."""
    told = choice["logprobs"]
    own, top = told["token_logprobs"][: len(tokens)], told["top_logprobs"][: len(tokens)]
    if len(own) != len(tokens) or own[0] is not None:
        raise ValueError
    return [(-float(one), one >= max(best.values())) for one, best in zip(own[1:], top[1:], strict=True)]
