"""What running requests will still take from the pools, so that nobody is admitted who would cost another one its blocks.

Every running request counts with the most that it can still hold: its longest output, less what the policy will have removed
by then, no more than a sliding window sees. Blocks that several requests share count once. Two moments matter:

1. *In the end*, with all prompts complete and compressed, all running requests at their longest have to fit.
2. *Meanwhile* the prompts being computed have to fit as they are, beside whatever the others hold. Where decoding pauses
   for prompts (prompts first, on one lane) those others do not grow; else they count at their longest here, too.

The longest is a known number, not a guess: where outputs end as late as their requests allow, no request is ever preempted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from kvsuite.compression.base import Policy

from .block_table import BlockTables, Ints
from .request import Request


class Reservation:
    """Books of one layer group, a row for every running request.

    Parameters
    ----------
    tables
        The group's blocks.
    step_tokens
        Tokens of a step at most.
    policy
        What acts on the group, if anything does.
    """

    def __init__(self, tables: BlockTables, step_tokens: int, policy: Policy | None) -> None:
        self._tables = tables
        self._step_tokens = step_tokens
        self._policy = policy
        rows = len(tables.blocks)
        # blocks that a row holds at most: once its prompt is complete, and while it is computed
        self._ends: Ints = np.zeros(rows, dtype=np.int64)
        self._peaks: Ints = np.zeros(rows, dtype=np.int64)
        # a row that gives blocks back while it runs does not free those that others hold, too, but takes its new ones
        self._gives_back = policy is not None or tables.window is not None

    def enter(self, request: Request) -> None:
        """Count a request, which has its row."""
        self._ends[request.row], self._peaks[request.row] = self._most(request)

    def leave(self, row: int) -> None:
        """Count a row no longer."""
        self._ends[row] = self._peaks[row] = 0

    def promised(self, prompting: Iterable[Request], *, pauses: bool) -> int:
        """Most blocks that are in use at a time from now on, if nobody else is admitted."""
        return self._total(prompting, None, [], pauses)

    def fits(self, request: Request, found: list[int], prompting: Iterable[Request], *, pauses: bool) -> bool:
        """Whether a waiting request may run beside the running ones.

        Parameters
        ----------
        request
            Has no row yet.
        found
            Blocks of its first tokens that the prefix cache has.
        prompting
            Running requests whose prompts are not complete.
        pauses
            Whether decoding pauses while prompts are computed.
        """
        return self._total(prompting, request, found, pauses) <= self._tables.pool.num_blocks

    def _total(self, prompting: Iterable[Request], candidate: Request | None, found: list[int], pauses: bool) -> int:
        tables, pool = self._tables, self._tables.pool
        used = pool.num_blocks - pool.free + sum(pool.references(block) == 0 for block in found)
        own = self._own(found)
        to_come = self._ends - own
        if self._policy is None:
            to_come = np.maximum(to_come, 0)
        rows = np.array([request.row for request in prompting], dtype=np.int64)
        # a compressed prompt, too, may need more blocks than it gives back, if others hold its own
        rises = np.maximum(self._peaks[rows] - tables.blocks[rows], to_come[rows])
        in_the_end = int(to_come.sum())
        meanwhile = int(rises.sum()) + (0 if pauses else int(np.maximum(np.delete(to_come, rows), 0).sum()))
        if candidate is not None:
            end, peak = self._most(candidate)
            mine = sum(pool.references(block) == 0 for block in found) if self._gives_back else len(found)
            more = end - mine if self._policy is not None else max(end - mine, 0)
            in_the_end += more
            meanwhile += max(peak - len(found), more)
        return used + max(in_the_end, meanwhile, 0)

    def _own(self, found: Sequence[int]) -> Ints:
        """Blocks of every row that are free once it gives them back, and will be if ``found`` are held by another one."""
        tables, pool = self._tables, self._tables.pool
        if not self._gives_back or (not found and int(tables.blocks.sum()) == pool.used):
            return tables.blocks
        shared, own = set(found), np.zeros_like(tables.blocks)
        for row in np.flatnonzero(tables.blocks).tolist():
            own[row] = sum(pool.references(block) == 1 and block not in shared for block in tables.row_blocks(row))
        return own

    def _most(self, request: Request) -> tuple[int, int]:
        """Blocks held at most once the prompt is complete, and while it is computed."""
        size = self._tables.pool.block_size
        longest = request.largest
        end, peak = -(-longest // size), -(-min(len(request.tokens), longest) // size)
        if self._policy is not None:
            kept = largest_after_prompt(self._policy, request.prompt_length, longest)
            return -(-kept // size), -(-request.prompt_length // size)
        if self._tables.window is not None:
            chunk = min(self._step_tokens, len(request.tokens))
            return min(end, self._tables.visible_blocks(1)), min(end, self._tables.visible_blocks(chunk))
        return end, peak


@functools.lru_cache(maxsize=4096)
def largest_after_prompt(policy: Policy, prompt_length: int, tokens: int) -> int:
    """Tokens that a sequence stores at most from the end of its prompt on, if a policy acts on it.

    Parameters
    ----------
    policy
        The policy.
    prompt_length, tokens
        Tokens of the prompt, and of prompt and output together, the last one, which is never fed, excepted.
    """
    stored = most = _act(policy, prompt_length, prompt_length, done=False, prompt=True)
    if policy.acts == "prompt":
        return stored + tokens - prompt_length
    done = stored < prompt_length
    for seen in range(prompt_length + 1, tokens + 1):
        most = max(most, stored + 1)
        left = _act(policy, stored + 1, seen, done=done, prompt=False)
        done |= left <= stored
        stored = left
    return most


def _act(policy: Policy, stored: int, seen: int, *, done: bool, prompt: bool) -> int:
    """Tokens that stay of ``stored`` ones after ``seen`` were seen, as `kvsuite.nanovllm.eviction.Eviction.act` has it."""
    return policy.size_after(stored) if policy.due(step=seen, done=done, prompt=prompt) else stored
