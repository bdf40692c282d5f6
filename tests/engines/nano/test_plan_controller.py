"""A plan with a controller on the nano engine: what the controller knows, may choose, and what of it is in the record."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hf_sessions import case, random_tokens

from kvsuite.case import Case
from kvsuite.compression import get_policy
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.nano import session as nano_session
from kvsuite.engines.nano.plan_controller import plan_controller
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.results import ServeRequest
from kvsuite.engines.serving_plan import SERVING_PARAM, ServingPlan
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.nanovllm.attention_layers import AttentionLayer
from kvsuite.nanovllm.controller import ratios
from kvsuite.nanovllm.prompt_lane import LaneStreams

PLAN: dict[str, Any] = {
    "pool_blocks": 200, "max_model_len": 400, "max_num_seqs": 4, "step_tokens": 400, "stage": "async", "lanes": 2,
    "controller": "auto",
}  # fmt: skip


def controlled(partition: dict[str, Any] | None = None, **plan: Any) -> Case:
    own = case().to_dict() | {
        "engine": "nano",
        "policy": "streaming_llm",
        "policy_params": get_policy("streaming_llm", factor=5).to_dict(),
        "workload": {"protocol": "load", "prompt_tokens": 300, "max_new_tokens": 70},
        "params": {SERVING_PARAM: ServingPlan(**PLAN | plan).to_dict()},
        "partition": partition,
    }
    return Case(**own)


@functools.cache
def session() -> NanoSession:
    return NanoSession(case(), EngineSettings(threads=1))


@dataclass
class Part:
    decode_sms: int
    prompt_sms: int

    @property
    def id(self) -> str:
        return f"{self.decode_sms}_{self.prompt_sms}"


class Ladder:
    """In the place of one of a real device; what lanes do with it is `tests/nanovllm/test_cuda_steered.py`'s."""

    def __init__(self, device: Any) -> None:
        self.by_ratio = {ratio: Part(100 - round(100 * ratio), round(100 * ratio)) for ratio in ratios()}
        self.closed = 0

    def to_dict(self) -> dict[str, Any]:
        return {"provider": "nobody", "by_share": {}}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A device that can be parted; the partitions that lanes were moved to."""
    bound: list[Any] = []
    monkeypatch.setattr(nano_session, "PartitionLadder", Ladder)
    monkeypatch.setattr(LaneStreams, "bind", lambda self, partition: bound.append(partition))
    return bound


def test_there_is_no_controller_where_lanes_own_no_sms() -> None:
    with pytest.raises(CaseSkipped, match="SM partition: needs a CUDA device, not cpu"):
        session().prepare(controlled())


def test_a_partition_and_a_controller_exclude_each_other() -> None:
    with pytest.raises(CaseInvalid, match="the controller chooses the SMs itself"):
        session().prepare(controlled({"decode_sms": 64, "prompt_sms": 64}))


@pytest.mark.parametrize(("kind", "inert"), [("auto", False), ("dual", True)])
def test_decisions_inert_axes_and_partitions_come_back(parted: list[Any], kind: str, inert: bool) -> None:
    session().prepare(controlled(controller=kind))
    served = session().serve_under_load([ServeRequest(random_tokens(300, seed), 70) for seed in range(2)])
    head, first = served.decisions[:2]
    assert head["settings"] == session().effective["controller"]
    assert head["settings"]["factor"] == 5
    assert (first["counter"], first["inputs"]["seq_len"], first["inputs"]["expected_output"]) == (1, 300, 70)
    assert json.loads(json.dumps(served.decisions)) == served.decisions
    assert ("auto_dual" in session().inert) is inert
    assert session().partition == {"requested": None, "realised": {"provider": "nobody", "by_share": {}}}
    # a second round begins anew
    again = session().serve_under_load([ServeRequest(random_tokens(300, seed), 70) for seed in range(2)])
    assert again.decisions[1]["inputs"] == first["inputs"]
    session().finish()
    assert session().partition == {"requested": None, "realised": None}
    assert not {"auto_dual", "compression_streams"} & session().inert.keys()


def test_what_the_controller_knows_of_the_model_and_the_log_that_it_replays(tmp_path: Path) -> None:
    layers = [AttentionLayer(kv_heads=8, head_dim=128, window=None)] * 36
    known: dict[str, Any] = {
        "name": "x-triad",
        "layers": layers,
        "element_bytes": 2,
        "cache_format": None,
        "weight_bytes": 15,
        "bandwidth": 1e12,
    }
    policy = get_policy("snapkv", factor=5)
    made = plan_controller(ServingPlan(**PLAN | {"controller": "dual"}), policy, **known)
    assert (made.settings.method, made.settings.factor, made.settings.token_bytes) == ("snapkv", 5, 147_456)
    assert (made.settings.dual, made.settings.weight_bytes, made.settings.cost) == (True, 15, "measured")
    made.prompts(batch=8, seq_len=4000, expected_output=128, pending=0)
    path = tmp_path / "decisions.json"
    path.write_text(json.dumps({"x-triad": made.log}))
    replayed = ServingPlan(**PLAN | {"controller": "dual", "replay_decisions": str(path)})
    again = plan_controller(replayed, policy, **known | {"bandwidth": 5e12})
    assert again.prompts(batch=8, seq_len=4000, expected_output=128, pending=7)[0] == made.decision
    with pytest.raises(CaseInvalid, match="no decisions of other"):
        plan_controller(replayed, policy, **known | {"name": "other"})
    path.write_text("no JSON")
    with pytest.raises(UserError, match="not JSON"):
        plan_controller(replayed, policy, **known)
