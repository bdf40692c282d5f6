"""The controller of a serving plan: what it is told of the model and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.compression.base import Policy
from kvsuite.engines.serving_plan import ServingPlan
from kvsuite.nanovllm.attention_layers import AttentionLayer, stored_bytes
from kvsuite.nanovllm.controller import ControllerSettings
from kvsuite.nanovllm.steering import Controller, log_for, read_logs


def plan_controller(
    plan: ServingPlan,
    policy: Policy,
    *,
    name: str,
    layers: Sequence[AttentionLayer],
    element_bytes: int,
    cache_format: OwnFormat | None,
    weight_bytes: int,
    bandwidth: float,
) -> Controller:
    """The controller that a plan asks for.

    Parameters
    ----------
    plan, policy
        Of the case.
    name
        The case's: the log that it replays is found by it.
    layers, element_bytes, cache_format
        Shapes of keys and values, bytes of a number of the model's dtype, and how they are stored.
    weight_bytes
        What a decode step reads.
    bandwidth
        Bytes a second of a copy, measured here.

    Raises
    ------
    UserError
        If the file of decisions cannot be read.
    CaseInvalid
        If it has no log of this case, or one that does not fit.
    """
    longest = plan.max_model_len
    settings = ControllerSettings(
        method=policy.name,
        factor=getattr(policy, "factor", None) or longest / policy.size_after(longest),
        layers=len(layers),
        kv_heads=max(layer.kv_heads for layer in layers),
        head_dim=max(layer.head_dim for layer in layers),
        weight_bytes=weight_bytes,
        token_bytes=sum(stored_bytes(layers, [1] * len(layers), element_bytes, cache_format)),
        bandwidth=bandwidth,
        dual=plan.controller == "dual",
    )
    replay = None if plan.replay_decisions is None else log_for(read_logs(Path(plan.replay_decisions)), name)
    return Controller(settings, replay=replay)
