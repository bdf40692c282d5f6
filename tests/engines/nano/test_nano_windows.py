"""Models with sliding windows of their own: measured as they are, and policies act on the layers that see everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from requests_served import memory_of, tokens_of
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import WINDOW, ZOO, Architecture

from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.cache_formats.pack import pack, unpack
from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.nano.session import NanoSession
from kvsuite.errors import CaseInvalid
from kvsuite.workloads.windows import plan_windows

NAMES = (
    "Mistral, window", "Ministral, window", "Qwen2, window", "Gemma 3", "Gemma 3n", "Phi-3, window", "Cohere 2", "EXAONE 4",
    "OLMo 3, window",
)  # fmt: skip
WINDOWED = [each for each in ZOO if each.name in NAMES]
TEXT = torch.randperm(250, generator=torch.Generator().manual_seed(3))[:60].tolist()
PROMPT, NEW = TEXT[:40], 10


def made(folder: Path, kind: str, head: str = "ForCausalLM", **config: Any) -> Any:
    """A tiny model of random weights, saved without a tokenizer."""
    shape = {
        "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 512, "bos_token_id": 256,
        "eos_token_id": 257, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**(shape | config)))
    model.save_pretrained(folder)
    return model.eval()


def case(folder: Path, prompt: int = len(PROMPT), new: int = NEW, **more: Any) -> Case:
    common = {"suite": "compression", "engine": "nano", "name": "made", "device": "cpu", "dtype": "float32"}
    workload = {"prompt_tokens": prompt, "max_new_tokens": new, "max_tokens": len(TEXT)}
    return Case(**(common | {"model": str(folder), "workload": workload} | more))


def prepared(folder: Path, **more: Any) -> NanoSession:
    of = case(folder, **more)
    session = NanoSession(of, EngineSettings(threads=1))
    session.prepare(of)
    return session


def streaming(total: int, **more: Any) -> dict[str, Any]:
    return {"policy": "streaming_llm", "policy_params": {"start_size": 4, "recent_size": total - 4} | more}


def losses(model: Any, tokens: list[int], mask: torch.Tensor | None = None) -> list[float]:
    """Losses of ``tokens[1:]`` by one plain forward pass."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, :-1]
    found: list[float] = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return found


