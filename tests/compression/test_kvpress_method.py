"""Choosing a press, putting it on a model and taking it off again."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from kvsuite.compression.kvpress.adapter import KvpressMethod
from kvsuite.compression.kvpress.compat import attention_patch, cache_position, load_kvpress
from kvsuite.compression.kvpress.session import attention_modules
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError

try:
    load_kvpress()
except CaseSkipped as reason:
    pytest.skip(str(reason), allow_module_level=True)

from kvpress_cases import LAYERS, PROMPT, SeenLayer, model, plain_forward, run, seen_cache, tokenizer, tokens


def create(name: str, keep_ratio: float = 0.5, **params: Any) -> KvpressMethod:
    return KvpressMethod.create(name, keep_ratio=keep_ratio, **params)


# choosing


@pytest.mark.parametrize("name", ["kvpress:SnapKV", "SnapKV", "SnapKVPress", "snapkv", "KVPRESS:snapkvpress"])
def test_a_press_is_found_with_or_without_prefix_and_suffix_in_any_case(name: str) -> None:
    assert create(name).name == "kvpress:SnapKV"


def test_an_unknown_press_is_refused_with_the_nearest_and_the_runnable_ones() -> None:
    with pytest.raises(UserError, match="unknown press 'kvpress:SnapVK': did you mean kvpress:SnapKV") as caught:
        create("kvpress:SnapVK")
    assert "StreamingLLM" in str(caught.value)
    assert "QFilter" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("SnapKV", {"windows": 3}, "unknown parameter 'windows'; it takes window_size, kernel_size"),
        ("SnapKV", {"compression_ratio": 0.3}, "unknown parameter 'compression_ratio'"),
        ("CompressionRatioDecoding", {"target_compression_ratio": 0.3}, "unknown parameter"),
        ("Knorm", {"n_sink": 4}, "none beside its ratio, which --kv-keep-ratios sets"),
        ("AdaKV", {"alpha_safeguard": 2}, "does not take.*alpha_safeguard should be in"),
        ("AdaKV", {"press": "SimLayerKV"}, "does not take.*requires a ScorerPress"),
        ("AdaKV", {"press": 3}, "press is 3; give the name of a press"),
        ("AdaKV", {"press": {"name": "Knorm", "n_sink": 4}}, "kvpress:Knorm: unknown parameter"),
        ("AdaKV", {"press": "ObservedAttention"}, "refuses eager attention, which ObservedAttention needs"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create(name, **params)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep_ratio", [0, 1.5, -1])
def test_a_wrong_keep_ratio_is_refused_by_option(keep_ratio: float) -> None:
    with pytest.raises(UserError, match="--kv-keep-ratios"):
        create("Knorm", keep_ratio=keep_ratio)


def test_an_inner_press_that_needs_artefacts_skips_the_case() -> None:
    with pytest.raises(CaseSkipped, match="kvpress:QFilter needs trained Q-filters"):
        create("KeyRerotation", press="QFilter")


def test_a_wrapper_takes_over_what_its_inner_press_needs() -> None:
    assert create("KeyRerotation", press="ObservedAttention").attention == "eager"
    assert create("Merging", press={"name": "Random", "seed": 1}).info.random
    assert create("Composed", presses=["Knorm", "KeyRerotation"]).info.positions == "cache"
    assert not create("Composed", presses=["ThinK"]).info.frees_memory
    assert not create("KVCompose", structured=False).info.frees_memory
    assert create("DMS", decoding=True).info.compresses == "prefill+decode"


@pytest.mark.parametrize(
    ("name", "requested"), [("Knorm", 0.7), ("AdaKV", 0.7), ("Decoding", 0.7), ("ThinK", 0.35), ("DMS", None)]
)
def test_the_requested_ratio_is_what_is_removed_from_the_cache(name: str, requested: float | None) -> None:
    assert create(name, keep_ratio=0.3).requested_removed_ratio == requested


def test_a_missing_package_skips_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CaseSkipped, match=r"not installed: .*pip install --no-deps kvpress==0\.5\.5"):
        create("Knorm")


def test_another_version_skips_because_the_table_does_not_describe_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.0")
    with pytest.raises(CaseSkipped, match=r"kvpress 0\.6\.0 is installed"):
        create("Knorm")


def test_importing_kvpress_leaves_the_attention_functions_alone_and_names_a_missing_module() -> None:
    script = """
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from kvsuite.compression.kvpress import adapter, table
from kvsuite.compression.kvpress.compat import attention_patch, load_kvpress
from kvsuite.errors import CaseSkipped
assert adapter.find_press("kvpress:tova").name == "TOVA"
assert "kvpress" not in sys.modules
sys.modules["cachetools"] = None
try:
    load_kvpress()
except CaseSkipped as skipped:
    print(skipped)
del sys.modules["cachetools"]
before = dict(functions)
load_kvpress()
assert all(functions[name] is function for name, function in before.items())
with attention_patch():
    assert all(functions[name] is not function for name, function in before.items())
assert dict(functions) == before and not functions._local_mapping
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "kvpress needs the module cachetools: pip install cachetools fire" in done.stdout


