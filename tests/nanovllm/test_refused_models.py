"""What paged attention is not for is refused in one line, which sends nobody to an engine that cannot do it either."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo import ZOO

from kvsuite.errors import CaseInvalid
from kvsuite.models.load import load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.attention_layers import attention_layers

SAID = {
    "BLOOM": r"0 of 3 layers attend .* \(its positions are ALiBi biases\); --kv-engine=hf measures its full cache$",
    "Falcon, new": r"^FalconForCausalLM: 0 of 4 layers attend .* comes in; use --kv-engine=hf$",
    "LFM2": r"2 of 4 layers attend .* \(layers 0, 2: conv\); use --kv-engine=hf$",
    "Falcon-H1": r"its tokens meet outside of attention \(convolution or state\); use --kv-engine=hf$",
    "MiniMax": r"2 of 4 layers attend .* \(layers 0, 2: linear_attention\)$",
    "Gemma 2": r"its attention takes softcap, which paged attention does not do; use --kv-engine=hf$",
}


@pytest.mark.parametrize("name", list(SAID))
def test_the_reason_is_told_and_where_to_go(name: str, tmp_path: Path) -> None:
    [architecture] = [one for one in ZOO if one.name == name]
    loaded = load_model(resolve_model(str(architecture.save(tmp_path))), device="cpu", dtype=None)
    before = loaded.text_config._attn_implementation
    with pytest.raises(CaseInvalid, match=SAID[name]) as refusal:
        attention_layers(loaded.model, loaded.text_config)
    assert "\n" not in str(refusal.value)
    assert loaded.text_config._attn_implementation == before
