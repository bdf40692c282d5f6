"""What a policy does to a sequence at the end of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvsuite.compression.base import CacheView, ImageSpans, Policy
from kvsuite.compression.merging import Merging
from kvsuite.compression.prompt_view import PromptObservation
from kvsuite.compression.ranked import RankedPolicy

from .block_table import BlockTables
from .groups import LayerGroup
from .kv_pool import KVPool
from .pooled_prompt import PooledPrompt, has_weight_kernels, paged_norms
from .prompt_observer import PromptObserver
from .request import Request
from .stage_streams import Work
from .uploads import upload

#: keys and values that were made of tokens of some layers, once they are
Made = list[tuple[Tensor, Tensor]]

# what a policy looks at of several layers at once, in bytes
_LOOK_BYTES = 1 << 29


class PromptEviction:
    """One layer group's prompts under a policy.

    Work on keys and values is separate from the tables: what changes them gives the `Work` to be done then, on whatever
    stream, before anybody reads the sequence. On CUDA it does not wait for the device.

    Parameters
    ----------
    policy
        ``None`` for groups that are only compressed by hand.
    group, tables, pool
        The group, its block tables, its keys and values.
    observer
        Has the queries of prompts, for a policy that looks at a prompt.
    """

    def __init__(
        self,
        policy: Policy | None,
        group: LayerGroup,
        tables: BlockTables,
        pool: KVPool,
        observer: PromptObserver | None = None,
    ) -> None:
        self.policy = policy if group.compressed else None
        self.group = group
        self._tables = tables
        self._pool = pool
        self._observer = observer
        self._device = pool.device
        #: whether heads decide apart; layers ``[L, 1]`` and heads ``[kv_heads]`` of the group, to index by
        self.per_head = self.policy is not None and not self.policy.shared_across_heads
        self.layers = torch.tensor(group.layers, device=self._device)[:, None]
        self.heads = torch.arange(group.kv_heads, device=self._device)
        #: tokens removed so far
        self.evicted = 0

    def complete(self, row: int, images: ImageSpans = ()) -> Work | None:
        """Let a policy that acts at the end of the prompt alone act on a complete one; ``None`` if everything stays.

        ``images`` says where its image tokens stand.

        Raises
        ------
        PoolFullError
            If the kept tokens have no room; nothing has changed then.
        """
        assert self.policy is not None
        policy, length = self.policy, int(self._tables.lengths[row])
        due = policy.due(step=length, done=False, prompt=True)
        size = policy.size_of_prompt(length, images) if due else length
        if size == length:
            self._observations(row)
            return None
        if isinstance(policy, Merging):
            return self._merge(policy, row, size, images)
        if not (policy.needs.prompt or self.per_head):
            # positions alone decide, here and now
            chosen = policy.keep(CacheView(torch.arange(length), length - 1, step=length, ordered=True))
            return self.replace(row, size)(chosen)
        take = self.replace(row, size)
        observed = self._observations(row)

        def keep(slots: Tensor) -> Tensor:
            return (
                self._keep_of_prompt(slots, observed)
                if policy.needs.prompt
                else self._keep_by_score(self.scores(slots))
            )

        return take(keep)

    def made_of_prompt(self, request: Request, part: slice, made: Made) -> Work:
        """Work that makes what a policy makes of a complete prompt in some of the group's layers; the sequence stays as it is.

        Parameters
        ----------
        request
            Whose prompt it is.
        part
            The layers.
        made
            Gets keys and values, each ``[layers, kv_heads, n, head_dim]``, when the work is done.
        """
        policy, slots = self._merging, self._tables.stored_slots(request.row)[: request.prompt_length]
        images = request.image_spans

        def work() -> None:
            [source] = upload(self._device, slots)
            own = self._pool.keys_of(source, part), self._pool.values_of(source, part)
            made.append(policy.merge(*own, self.group.layers[part], images))

        return work

    def replace_prompt(self, request: Request, parts: Sequence[tuple[slice, Made]]) -> Work:
        """Give a sequence blocks for what was made of its prompt and for the tokens behind it; the work puts both there.

        Parameters
        ----------
        request
            Whose prompt it was.
        parts
            All layers of the group, and what the work of `made_of_prompt` gives until this one is done.

        Raises
        ------
        PoolFullError
            If there are no such blocks; nothing has changed then.
        """
        row, prompt = request.row, request.prompt_length
        before = self._tables.stored_slots(row)
        behind = before[prompt:]
        self._tables.replace(row, self._merging.size_of_prompt(prompt, request.image_spans) + len(behind))
        after = self._tables.stored_slots(row)
        self.evicted += len(before) - len(after)

        def work() -> None:
            source, target = upload(self._device, behind, after)
            for part, [(keys, values)] in parts:
                for one in (keys, values) if self._device.type == "cuda" else ():
                    # they may have been made on another stream, whose allocator is to wait for this one
                    one.record_stream(torch.cuda.current_stream(self._device))
                # read before anything of these layers is written: blocks may be the same
                own = self._pool.keys_of(source, part), self._pool.values_of(source, part)
                self._pool.put(target, part, torch.cat([keys, own[0]], dim=-2), torch.cat([values, own[1]], dim=-2))

        return work

    def leave(self, row: int) -> None:
        """Forget a sequence."""
        if self._observer is not None:
            self._observer.leave(row)

    def replace(self, row: int, size: int) -> Callable[[Tensor | Callable[[Tensor], Tensor]], Work]:
        """Give a sequence blocks for ``size`` of its tokens; what comes back turns a choice into the work of moving them.

        The choice is an index, or gives one from the slots ``[n]`` of all tokens once it is asked: then, not before.
        """
        before = self._tables.stored_slots(row)
        self._tables.replace(row, size)
        after = self._tables.stored_slots(row)
        self.evicted += len(before) - size

        def take(choice: Tensor | Callable[[Tensor], Tensor]) -> Work:
            def work() -> None:
                if isinstance(choice, Tensor) and choice.dim() == 1 and choice.device.type == "cpu":
                    source = upload(self._device, before[choice.numpy()])[0]
                else:
                    [slots] = upload(self._device, before)
                    keep = choice.to(self._device) if isinstance(choice, Tensor) else choice(slots)
                    source = slots[keep]
                self._pool.keep(source, *upload(self._device, after))

            return work

        return take

    def _merge(self, policy: Merging, row: int, size: int, images: ImageSpans) -> Work:
        """Give a sequence blocks for what a policy makes of its prompt; the work makes it."""
        before = self._tables.stored_slots(row)
        self._tables.replace(row, size)
        after = self._tables.stored_slots(row)
        self.evicted += len(before) - size

        def work() -> None:
            source, target = upload(self._device, before, after)
            # a layer's vectors are all read before any is written: blocks may be the same
            # keys and values of each token
            for part in self._parts(2 * len(before), together=True):
                own = self._pool.keys_of(source, part), self._pool.values_of(source, part)
                self._pool.put(target, part, *policy.merge(*own, self.group.layers[part], images))

        return work

    def keep_observed(self, row: int) -> Tensor:
        """What a policy that looks at a prompt keeps of one, int64 ``[layers, kv_heads, k]``."""
        [slots] = upload(self._device, self._tables.stored_slots(row))
        assert self._observer is not None
        return self._keep_of_prompt(slots, self._observer.observations(row, self.group.layers))

    def _keep_of_prompt(self, slots: Tensor, observed: Sequence[PromptObservation]) -> Tensor:
        """What a policy that looks at a prompt keeps of one in ``slots``, ``[layers, kv_heads, k]``.

        As many layers as have room are looked at together; where scores are all that decides, all of them are ranked at once.
        """
        policy = self.policy
        assert policy is not None
        assert self._observer is not None
        observer, layers, length = self._observer, self.group.layers, slots.shape[0]
        positions = torch.arange(length, device=self._device)
        together = policy.heads_apart and len({one.scale for one in observed}) == 1
        scores, kept = [], []
        for part in self._parts(
            length, observed[0].numbers_of_token(weights=not has_weight_kernels(self._pool)), together=together
        ):
            heads = len(layers[part]) * self.group.kv_heads
            view = PooledPrompt(
                positions.expand(heads, length), length - 1, pool=self._pool, slots=slots, part=part,
                observed=PromptObservation.side_by_side(observed[part]), layer=layers[part.start], layers=observer.layers,
                rotate=observer.turn(layers[part.start]), turn=observer.rotate if self.group.places else None,
            )  # fmt: skip
            score = policy.prompt_score(view)
            if score is not None:
                scores.append(score)
                continue
            found = policy.keep(view)
            kept.append(found.expand(heads, -1).reshape(-1, self.group.kv_heads, found.shape[-1]))
        if kept:
            return torch.cat(kept)
        return self._keep_by_score(torch.cat(scores).view(len(layers), self.group.kv_heads, length))

    def _keep_by_score(self, scores: Tensor | None) -> Tensor:
        """What the policy keeps of a complete prompt by the scores ``[layers, kv_heads, n]`` of its tokens."""
        assert self.policy is not None
        assert scores is not None
        length = scores.shape[-1]
        positions = torch.arange(length, device=self._device).expand(scores.shape)
        return self.policy.keep(
            CacheView(positions, length - 1, scores, layer=self.layers, heads=self.heads, step=length, ordered=True)
        )

    def scores(self, slots: Tensor) -> Tensor | None:
        """`Policy.token_score` of the tokens in ``slots``, ``[layers, kv_heads, n]``, from keys alone."""
        assert self.policy is not None
        if scores_norms(self.policy):
            norms = paged_norms(self._pool, slots, slice(None))
            if norms is not None:
                return norms
        found = []
        for part in self._parts(slots.shape[0], together=True):
            score = self.policy.token_score(self._pool.keys_of(slots, part))
            if score is None:
                return None
            found.append(score)
        return torch.cat(found)

    def _parts(self, tokens: int, asked: int = 0, *, together: bool) -> list[slice]:
        """The group's layers: as many at once as `_LOOK_BYTES` allow, or one by one.

        Parameters
        ----------
        tokens
            Of a sequence.
        asked
            Float32 numbers that are computed for each of them in a layer beside its keys.
        together
            Whether several layers may be looked at together.
        """
        layers = len(self.group.layers)
        each = tokens * (self.group.kv_heads * self.group.head_dim * self._pool.dtype.itemsize + 4 * asked)
        step = max(1, _LOOK_BYTES // each) if together else 1
        return [slice(first, min(first + step, layers)) for first in range(0, layers, step)]

    @property
    def _merging(self) -> Merging:
        assert isinstance(self.policy, Merging)
        return self.policy

    def _observations(self, row: int) -> list[PromptObservation]:
        """What was gathered of a sequence's prompt in the layers of the group, which nobody asks for again."""
        return [] if self._observer is None else self._observer.take(row, self.group.layers)


def scores_norms(policy: Policy | None) -> bool:
    """Whether the norm of its key is what a policy scores a token by."""
    return isinstance(policy, RankedPolicy) and type(policy).token_score is RankedPolicy.token_score
