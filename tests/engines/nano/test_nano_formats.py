"""Cache formats on the nano engine: the tokens, losses and bytes of the hf engine, whatever the scheduler does."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hf_sessions import LAYERS, case, session, streaming
from requests_served import memory_of, tokens_of
from test_nano_session import PROMPT, TEXT, both, nano, served, unlike_tokens

from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.cache_formats.chosen_format import parse_format
from kvsuite.case import Case
from kvsuite.engines.nano.engine import NanoEngine
from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.workloads.windows import plan_windows

FORMATS = (
    "fp8_e4m3", "fp8_e4m3(group=8)", "int8", "int4", "int8:int4", "int4(group=8)", "int4+hadamard:int8",
    "by_layer(int8|auto|int8:int4*2)",
)  # fmt: skip
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)


def stored(name: str, of: Case | None = None) -> Case:
    of = of or case()
    return Case(**(of.to_dict() | {"params": {"kv_cache_dtype": name}}))


def assert_same_losses(found: list[float], wanted: list[float], plain: list[float]) -> None:
    """Apart by far less than the format is from the model's own numbers.

    They are not equal to the bit: float32 sums in another order round a code elsewhere now and then.
    """
    of = [torch.tensor(each) for each in (found, wanted, plain)]
    apart, effect = (of[0] - of[1]).abs().mean(), (of[2] - of[1]).abs().mean()
    assert effect > 1e-4
    assert apart < effect / 10


@functools.cache
def plain_losses(policy: str | None = None, positions: str = "original") -> list[float]:
    """Of the case without a format; the shared session is prepared for it."""
    on = session()
    on.prepare(case() if policy is None else POLICIES[policy](positions))
    found: list[float] = on.score(TEXT, "prefix-continuation", 40).nll
    return found


@EVERY_FORMAT
def test_tokens_losses_and_bytes_are_those_of_hf(name: str) -> None:
    plain = plain_losses()
    hf, on = both(stored(name))
    assert tokens_of(on, PROMPT, 12) == tokens_of(hf, PROMPT, 12)
    assert on.effective["kv_cache_dtype"] == name
    wanted = hf.score(TEXT, "prefix-continuation", 40)
    together = on.score(TEXT, "prefix-continuation", 40)
    rows: list[torch.Tensor] = []
    steps = on.score_rows(TEXT, "prefix-continuation", 40, lambda at, row: rows.append(row.clone()), full=False)
    for found in (together, steps):
        assert (found.positions, found.targets) == (wanted.positions, wanted.targets)
        assert_same_losses(found.nll, wanted.nll, plain)
    targets = torch.tensor(steps.targets)
    losses = torch.nn.functional.cross_entropy(torch.cat(rows), targets, reduction="none")
    torch.testing.assert_close(losses, torch.tensor(steps.nll))
    memory = memory_of(on, PROMPT, 8)
    assert memory.kv_bytes_decode == on.planned_kv_bytes(len(PROMPT), 8) == hf.planned_kv_bytes(len(PROMPT), 8)
    assert memory.kv_bytes_allocated == memory.predicted["pool_bytes"]
    assert memory.reported["kv_block_bytes"] < on.full_kv_bytes(memory.reported["kv_blocks"] * 16)


POLICIES: dict[str, Callable[[str], Case]] = {
    "streaming_llm": lambda positions: streaming(24, positions=positions),
    "snapkv": lambda positions: case(
        name="snapkv", policy="snapkv", policy_params={"factor": 2.0, "positions": positions}
    ),
    "l2_compress": lambda positions: case(
        name="l2", policy="l2_compress", policy_params={"factor": 2.0, "positions": positions}
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "positions"), [("int8", "original"), ("int4+hadamard:int8", "cache")])
def test_a_policy_sees_and_evicts_what_is_stored_as_on_hf(name: str, positions: str, policy: str) -> None:
    plain = plain_losses(policy, positions)
    hf, on = both(stored(name, POLICIES[policy](positions)))
    assert tokens_of(on, PROMPT, 16) == tokens_of(hf, PROMPT, 16)
    found, wanted = (one.score(TEXT, "prefix-continuation", 40).nll for one in (on, hf))
    assert_same_losses(found, wanted, plain)


@pytest.mark.parametrize("name", ["int8", "int4(group=8):fp8_e4m3"])
def test_preemption_and_found_prefixes_change_no_token(name: str) -> None:
    """Prompts that share blocks, more of them than the pool holds: each gets what hf gives it alone."""
    shared = PROMPT[:20]
    prompts = [shared + unlike_tokens(count, seed=seed) for seed, count in enumerate((3, 9, 14, 3))]
    hf, on = both(stored(name))
    expected = [tokens_of(hf, prompt, 12) for prompt in prompts]
    limits = Limits(
        max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16, block_size=4, num_blocks=20, admission="optimistic",
        cache_format=CacheFormat.parse(name),
    )  # fmt: skip
    on.finish()
    runtime = Runtime(on._loaded, limits, eos_token_ids=())
    try:
        sampling = SamplingParameters(max_new_tokens=12, ignore_eos=True)
        requests = runtime.run([Request(list(prompt), sampling) for prompt in prompts])
        counts = runtime.counters
        assert counts.preemptions > 0
        assert counts.prefix_hit_tokens > 0
    finally:
        runtime.close()
    assert [request.output for request in requests] == expected


def test_the_full_cache_of_a_packed_case_is_the_one_without_a_format() -> None:
    on = served()
    on.prepare(nano(case()))
    own: list[torch.Tensor] = []
    on.score_rows(TEXT, "prefix-continuation", 40, lambda at, row: own.append(row.clone()), full=False)
    reference = on.score_reference(TEXT, 41)
    windows = plan_windows("disjoint", len(TEXT), 35, 35)
    whole = on.score_windows(TEXT, windows, prefix="none", prefix_token=None).tokens.nll
    on.prepare(nano(stored("int4", streaming(24))))
    full: list[torch.Tensor] = []
    on.score_rows(TEXT, "prefix-continuation", 40, lambda at, row: full.append(row.clone()), full=True)
    assert torch.equal(torch.cat(own), torch.cat(full))
    assert on.score_reference(TEXT, 41).nll == reference.nll
    on.prepare(nano(stored("int4")))
    compared = on.compare_windows(on, TEXT, windows, prefix="none", prefix_token=None)
    assert compared.nll_reference == whole
    assert compared.nll == on.score_windows(TEXT, windows, prefix="none", prefix_token=None).tokens.nll
    assert sum(compared.kld) / len(compared.kld) > 1e-3


def test_a_pool_of_the_same_bytes_holds_more_tokens_in_fewer_bits() -> None:
    blocks = {}
    for name in ("auto", "fp8_e4m3", "int4"):
        limits = Limits(max_model_len=2000, max_num_seqs=8, block_size=16, pool_bytes=2**20)
        limits = replace(limits, cache_format=CacheFormat.parse(name))
        on = served()
        on.finish()
        runtime = Runtime(on._loaded, limits)
        assert runtime.pool_bytes <= 2**20
        blocks[name] = runtime.num_blocks + 1
        runtime.close()
    # float32, heads of 16: 64 bytes a vector against 16, and against 8 and two float16
    assert blocks["fp8_e4m3"] == 4 * blocks["auto"]
    assert blocks["int4"] == 2**20 * 64 // (12 * 64 * 16 * LAYERS * 4)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("int4(residual=8)", "residual window"),
        ("kivi_int4", "per channel"),
        ("hqq_int4", "transformers' own cache"),
    ],
)
def test_what_pages_cannot_hold_is_invalid_before_anything_is_loaded(name: str, why: str) -> None:
    with pytest.raises(
        CaseInvalid, match=f"^--kv-cache-dtype={re.escape(str(parse_format(name)))}.*{why}.*--kv-engine=hf$"
    ):
        NanoEngine().refuse(nano(stored(name)))


def test_a_group_that_does_not_divide_the_heads_is_invalid() -> None:
    with pytest.raises(
        CaseInvalid, match=r"^--kv-cache-dtype=int4\(group=5\): group=5 does not divide the head size 16"
    ):
        served().prepare(nano(stored("int4(group=5)")))
    served().prepare(nano(case()))


def test_a_key_that_has_no_number_ends_the_case_as_invalid() -> None:
    on = served()
    on.prepare(nano(stored("int8")))
    weight = on._loaded.model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        before = weight[0, 0].item()
        weight[0, 0] = float("inf")
    try:
        with pytest.raises(CaseInvalid, match=r"^--kv-cache-dtype=int8: a key or a value is not finite"):
            tokens_of(on, PROMPT, 2)
    finally:
        with torch.no_grad():
            weight[0, 0] = before
        on.prepare(nano(case()))