@pytest.mark.parametrize("architecture", WINDOWED, ids=lambda one: one.name)
def test_chunks_of_a_text_longer_than_the_window(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvsuite.engines.nano.runtime._STEP_TOKENS", {"cpu": 11})
    monkeypatch.setattr("kvsuite.engines.nano.scoring._WINDOW_TOKENS", {"cpu": 33})
    folder = architecture.save(tmp_path)
    session = prepared(folder)
    assert len(WINDOWED) == len(NAMES)
    assert any(layer.window == WINDOW for layer in session._layers)
    assert "policy_layers" not in session.effective
    tokens = tokens_of(session, PROMPT, NEW)
    assert session.effective["max_num_batched_tokens"] == 11
    whole = session.score(TEXT, "streaming-decode", 0).nll
    plans = plan_windows("hf-strided", len(TEXT), 32, 16, prefix="none")
    windows = session.score_windows(TEXT, plans, prefix="none", prefix_token=None).tokens.nll
    session.close()

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert tokens == expected[0, len(PROMPT) :].tolist()
    assert whole == pytest.approx(losses(model, TEXT), abs=1e-4)
    each = [losses(model, TEXT[w.begin : w.end])[w.first_scored - w.begin - 1 :] for w in plans]
    assert windows == pytest.approx([loss for some in each for loss in some], abs=1e-4)


def test_bytes_are_those_of_the_tokens_that_the_windows_leave(tmp_path: Path) -> None:
    """Two layers of four see 16 tokens: of 49 they hold those that share a block with what is seen."""
    made(tmp_path, "Ministral", head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)
    session = prepared(tmp_path)
    found = memory_of(session, PROMPT, NEW)
    # positions 33 and later of 48 are seen: blocks begin at 32
    assert found.lengths_decode == [49 - 32, 49] * 2
    # position 24 is the first that the prompt's last token sees
    assert found.lengths_prefill == [40 - 16, 40] * 2
    token = 2 * 2 * 16 * 4
    assert found.kv_bytes_decode == 2 * (17 + 49) * token == session.planned_kv_bytes(40, NEW)
    assert found.kv_bytes_prefill == 2 * (24 + 40) * token == session.full_kv_bytes(40)
    # a step reads what it sees
    assert session.step_kv_bytes(40, NEW) == 2 * (16 + sum(range(41, 50)) / 9) * token
    session.close()


def test_layers_with_windows_are_packed_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain pass whose attention reads every token as it is unpacked has the same losses."""
    model = made(
        tmp_path, "Ministral", head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2
    )
    session = prepared(tmp_path, params={"kv_cache_dtype": "int8:int4"})
    scored = session.score(TEXT, "streaming-decode", 0).nll
    found = memory_of(session, PROMPT, NEW)
    # codes and scales of two heads of 16 numbers
    token = 2 * ((16 + 2) + (8 + 4))
    assert found.kv_bytes_decode == 2 * (17 + 49) * token == session.planned_kv_bytes(40, NEW)
    assert found.kv_bytes_allocated == found.predicted["pool_bytes"]
    session.close()
    chosen = CacheFormat.parse("int8:int4")
    assert chosen is not None
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def reading_packed(module: Any, query: Any, key: Any, value: Any, *more: Any, **asked: Any) -> Any:
        read = (unpack(side, pack(side, x), x.dtype) for side, x in ((chosen.keys, key), (chosen.values, value)))
        return attend(module, query, *read, *more, **asked)

    assert scored != pytest.approx(losses(model, TEXT), abs=1e-2)
    # where models look first: kvpress, once a test has imported it, has functions of its own there
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", reading_packed)
    assert scored == pytest.approx(losses(model, TEXT), abs=1e-4)


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_a_policy_acts_on_the_layers_that_see_everything(positions: str, tmp_path: Path) -> None:
    model = made(
        tmp_path, "Qwen3", head_dim=16, use_sliding_window=True, sliding_window=16,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )  # fmt: skip
    session = prepared(tmp_path, **streaming(20, positions=positions))
    assert session.effective["policy_layers"] == [0, 2]
    found = memory_of(session, PROMPT, NEW)
    assert found.lengths_decode == [20, 49 - 32] * 2
    assert found.kv_bytes_decode == session.planned_kv_bytes(40, NEW)
    assert session.effective["policy_layers"] == [0, 2]
    scored = session.score(TEXT, "streaming-decode", 0).nll
    session.close()
    if positions == "cache":
        # as far as nothing was evicted the places are the positions
        assert scored[:20] == pytest.approx(losses(model, TEXT[:21]), abs=1e-4)
        assert scored != pytest.approx(losses(model, TEXT), abs=1e-2)
        return
    # StreamingLLM's mask in the full layers, the model's own in the others
    at = torch.arange(len(TEXT))
    seen = (at[None] <= at[:, None]) & ((at[None] < 4) | (at[:, None] - at[None] <= 16))
    own = (at[None] <= at[:, None]) & (at[:, None] - at[None] < 16)
    masks = {"full_attention": seen[None, None], "sliding_attention": own[None, None]}
    assert scored == pytest.approx(losses(model, TEXT, masks), abs=1e-4)  # type: ignore[arg-type]


def test_cache_positions_do_not_move_the_layers_with_windows(tmp_path: Path) -> None:
    """A policy that keeps everything changes nothing, though windows drop blocks beside it."""
    model = made(
        tmp_path, "Qwen3", head_dim=16, use_sliding_window=True, sliding_window=16,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )  # fmt: skip
    session = prepared(tmp_path, **streaming(100, positions="cache"))
    scored = session.score(TEXT, "streaming-decode", 0).nll
    session.close()
    assert scored == pytest.approx(losses(model, TEXT), abs=1e-4)


def test_a_policy_without_a_layer_left_is_invalid_and_a_window_that_is_never_reached_is_none(tmp_path: Path) -> None:
    made(tmp_path, "Mistral", sliding_window=16)
    with pytest.raises(CaseInvalid, match="own sliding window of 16 is shorter than the 60 tokens"):
        prepared(tmp_path, **streaming(8))
    workload = {"prompt_tokens": 8, "max_new_tokens": 7, "max_tokens": 16}
    session = prepared(tmp_path, **streaming(8), workload=workload)
    assert "policy_layers" not in session.effective
    assert memory_of(session, PROMPT[:8], 7).lengths_decode == [8] * 4
    session.close()
    with pytest.raises(CaseInvalid, match=r"17 tokens of the longest sequence"):
        prepared(tmp_path, **streaming(8), workload=workload | {"max_tokens": 17})
    with pytest.raises(CaseInvalid, match="no other layer is left"):
        prepared(tmp_path, **streaming(8, skip_layers=[0]))
