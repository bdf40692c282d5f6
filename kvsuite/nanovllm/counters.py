"""What a runtime did, counted."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Counters:
    """What a runtime did so far.

    *Logical* tokens are those of the requests, whatever was computed for them; *computed* ones went through the model.
    """

    steps: int = 0
    decode_steps: int = 0
    #: prompt tokens of admitted requests, once each
    logical_prompt_tokens: int = 0
    #: output tokens
    logical_output_tokens: int = 0
    #: tokens through the model in steps that fed several tokens of their request, or the last of its prompt
    computed_prefill_tokens: int = 0
    #: output tokens through the model, one a step
    computed_decode_tokens: int = 0
    #: tokens whose keys came from the prefix cache at a request's first admission
    prefix_hit_tokens: int = 0
    #: the same when a preempted request was resumed
    resumed_hit_tokens: int = 0
    preemptions: int = 0
    #: tokens that were computed for requests which turned out to be over
    discarded_tokens: int = 0
    #: tokens that compression removed, summed over layer groups
    evicted_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
