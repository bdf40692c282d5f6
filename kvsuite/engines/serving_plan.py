"""ServingPlan: what a case asks of an engine that serves under load, beside its policy and its SM partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvsuite.case import Case
from kvsuite.errors import UserError

#: where it stands in a case's params
SERVING_PARAM = "serving"
#: tokens of a block that ``pool_blocks`` counts
BLOCK_TOKENS = 16
STAGES = ("none", "sync", "async")
CONTROLLERS = ("auto", "dual")


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """Pool, step and lanes of a case that serves under load. JSON types alone; `to_dict` stands in ``case.params``.

    What is removed from the cache is the case's policy (``case.policy``, ``case.policy_params``), the share of the SMs its
    partition (``case.partition``).

    Parameters
    ----------
    pool_blocks, pool_bytes
        Size of the pool in blocks of `BLOCK_TOKENS` tokens, or in bytes of all layers together: one of the two. It is the
        same for every variant, so that none is compared by the memory that it happens to find.
    max_model_len
        Tokens of a request at most, prompt and output together.
    max_num_seqs
        Requests that run at the same time at most.
    step_tokens
        Tokens of one step at most.
    prompts_first
        Whether steps that feed prompts feed nothing else; else a step feeds every running sequence its next token and, in
        what is left of ``step_tokens``, chunks of prompts.
    prefix_caching
        Whether full blocks are found again by their tokens.
    stage
        Where a policy that acts at the end of a prompt works: ``none`` (no policy), ``sync`` (on the lane that computed the
        prompt), ``async`` (on a stream of its own; with two lanes that of the prompt lane).
    lanes
        1: prompts and decoding in turn on one stream; 2: prompts of some requests beside decoding of others.
    controller
        ``None``, ``auto`` (chooses the partition), ``dual`` (chooses between prompts and decoding as well).
    replay_decisions
        File of decisions that the controller makes again, ``None`` for those of its own meters.
    layers_per_step
        Layers of a prompt that a policy that merges does after each token that follows; ``None``: all at the end of the prompt,
        or as the controller says.

    Raises
    ------
    UserError
        If a value is impossible, or two contradict each other.
    """

    pool_blocks: int | None = None
    pool_bytes: int | None = None
    max_model_len: int
    max_num_seqs: int
    step_tokens: int
    prompts_first: bool = True
    prefix_caching: bool = False
    stage: str = "none"
    lanes: int = 1
    controller: str | None = None
    replay_decisions: str | None = None
    layers_per_step: int | None = None

    def __post_init__(self) -> None:
        if (self.pool_blocks is None) == (self.pool_bytes is None):
            raise UserError(
                "serving plan: give the pool in blocks (pool_blocks) or in bytes (pool_bytes), one of the two"
            )
        for name in ("pool_blocks", "pool_bytes", "max_model_len", "max_num_seqs", "step_tokens", "layers_per_step"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"serving plan: {name}={value} must be a whole number of at least 1")
        if self.step_tokens < self.max_num_seqs:
            raise UserError(
                f"serving plan: step_tokens={self.step_tokens} is less than max_num_seqs={self.max_num_seqs}, and every "
                "running sequence needs a token a step; raise the former or lower the latter"
            )
        for name, choices in (("stage", STAGES), ("lanes", (1, 2)), ("controller", (None, *CONTROLLERS))):
            if getattr(self, name) not in choices:
                known = ", ".join("null" if choice is None else str(choice) for choice in choices)
                raise UserError(f"serving plan: {name}={getattr(self, name)}; use {known}")
        if self.lanes == 2 and not self.prompts_first:
            raise UserError(
                "serving plan: lanes=2 feeds prompts on a lane of their own; chunks beside decoding are lanes=1"
            )
        if self.controller is not None and self.lanes == 1:
            raise UserError(f"serving plan: controller={self.controller} shares SMs between two lanes; use lanes=2")
        if self.layers_per_step is not None and (self.stage == "none" or self.controller is not None):
            why = "a controller chooses it" if self.controller is not None else "nothing is compressed"
            raise UserError(f"serving plan: layers_per_step={self.layers_per_step}: {why}; leave it out")
        if self.replay_decisions is not None and self.controller is None:
            raise UserError("serving plan: replay_decisions: there is no controller whose decisions these could be")

    @classmethod
    def of(cls, case: Case) -> ServingPlan | None:
        """The plan of a case, ``None`` for one that is not served under load.

        Raises
        ------
        UserError
            If it is no plan.
        """
        found = case.params.get(SERVING_PARAM)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise UserError(
                f"case {case.name}: params.{SERVING_PARAM} is {type(found).__name__}, no object of a plan's fields"
            )
        known = [field.name for field in fields(cls)]
        unknown = [name for name in found if name not in known]
        missing = [name for name in ("max_model_len", "max_num_seqs", "step_tokens") if name not in found]
        if unknown or missing:
            wrong = f"unknown {', '.join(unknown)}" if unknown else f"{', '.join(missing)} is missing"
            raise UserError(f"case {case.name}: params.{SERVING_PARAM}: {wrong}; a plan has {', '.join(known)}")
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, every field; ``layers_per_step`` where there is one, so that cases without it keep their keys."""
        return {name: value for name, value in asdict(self).items() if name != "layers_per_step" or value is not None}