# on a model


def test_a_model_class_that_kvpress_does_not_know_is_skipped() -> None:
    config = GPTNeoXConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(CaseSkipped, match="does not know GPTNeoXForCausalLM; it knows LlamaForCausalLM, "):
        create("Knorm").supports_layout(GPTNeoXForCausalLM(config))


@pytest.mark.parametrize(("name", "loaded"), [("ObservedAttention", "sdpa"), ("AdaKV", "eager")])
def test_a_model_with_the_wrong_attention_implementation_is_invalid(name: str, loaded: str) -> None:
    with (
        pytest.raises(CaseInvalid, match=f"kvpress:{name} needs attention implementation .* the model has {loaded}"),
        create(name).session(model(loaded)),
    ):
        pass


@torch.no_grad()
def test_a_prompt_that_breaks_a_rule_of_the_press_is_invalid_with_its_words() -> None:
    with (
        pytest.raises(CaseInvalid, match=r"kvpress:SnapKV: Query length 32 should be greater"),
        create("SnapKV").session(model()) as session,
        session.prefill(),
    ):
        model()(input_ids=tokens()[:, :32], past_key_values=DynamicCache())


def test_a_press_without_a_tokenizer_is_skipped_where_it_needs_one() -> None:
    with (
        pytest.raises(CaseSkipped, match="kvpress:KVzip needs the model's tokenizer"),
        create("KVzip").session(model()),
    ):
        pass


@pytest.mark.parametrize("name", ["Knorm", "KVzip", "KVgrad", "KVCompose", "CAM"])
@torch.no_grad()
def test_an_error_in_the_prompt_comes_through_and_leaves_no_trace(name: str) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("mine")

    before, attributes = plain_forward(), dict(model().model.__dict__)
    broken = model().model.layers[2].mlp.register_forward_hook(fail)
    with (
        pytest.raises(ValueError, match="mine"),
        create(name).session(model(), tokenizer=tokenizer()) as session,
        session.prefill(),
    ):
        model()(input_ids=tokens()[:, :PROMPT], past_key_values=DynamicCache())
    broken.remove()
    assert model().config._attn_implementation == "sdpa"
    assert model().model.__dict__ == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in attention_modules(model()))
    assert not hasattr(model(), "original_forward_KVComposePress")
    assert torch.equal(plain_forward(), before)


@torch.no_grad()
def test_every_session_has_its_own_press_and_masks_end_with_it() -> None:
    method = create("AdaKV", press="Knorm")
    presses = []
    for _ in range(2):
        with method.session(model()) as session:
            assert session.press.compression_ratio == 0.5
            with session.prefill():
                model()(input_ids=tokens()[:, :PROMPT], past_key_values=DynamicCache())
            assert all(module.masked_key_indices is not None for module in attention_modules(model()))
            session.press.compression_ratio = 0.9
            presses.append(session.press)
        assert not any("masked_key_indices" in module.__dict__ for module in attention_modules(model()))
    assert presses[0] is not presses[1]


@torch.no_grad()
def test_cleanup_alone_takes_masks_and_rotary_embeddings_off_the_model() -> None:
    before = plain_forward(), set(dict(model().named_modules()))
    for module in attention_modules(model()):
        module.rotary_emb = model().model.rotary_emb
        module.masked_key_indices = tuple(torch.zeros(1, dtype=torch.int64) for _ in range(3))
    KvpressMethod.cleanup(model())
    assert not any("masked_key_indices" in module.__dict__ for module in attention_modules(model()))
    assert set(dict(model().named_modules())) == before[1]
    assert torch.equal(plain_forward(), before[0])


def test_random_presses_repeat_with_their_seed_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (run("Random", seed=seed).logits for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_positions_go_on_at_the_stored_tokens_after_a_rerotation_only() -> None:
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=torch.zeros(1, 2, 256, 16))])
    for name, position in (("StreamingLLM", 512), ("KeyRerotation", 256)):
        with create(name).session(model()) as session:
            assert session.first_decode_position(cache, 512) == position


@torch.no_grad()
def test_rerotated_keys_are_those_of_the_kept_tokens_at_their_place_in_the_cache() -> None:
    """In the first layer keys depend on token and position alone, so the kept tokens by themselves are a reference."""
    ids, cache, reference = tokens()[:, :PROMPT], DynamicCache(), DynamicCache()
    with create("KeyRerotation").session(model()) as session, session.prefill():
        model()(input_ids=ids, past_key_values=cache)
    kept = torch.cat([ids[:, :4], ids[:, -252:]], dim=1)
    model()(input_ids=kept, past_key_values=reference)
    assert torch.allclose(cache.layers[0].keys, reference.layers[0].keys, atol=1e-4)


# replays


@pytest.mark.parametrize("name", ["KVzip", "KVgrad"])
def test_replays_in_chunks_are_not_counted_as_tokens_seen(name: str) -> None:
    plain, seen = (run(name, new_cache=cache, chunk_size=100) for cache in (DynamicCache, seen_cache))
    assert torch.equal(plain.logits, seen.logits)
    assert plain.prefilled == seen.prefilled
    assert plain.prefilled["masked_ratio"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ["KVzip", "KVgrad", "KVCompose"])
