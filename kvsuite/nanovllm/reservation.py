"""What running requests will hold at every later step, so that nobody is admitted who would cost another one its blocks.

How long a request can become is known, and decoding requests advance together, by one token a step. So it is known, too, how
many blocks they hold at any later step: until a request is over what it has stored by then, less what the policy will have
removed, no more than a sliding window sees; then nothing. Blocks that several requests share count once, for as long as one of
them may need them. A prompt counts as it is while it is computed, and as what the policy leaves of it afterwards.

A request is admitted if all of that fits the pool at every later step. Where outputs end as late as they may, no request is
preempted then; where they end earlier, blocks are free that somebody might have had. What is not known counts as the worst:
when exactly a prompt is complete (between the next step and the last one that it can take), and on two lanes how often the
others decode meanwhile (a prompt then counts at its largest from the start to the end).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from kvsuite.compression.base import ImageSpans, Policy

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
        # by row: tokens stored when decoding begins and tokens fed by then, tokens fed in the end; blocks held at most while
        # the prompt is computed, and afterwards
        self._facts: Ints = np.zeros((len(tables.blocks), 5), dtype=np.int64)
        # a row that gives blocks back while it runs does not free those that others hold, too, but takes its new ones
        self._gives_back = policy is not None or tables.window is not None
        # as long as the books: a policy may hold tensors
        self._largest = functools.lru_cache(maxsize=4096)(largest_after_prompt)

    def enter(self, request: Request) -> None:
        """Count a request, which has its row."""
        self._facts[request.row] = self._of(request)

    def fits(
        self,
        request: Request,
        found: Sequence[int],
        running: Sequence[Request],
        prompting: Sequence[bool],
        steps: int | None,
    ) -> bool:
        """Whether a waiting request may run beside the running ones.

        Parameters
        ----------
        request
            Has no row yet.
        found
            Blocks of its first tokens that the prefix cache has.
        running
            All running requests.
        prompting
            Which of them do not decode yet.
        steps
            In how many steps at most all of these, and the waiting one, decode; ``None`` if that is unknown.
        """
        pool, peak = self._tables.pool, self._of(request)[3]
        revived = sum(pool.references(block) == 0 for block in found)
        # mostly there is no room even now, and no need to look further
        if peak - len(found) + revived > pool.free:
            return False
        return self._most(running, prompting, steps, request, found) <= pool.num_blocks

    def promised(self, running: Sequence[Request], prompting: Sequence[bool], steps: int | None) -> int:
        """Most blocks in use at a time from now on, if nobody else is admitted. Parameters are those of `fits`."""
        return self._most(running, prompting, steps, None, ())

    def _most(
        self,
        running: Sequence[Request],
        prompting: Sequence[bool],
        steps: int | None,
        candidate: Request | None,
        found: Sequence[int],
    ) -> int:
        tables, pool = self._tables, self._tables.pool
        rows = np.array([request.row for request in running], dtype=np.int64)
        early = np.array(prompting, dtype=np.bool_)
        computed = np.array([request.computed for request in running], dtype=np.int64)
        facts, held, own, stored = self._facts[rows], tables.blocks[rows], self._own(rows, found), tables.lengths[rows]
        used = pool.num_blocks - pool.free
        if candidate is not None:
            revived = sum(pool.references(block) == 0 for block in found)
            used += revived
            facts = np.vstack([facts, self._of(candidate)])
            held, own = np.append(held, len(found)), np.append(own, revived)
            early, computed, stored = np.append(early, True), np.append(computed, 0), np.append(stored, 0)
        begins, fed, last, peaks, ends = facts.T
        stored = np.where(early, begins, stored)
        over = np.where(early, last - fed + (steps or 0), last - computed)
        if steps is None:
            over = np.where(early, np.iinfo(np.int64).max, over)
        # what is held grows until somebody is over, or prompts are complete: no other step needs more than these
        at = np.unique(np.append(over, steps or 1))
        holds = np.minimum(-(-(stored[:, None] + np.minimum(at, last.max())) // pool.block_size), ends[:, None])
        if steps is None:
            holds[early] = np.maximum(ends, peaks)[early, None]
        else:
            holds = np.where(early[:, None] & (at <= steps), np.maximum(holds, peaks[:, None]), holds)
        more = holds - (own if self._gives_back else held)[:, None]
        if self._policy is None:
            # what a window has passed is given back in a sequence's own next step, which prompts may come before
            more = np.where(at > steps, more, np.maximum(more, 0)) if steps is not None else np.maximum(more, 0)
        return used + int(np.where(at <= over[:, None], more, -own[:, None]).sum(axis=0).max())

    def _own(self, rows: Ints, found: Sequence[int]) -> Ints:
        """Blocks of every row that are free once it gives them back, and will be if ``found`` are held by another one."""
        tables, pool = self._tables, self._tables.pool
        held: Ints = tables.blocks[rows]
        if not found and int(tables.blocks.sum()) == pool.used:
            return held
        shared, own = set(found), np.zeros_like(held)
        for index, row in enumerate(rows.tolist()):
            own[index] = sum(pool.references(block) == 1 and block not in shared for block in tables.row_blocks(row))
        return own

    def _of(self, request: Request) -> tuple[int, int, int, int, int]:
        """What `_facts` says of a request."""
        size, longest, fed = self._tables.pool.block_size, request.largest, request.prefill
        if self._policy is not None and not request.spared:
            prompt = request.prompt_length
            left = size_after_action(self._policy, prompt, prompt, done=False, prompt=True, images=request.image_spans)
            begins = left + fed - prompt
            most = self._largest(self._policy, prompt, longest, request.image_spans)
            peak, late = prompt, prompt + request.merged_after
            if request.computed < late and request.merged_after:
                # it stays as it is until then, or is over before
                most, peak = max(most, min(late, longest)), min(late, fed)
                begins = begins if fed >= late else fed
            return begins, fed, longest, -(-peak // size), -(-most // size)
        peak, end = -(-fed // size), -(-longest // size)
        if self._tables.window is not None:
            chunk = min(self._step_tokens, fed)
            peak, end = min(peak, self._tables.visible_blocks(chunk)), min(end, self._tables.visible_blocks(1))
        return fed, fed, longest, peak, end


def largest_after_prompt(policy: Policy, prompt_length: int, tokens: int, images: ImageSpans = ()) -> int:
    """Tokens that a sequence stores at most from the end of its prompt on, if a policy acts on it.

    Parameters
    ----------
    policy
        The policy.
    prompt_length, tokens
        Tokens of the prompt, and of prompt and output together, the last one, which is never fed, excepted.
    images
        Where image tokens stand in the prompt.
    """
    stored = most = size_after_action(policy, prompt_length, prompt_length, done=False, prompt=True, images=images)
    if policy.acts == "prompt":
        return stored + tokens - prompt_length
    done = stored < prompt_length
    for seen in range(prompt_length + 1, tokens + 1):
        most = max(most, stored + 1)
        left = size_after_action(policy, stored + 1, seen, done=done, prompt=False)
        done |= left <= stored
        stored = left
    return most


def size_after_action(
    policy: Policy, stored: int, seen: int, *, done: bool, prompt: bool, images: ImageSpans = ()
) -> int:
    """Tokens that stay of ``stored`` ones after ``seen`` were seen, as `kvsuite.nanovllm.compression_stage` has it."""
    if not policy.due(step=seen, done=done, prompt=prompt):
        return stored
    return policy.size_of_prompt(stored, images) if prompt else policy.size_after(stored)
