"""What a request must be like to be served, and what ends it."""

from __future__ import annotations

from collections.abc import Collection

from kvsuite.models.images import ImageShape, image_problem
from kvsuite.models.load import LoadedModel

from .limits import Limits
from .request import Request


def problem(
    request: Request,
    limits: Limits,
    *,
    vocab_size: int,
    num_blocks: int | None,
    taken: Collection[str],
    has_policy: bool = False,
    images: ImageShape | str = "the model reads no images",
) -> str | None:
    """Why a request cannot be served, in words.

    Parameters
    ----------
    request
        A new request.
    limits
        Of the runtime.
    vocab_size
        Token ids that the model knows.
    num_blocks
        Blocks that a prompt may fill; ``None`` where a sliding window frees them again.
    taken
        Names of requests that are not over.
    has_policy
        Whether the runtime compresses.
    images
        What the model makes of an image, or why it reads none.
    """
    length = request.prompt_length
    if length == 0:
        return "the prompt is empty; give at least one token"
    if request.forced is not None and len(request.forced) == 0:
        return "forced is empty; give at least one token or leave it out"
    if not 0 <= request.scored <= length:
        return f"scored={request.scored}: the prompt has {length} tokens; give a number from 0 to that"
    if request.scored and (has_policy or request.forced is not None):
        # rows of one prompt all see the whole cache
        return "scored rows see a cache that nothing acts on; with a policy or forced output score token by token"
    outside = [t for t in (*request.tokens, *(request.forced or ())) if not 0 <= t < vocab_size]
    if outside:
        return f"token {outside[0]} is not in the vocabulary of {vocab_size}"
    # a text that is scored is a text, whatever tokens it has
    is_text = not request.images and (request.scored or request.forced is not None)
    if not is_text and (reason := image_problem(images, request.tokens, request.images)):
        return reason
    if length >= limits.max_model_len + bool(request.scored):
        return (
            f"a prompt of {length} tokens leaves no room for output in max_model_len={limits.max_model_len}; "
            "shorten it or raise the limit"
        )
    if request.id in taken:
        return f"another request named {request.id} is not over yet; give another id"
    blocks = -(-length // limits.block_size)
    if num_blocks is not None and blocks > num_blocks:
        return (
            f"a prompt of {length} tokens needs {blocks} blocks, the pool has {num_blocks}; "
            "give a larger num_blocks, pool_bytes or memory_share"
        )
    return None


def outgrown(request: Request, limits: Limits, num_blocks: int) -> str:
    """Why a request that was served so far cannot go on, in words."""
    return (
        f"its {len(request.tokens)} tokens do not fit the pool of {num_blocks} blocks of {limits.block_size} tokens, "
        "even alone; give a larger num_blocks, pool_bytes or memory_share"
    )


def settle_ends(request: Request, limits: Limits, eos_token_ids: frozenset[int]) -> None:
    """Settle what ends a request, so that not every token has to ask."""
    chosen = request.sampling
    request.longest = min(request.prompt_length + chosen.max_new_tokens, limits.max_model_len)
    request.stops = frozenset(chosen.stop_token_ids)
    if not chosen.ignore_eos:
        request.stops |= eos_token_ids
    if request.forced is not None:
        request.longest = min(request.longest, request.prompt_length + len(request.forced))


def model_eos_token_ids(loaded: LoadedModel) -> list[int]:
    """End-of-text tokens as `generate` would take them."""
    generation = getattr(loaded.model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(loaded.text_config, "eos_token_id", None)
    if found is None:
        return []
    return [int(token) for token in (found if isinstance(found, list) else [found])]
