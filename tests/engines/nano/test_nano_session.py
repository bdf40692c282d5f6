"""The session of the nano engine: the tokens, losses and bytes of the hf engine, and what it says of itself."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_weights import written
from hf_sessions import LAYERS, TOKEN_BYTES, VOCAB, CountingClock, case, random_tokens, session, streaming
from policy_matrix import MATRIX, Line
from requests_served import memory_of, timed, times_of, tokens_of
from transformers import MistralConfig, MistralForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.scoring import PROTOCOLS
from kvsuite.engines.nano.engine import NanoEngine
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.registry import SessionPool, get_engine
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.workloads.windows import plan_windows


def unlike_tokens(count: int, seed: int) -> list[int]:
    """Random tokens, no two equal: equal ones have keys of equal norm in the first layer, and rounding says which go."""
    found: list[int] = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return found


PROMPT = unlike_tokens(64, seed=6)
TEXT = unlike_tokens(70, seed=4)
EVERY_LINE = pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])
PLACED = pytest.mark.parametrize("positions", ["original", "cache"])


def nano(of: Case) -> Case:
    return Case(**(of.to_dict() | {"engine": "nano"}))


@functools.cache
def served() -> NanoSession:
    """The same weights as `hf_sessions.session`."""
    built = NanoSession(nano(case()), EngineSettings(threads=1))
    with torch.no_grad():
        for name, weight in built._loaded.model.named_parameters():
            if "norm" not in name and "embed" not in name:
                weight.mul_(8)
    return built


def both(of: Case) -> tuple[Any, NanoSession]:
    """Sessions of both engines, prepared for the same case."""
    session().prepare(of)
    served().prepare(nano(of))
    return session(), served()


def until_twice(prompt: list[int], output: list[int]) -> int:
    """How many tokens of an output there are up to the first that was there before, which is one of them."""
    return next((at + 1 for at, token in enumerate(output) if token in prompt + output[:at]), len(output))


def lines(line: Line, **common: Any) -> Case:
    return case(name=line.id, policy=line.policy, policy_params=line.parameters | common)


@PLACED
@EVERY_LINE
def test_policies_give_the_tokens_of_hf(line: Line, positions: str) -> None:
    for skip in ([], [0, 2]):
        hf, on = both(lines(line, positions=positions, skip_layers=skip))
        found, wanted = tokens_of(on, PROMPT, 24), tokens_of(hf, PROMPT, 24)
        # until the first layer, if it compresses, has two keys of one norm
        sure = 24 if skip or line.kept is None or "l2" not in line.policy else until_twice(PROMPT, wanted)
        assert found[:sure] == wanted[:sure]


def test_the_full_cache_gives_the_tokens_of_hf() -> None:
    hf, on = both(case())
    for prompt in (PROMPT, PROMPT[:1], random_tokens(200, seed=2)):
        assert tokens_of(on, prompt, 16) == tokens_of(hf, prompt, 16)


@pytest.mark.parametrize(
    ("protocol", "positions"),
    [
        *((protocol, "original") for protocol in PROTOCOLS),
        (PROTOCOLS[0], "cache"),
        # where keys are turned to has nothing to do with how a text is fed
        *(pytest.param(protocol, "cache", marks=pytest.mark.slow) for protocol in PROTOCOLS[1:]),
    ],
)
@EVERY_LINE
def test_policies_give_the_losses_of_hf(line: Line, positions: str, protocol: str) -> None:
    hf, on = both(lines(line, positions=positions))
    told: list[tuple[int, int]] = []
    found = on.score(TEXT, protocol, 40, lambda done, of: told.append((done, of)))
    wanted = hf.score(TEXT, protocol, 40)
    assert (found.targets, found.positions) == (wanted.targets, wanted.positions)
    assert found.nll == pytest.approx(wanted.nll, abs=1e-4)
    assert found.correct == wanted.correct
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_full_cache_gives_the_losses_of_hf(protocol: str) -> None:
    hf, on = both(case())
    found, wanted = on.score(TEXT, protocol, 40), hf.score(TEXT, protocol, 40)
    assert (found.targets, found.positions, found.correct) == (wanted.targets, wanted.positions, wanted.correct)
    assert found.nll == pytest.approx(wanted.nll, abs=1e-5)
    assert on.score_reference(TEXT, 41).nll == pytest.approx(hf.score_reference(TEXT, 41).nll, abs=1e-5)


@pytest.mark.parametrize(
    ("protocol", "prefix", "length"),
    [("hf-strided", "none", 32), ("hf-strided", "bos_each_window", 20), ("disjoint", "bos_first", 16),
     ("lm-eval-rolling", "bos_first", 24), ("llama.cpp-half", "bos_over_first", 30)],
)  # fmt: skip
def test_windows_give_the_losses_of_hf(protocol: str, prefix: str, length: int) -> None:
    hf, on = both(case())
    windows = plan_windows(protocol, len(TEXT), length, 8, prefix=prefix)
    options: dict[str, Any] = {"prefix": prefix, "prefix_token": 3}
    seen: list[tuple[int, int, float]] = []
    found = on.score_windows(TEXT, windows, **options, progress=lambda *event: seen.append(event))
    wanted = hf.score_windows(TEXT, windows, **options)
    assert (found.tokens.targets, found.tokens.positions) == (wanted.tokens.targets, wanted.tokens.positions)
    assert found.tokens.nll == pytest.approx(wanted.tokens.nll, abs=1e-5)
    assert found.tokens.correct == wanted.tokens.correct
    assert found.forward_tokens == wanted.forward_tokens
    # windows share steps
    assert found.forwards == 1
    assert found.effective["batch_windows"] > 1
    count = len(found.tokens.nll)
    assert seen[-1] == (count, count, pytest.approx(sum(found.tokens.nll) / count, rel=1e-5))


def test_windows_beyond_a_step_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsuite.engines.nano.scoring._WINDOW_TOKENS", {"cpu": 50})
    hf, on = both(case())
    windows = plan_windows("hf-strided", len(TEXT), 24, 8)
    options: dict[str, Any] = {"prefix": "none", "prefix_token": None}
    found, wanted = on.score_windows(TEXT, windows, **options), hf.score_windows(TEXT, windows, **options)
    assert found.tokens.nll == pytest.approx(wanted.tokens.nll, abs=1e-5)
    assert (found.forwards, found.effective["batch_windows"]) == (-(-found.forward_tokens // 50), 2)


@pytest.mark.parametrize("together", [30, 2048])
def test_the_divergence_from_a_reference_is_that_of_hf(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr("kvsuite.engines.nano.scoring._WINDOW_TOKENS", {"cpu": together})
    pools = {engine: SessionPool(threads=1) for engine in ("hf", "nano")}
    windows = plan_windows("hf-strided", len(TEXT), 24, 8)
    found = []
    told: list[tuple[int, int, float]] = []

    def report(*event: Any) -> None:
        told.append(event)

    for engine, pool in pools.items():
        of = Case(**(case(quantization="q4f32_1").to_dict() | {"engine": engine}))
        on = pool.get(of)
        beside = pool.beside(Case(**(of.to_dict() | {"quantization": None})))
        on.prepare(of)
        found.append(on.compare_windows(beside, TEXT, windows, prefix="none", prefix_token=None, progress=report))
        assert told[-1][:2] == (len(TEXT) - 1, len(TEXT) - 1)
        beside.close()
    wanted, here = found
    for name in ("nll", "nll_reference", "kld"):
        assert getattr(here, name) == pytest.approx(getattr(wanted, name), abs=1e-5), name
    assert here.same_top1 == wanted.same_top1
    assert max(here.kld) > 1e-5
    with pytest.raises(UserError, match="only two models of engine nano"):
        pools["nano"].get(nano(case(quantization="q4f32_1"))).compare_windows(
            session(), TEXT, windows, prefix="none", prefix_token=None
        )


@EVERY_LINE
@pytest.mark.parametrize("skip", [[], [0, 1]], ids=["all", "skip01"])
def test_the_memory_pass_counts_what_hf_counts(line: Line, skip: list[int]) -> None:
    hf, on = both(lines(line, skip_layers=skip))
    found, wanted = memory_of(on, PROMPT, 8), memory_of(hf, PROMPT, 8)
    for name in ("lengths_prefill", "lengths_decode", "kv_bytes_prefill", "kv_bytes_decode"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.kv_bytes_decode == on.planned_kv_bytes(64, 8) == hf.planned_kv_bytes(64, 8)
    assert found.warnings == []
    assert found.compress_s is not None
    assert found.evict_s is not None
    assert found.compress_s > 0
    # nothing is decided any more once a policy that acts once has acted
    assert (found.evict_s > 0) is not line.once


def test_memory_by_term() -> None:
    _, on = both(case())
    found = memory_of(on, PROMPT, 8)
    assert found.lengths_decode == [71] * LAYERS
    assert found.kv_bytes_decode == 71 * TOKEN_BYTES == on.full_kv_bytes(71)
    # 73 tokens at most: five blocks of 16 and the scratch block; 71 of them fill five
    assert found.kv_bytes_allocated == 6 * 16 * TOKEN_BYTES
    assert found.predicted["pool_bytes"] == found.reported["pool_bytes"] == found.kv_bytes_allocated
    assert (found.reported["kv_blocks"], found.reported["kv_block_bytes"]) == (5, 5 * 16 * TOKEN_BYTES)
    # of 73 tokens: 3 vectors as wide as the model and 3 as wide as its MLP; logits of one row, and a float32 copy
    assert found.predicted["workspace_bytes"] == 73 * 3 * (64 + 128) * 4 + 512 * 8
    assert found.compress_s is found.evict_s is None


def test_stamps_of_a_request() -> None:
    on = served()
    on.prepare(nano(streaming(16)))
    runtime = on._runtime([ServeRequest(PROMPT, 8)])
    clock = CountingClock(lambda: runtime.counters.computed_prefill_tokens + runtime.counters.computed_decode_tokens)
    times, output = timed(on, PROMPT, 8, clock)
    # the end of the prompt, the first token, seven more: each behind the step that made it
    assert clock.starts == 1
    assert [count - clock.at_start for count in clock.counts] == [64, *range(64, 72)]
    assert (times.prefill_end, times.ttft_s, times.e2e_s) == (1.0, 2.0, 9.0)
    assert (times.prompt_tokens, times.prefill_computed, times.generated) == (64, 64, 8)
    assert output == tokens_of(on, PROMPT, 8)
    assert on.effective["tokens"] == {
        "computed": 71,
        "logical": 72,
        "prefix_hits": 0,
        "evicted": 48 + 7,
        "preemptions": 0,
    }


def test_stamps_while_tokens_are_under_way() -> None:
    """The next step is launched before the host has the token: the stamp belongs to the step that made it."""
    on = served()
    on.prepare(nano(case()))
    runtime = on._runtime([ServeRequest(PROMPT, 8)])
    runtime.overlap = True
    clock = CountingClock(lambda: runtime.counters.computed_prefill_tokens + runtime.counters.computed_decode_tokens)
    times = times_of(on, PROMPT, 8, clock)
    assert [count - clock.at_start for count in clock.counts] == [64, *range(64, 72)]
    assert times.generated == 8


def test_a_long_prompt_is_fed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsuite.engines.nano.runtime._STEP_TOKENS", {"cpu": 50})
    long = random_tokens(300, seed=8)
    for of in (case(), streaming(40)):
        hf, on = both(of)
        assert tokens_of(on, long, 8) == tokens_of(hf, long, 8)
        assert on.effective["max_num_batched_tokens"] == 50
        assert on._runtime([ServeRequest(long, 8)]).counters.steps == 6 + 7


@pytest.mark.parametrize("of", [case(), streaming(16)], ids=["full cache", "policy"])
def test_several_requests_together_get_what_each_gets_alone(of: Case) -> None:
    on = served()
    on.prepare(nano(of))
    prompts = [PROMPT, PROMPT[:30], PROMPT[5:]]
    alone = [tokens_of(on, prompt, 6) for prompt in prompts]
    together = on.serve([ServeRequest(prompt, 6) for prompt in prompts], CountingClock())
    assert together.outputs == alone
    assert [times.generated for times in together.times] == [6, 6, 6]
    assert together.counts["preemptions"] == 0
    assert on.effective["max_num_seqs"] == 3
    found = on.memory([ServeRequest(prompt, 6) for prompt in prompts])
    singles = [on.memory([ServeRequest(prompt, 6)]).kv_bytes_decode for prompt in prompts]
    assert found.kv_bytes_decode == sum(size for size in singles if size is not None)


def test_what_is_in_effect() -> None:
    on = served()
    on.prepare(nano(streaming(16, skip_layers=[2])))
    tokens_of(on, PROMPT, 8)
    assert on.effective == {
        "device": "cpu", "dtype": "float32", "weight_format": "fp32", "threads": 1, "implementation": "paged",
        "frees_memory": True, "positions": "original", "skip_layers": [2], "attention": "paged: reference",
        "decode_step": "eager", "block_size": 16, "num_blocks": 5, "max_model_len": 73, "max_num_seqs": 1,
        "max_num_batched_tokens": 2048, "prefix_caching": False, "layer_groups": [[0, 1, 3], [2]], "overlap": False,
        "stage": "sync", "stepwise": True,
    }  # fmt: skip
    assert on.inert == {}
    assert (
        NanoSession(nano(case()), EngineSettings(threads=1, implementation="copy"))
        .inert["impl"]
        .startswith("the pool of blocks")
    )


def test_rules_of_a_case(tmp_path: Path) -> None:
    on = served()
    with pytest.raises(CaseInvalid, match=r"kvpress:SnapKV on engine nano: .*use --kv-engine=hf"):
        on.prepare(nano(case(policy="kvpress:SnapKV", policy_params={"keep_ratio": 0.5})))
    with pytest.raises(CaseInvalid, match="SMs are parted between two lanes, and this case has one"):
        on.prepare(nano(case(partition={"sms": 16})))
    with pytest.raises(UserError, match=r"--kv-skip-layers=.*4: the model has layers 0 to 3"):
        on.prepare(nano(streaming(16, skip_layers=[4])))
    with pytest.raises(CaseInvalid, match="--kv-decode-step=graph: CUDA graphs need a CUDA device"):
        NanoSession(nano(case()), EngineSettings(threads=1, decode_step="graph")).prepare(nano(case()))
    config = MistralConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        vocab_size=512, sliding_window=16,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    windowed = NanoSession(nano(case(model=str(tmp_path))), EngineSettings(threads=1))
    with pytest.raises(CaseInvalid, match="own sliding window of 16 is shorter"):
        windowed.prepare(nano(case(policy="recent_only", policy_params={"window": 8}, workload={"prompt_tokens": 16})))
    windowed.prepare(nano(case()))
    assert len(tokens_of(windowed, PROMPT[:12], 4)) == 4


def test_devices_that_are_not_here() -> None:
    engine = get_engine("nano")
    assert isinstance(engine, NanoEngine)
    assert engine.unavailable("cpu") is None
    assert "engine nano cannot use mps" in str(engine.unavailable("mps"))


def test_a_session_serves_the_cases_of_one_model_and_gives_everything_back() -> None:
    pool = SessionPool(threads=1)
    on = pool.get(nano(case()))
    assert isinstance(on, NanoSession)
    assert pool.get(nano(streaming(8))) is on
    assert pool.get(case()) is not on
    on = NanoSession(nano(case()), EngineSettings(threads=1))
    attention = on._loaded.text_config._attn_implementation
    on.prepare(nano(streaming(8)))
    times_of(on, PROMPT, 4, CountingClock())
    keys = weakref.ref(on._runtime([ServeRequest(PROMPT, 4)]).pools[0].keys)
    on.finish()
    assert on._loaded.text_config._attn_implementation == attention
    gc.collect()
    assert keys() is None
    weights = weakref.ref(on._loaded.model.lm_head.weight)
    on.close()
    del on
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("policy", ["streaming_llm", "expected_attention"])
def test_layers_without_rotary_positions_are_neither_unrotated_nor_rotated(policy: str, tmp_path: Path) -> None:
    """The same as layers whose rotation turns by nothing, wherever keys are placed; beside one that does rotate."""
    parameters = {"streaming_llm": {"start_size": 4, "recent_size": 28}, "expected_attention": {"keep_ratio": 0.5}}[
        policy
    ]
    found: dict[tuple[str, str], list[float]] = {}
    for name, rotates in (("none", [0, 0]), ("by nothing", [1, 1]), ("mixed", [0, 1])):
        config = SmolLM3Config(
            num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB, no_rope_layers=rotates, pad_token_id=0, initializer_range=0.15,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(4)
            SmolLM3ForCausalLM(config).save_pretrained(tmp_path / name)
        for positions in ("original", "cache"):
            chosen = {"policy": policy, "policy_params": parameters | {"positions": positions}}
            of = nano(case(model=str(tmp_path / name), **chosen))
            on = NanoSession(of, EngineSettings(threads=1))
            if name == "by nothing":
                on._loaded.model.model.rotary_emb.inv_freq.zero_()
            on.prepare(of)
            found[name, positions] = on.score(TEXT, "prefix-continuation", 40).nll
            placed = [
                layer
                for group in on._runtime([ServeRequest(PROMPT, 4)]).groups
                if group.places
                for layer in group.layers
            ]
            assert placed == [layer for layer in (0, 1) if rotates[layer] and positions == "cache"]
            on.close()
    for positions in ("original", "cache"):
        assert found["none", positions] == pytest.approx(found["by nothing", "original"], abs=1e-5)
    assert found["mixed", "original"] != pytest.approx(found["mixed", "cache"], abs=1e-3)
    assert found["mixed", "original"] != pytest.approx(found["none", "original"], abs=1e-3)


@pytest.mark.parametrize("name", ["mean_pool", "mlp", "mlp_residual"])
def test_merged_tokens_give_the_tokens_losses_and_bytes_of_hf(name: str, tmp_path: Path) -> None:
    own = {} if name == "mean_pool" else {"weights": written(tmp_path / "w.pth", layers=LAYERS)}
    hf, on = both(case(name=name, policy=name, policy_params={"factor": 5, **own}))
    assert tokens_of(on, PROMPT, 24) == tokens_of(hf, PROMPT, 24)
    found, wanted = (one.score(TEXT, "prefix-continuation", 40) for one in (on, hf))
    assert found.nll == pytest.approx(wanted.nll, abs=1e-4)
    full = both(case())[0].score(TEXT, "prefix-continuation", 40)
    assert found.nll != pytest.approx(full.nll, abs=1e-2)
    for one in both(case(name=name, policy=name, policy_params={"factor": 5, **own})):
        # 64 tokens are 12 groups and 4 more, and 7 of 8 new ones are fed
        planned = one.planned_kv_bytes(64, 8)
        assert planned is not None
        assert memory_of(one, PROMPT, 8).kv_bytes_decode == planned
        assert planned in ((16 + 7) * TOKEN_BYTES, 2 * 16 * TOKEN_BYTES)


def test_weights_and_formats_that_do_not_fit_end_the_case_alone(tmp_path: Path) -> None:
    """Flaw 12 of the original: a compressor that could not be loaded was none, under its own name."""
    other = written(tmp_path / "other.pth", layers=LAYERS - 1)
    right = written(tmp_path / "right.pth", layers=LAYERS)
    refused = [
        (case(policy="mlp", policy_params={"weights": other}), "weights of another model"),
        (case(policy="mlp", policy_params={"weights": right, "factor": 4}), "makes one token of 5, not of 4"),
        (
            case(policy="mean_pool", params={"kv_cache_dtype": "int8"}),
            "--kv-cache-dtype=int8: policy mean_pool merges tokens",
        ),
    ]
    for of, message in refused:
        for one, own in ((session(), of), (served(), nano(of))):
            with pytest.raises(CaseInvalid) as caught:
                one.prepare(own)
            assert message in str(caught.value)
    for one in both(case(policy="mlp", policy_params={"weights": right})):
        assert len(tokens_of(one, PROMPT, 2)) == 2