@torch.inference_mode()
def test_explicit_positions_of_the_prompt_do_not_move_the_replay(name: str) -> None:
    method, ids, stored = create(name), tokens()[:, :PROMPT], []
    for positions in (None, torch.arange(PROMPT)[None]):
        cache = seen_cache()
        with method.session(model(), tokenizer=tokenizer()) as session:
            with session.prefill():
                model()(input_ids=ids, past_key_values=cache, position_ids=positions)
            effective = session.measure_effective(cache, PROMPT)
        assert all(type(layer) is SeenLayer and layer.seen == PROMPT for layer in cache.layers)
        stored.append((effective, [layer.keys for layer in cache.layers]))
    assert stored[0][0] == stored[1][0]
    assert all(torch.equal(one, two) for one, two in zip(stored[0][1], stored[1][1], strict=True))


# timing


@pytest.mark.parametrize(
    ("name", "params", "in_prefill", "in_decode"),
    [
        ("Knorm", {}, LAYERS, 0),
        ("PerLayerCompression", {}, LAYERS, 0),
        ("Composed", {}, LAYERS, 0),
        ("DMS", {}, LAYERS, 0),
        ("PrefillDecoding", {}, LAYERS, LAYERS),
        ("KVzip", {}, 1, 0),
        ("KVzip", {"chunk_size": 100}, 1, 0),
        ("KVgrad", {}, 1, 0),
        ("KVCompose", {}, 2, 0),
    ],
)
@torch.no_grad()
def test_the_work_of_a_press_is_marked_in_pairs_that_do_not_overlap(
    name: str, params: dict[str, Any], in_prefill: int, in_decode: int
) -> None:
    prefill: list[bool] = []
    decode: list[bool] = []
    cache, ids = seen_cache(), tokens()
    with create(name, **params).session(model(), tokenizer=tokenizer()) as session:
        with session.timed(prefill.append), session.prefill():
            model()(input_ids=ids[:, :PROMPT], past_key_values=cache)
        with session.timed(decode.append):
            model()(input_ids=ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
        silent = len(prefill), len(decode)
        model()(input_ids=ids[:, PROMPT + 1 : PROMPT + 2], past_key_values=cache)
        assert silent == (len(prefill), len(decode))
    assert prefill == [True, False] * in_prefill
    assert decode == [True, False] * in_decode


@torch.no_grad()
def test_without_timing_the_press_runs_its_own_hook() -> None:
    with create("Knorm").session(model()) as session, session.prefill():
        assert "forward_hook" not in session.press.__dict__


# what newer transformers dropped


class Attention(nn.Module):
    layer_idx = 0

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return kwargs


def test_cache_position_is_added_where_the_model_does_not_pass_it_and_kept_where_it_does() -> None:
    attention, cache, hidden = Attention(), DynamicCache(), torch.zeros(1, 3, 4)
    with cache_position([attention]):
        prompt = attention(hidden_states=hidden, past_key_values=cache)
        cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
        later = attention(hidden_states=hidden, past_key_values=cache)
        own = attention(hidden_states=hidden, past_key_values=cache, cache_position="own")
    assert prompt["cache_position"].tolist() == [0, 1, 2]
    assert later["cache_position"].tolist() == [3, 4, 5]
    assert own["cache_position"] == "own"
    assert "cache_position" not in attention(hidden_states=hidden, past_key_values=cache)


def test_attention_functions_are_restored_after_an_error() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(ValueError, match="mine"), attention_patch():
        raise ValueError("mine")
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


@pytest.mark.parametrize(
    ("name", "params", "keep_ratio", "told"),
    [
        ("SnapKV", {}, 0.3, "60 tokens stay, fewer than the press' window of 64"),
        ("SnapKV", {}, 0.5, None),
        ("SnapKV", {}, 1.0, None),
        # the press inside a wrapper decides
        ("AdaKV", {}, 0.3, "60 tokens stay, fewer than SnapKV's window of 64"),
        ("AdaKV", {"press": {"name": "SnapKV", "window_size": 16}}, 0.3, None),
        ("AdaKV", {"press": "Knorm"}, 0.3, None),
        ("StreamingLLM", {}, 0.02, "4 tokens stay, no more than the 4 sinks of StreamingLLM"),
        ("KeyRerotation", {}, 0.02, "no more than the 4 sinks of StreamingLLM"),
        ("ExpectedAttention", {"n_sink": 60}, 0.3, "60 tokens stay, no more than the 60 sinks"),
        # channels go, and all tokens stay
        ("ThinK", {}, 0.1, None),
    ],
)
def test_a_press_that_is_something_else_at_this_size_says_so(
    name: str, params: dict[str, Any], keep_ratio: float, told: str | None
) -> None:
    caveat = KvpressMethod.create(name, keep_ratio=keep_ratio, **params).caveat(200)
    assert caveat is None if told is None else told in str(caveat)
