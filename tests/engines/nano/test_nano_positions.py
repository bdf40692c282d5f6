"""Tables of learned positions: right up to their last row, and a longer text is refused before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from requests_served import memory_of, tokens_of

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.nano.session import NanoSession
from kvsuite.errors import CaseInvalid
from kvsuite.workloads.windows import plan_windows

ROWS = 48
TEXT = torch.randperm(250, generator=torch.Generator().manual_seed(3))[: 2 * ROWS].tolist()
CONFIGS: dict[str, Any] = {
    "GPT2": transformers.GPT2Config(
        vocab_size=258, n_embd=64, n_layer=2, n_head=4, n_positions=ROWS, initializer_range=0.15, bos_token_id=256,
        eos_token_id=257,
    ),
    "OPT": transformers.OPTConfig(
        vocab_size=258, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=ROWS, init_std=0.15, pad_token_id=0, bos_token_id=256, eos_token_id=257,
    ),
}  # fmt: skip


def case(folder: Path, **workload: Any) -> Case:
    return Case(
        suite="compression", engine="nano", name="baseline", device="cpu", dtype="float32", model=str(folder),
        workload={"protocol": "streaming-decode"} | workload,
    )  # fmt: skip


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_right_up_to_the_last_row_and_no_further(kind: str, tmp_path: Path) -> None:
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, kind + head)(CONFIGS[kind]).eval()
    model.save_pretrained(tmp_path)
    fits = case(tmp_path, prompt_tokens=38, max_new_tokens=11, max_tokens=ROWS + 1)
    session = NanoSession(fits, EngineSettings(threads=1))
    session.prepare(fits)
    ids = torch.tensor([TEXT[:38]])
    with torch.inference_mode():
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=11, min_new_tokens=11, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        logits = model(input_ids=torch.tensor([TEXT[:ROWS]])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(TEXT[1 : ROWS + 1]), reduction="none").tolist()
    assert tokens_of(session, TEXT[:38], 11) == expected[0, 38:].tolist()
    assert memory_of(session, TEXT[:38], 11).lengths_decode == [ROWS] * 2
    assert session.score(TEXT[: ROWS + 1], "streaming-decode", 0).nll == pytest.approx(losses, abs=1e-4)
    scored = {"prefix": "none", "prefix_token": None}
    session.score_windows(TEXT, plan_windows("disjoint", len(TEXT), ROWS + 1, ROWS + 1, prefix="none"), **scored)

    beyond = rf"{ROWS + 1} tokens are more than the {ROWS} positions"
    for one in (
        {"max_new_tokens": 12},
        {"max_tokens": ROWS + 2},
        {"max_tokens": 12, "protocol": "prefix-continuation"},
    ):
        with pytest.raises(CaseInvalid, match=beyond):
            session.prepare(case(tmp_path, **({"prompt_tokens": 38, "max_new_tokens": 11} | one)))
    session.prepare(fits)
    with pytest.raises(CaseInvalid, match=beyond):
        session.score(TEXT[: ROWS + 2], "streaming-decode", 0)
    with pytest.raises(CaseInvalid, match=beyond):
        session.score_windows(TEXT, plan_windows("disjoint", len(TEXT), ROWS + 2, ROWS + 2, prefix="none"), **scored)
    session.close()


def test_an_output_at_whose_switch_everything_is_computed_again_is_invalid(tmp_path: Path) -> None:
    """Phi-3's generate does that; prompts beyond the switch, outputs within it and texts of known tokens need not."""
    config = transformers.Phi3Config(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=32, pad_token_id=0,
        bos_token_id=256, eos_token_id=257,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 16.0,
            "original_max_position_embeddings": 32,
        },
    )  # fmt: skip
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    within = case(tmp_path, prompt_tokens=20, max_new_tokens=8, max_tokens=60)
    session = NanoSession(within, EngineSettings(threads=1))
    session.prepare(within)
    assert len(session.score(TEXT[:60], "streaming-decode", 0).nll) == 59
    session.prepare(case(tmp_path, prompt_tokens=40, max_new_tokens=8))
    with pytest.raises(CaseInvalid, match=r"engine nano: an output that passes 32 tokens: .*--kv-prompt-tokens"):
        session.prepare(case(tmp_path, prompt_tokens=20, max_new_tokens=20))
    session.close()
