from __future__ import annotations

import pytest
import torch
from policy_matrix import MATRIX, Line
from tiny_decoders import Fed, chunks_of, decoder, feed, text

from kvsuite.engines.hf.attention import GROUPED, register_grouped_attention


@pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])
@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_grouped_attention_is_sdpa(kind: str, line: Line) -> None:
    """Also where layers hold different numbers of tokens, and on the full cache."""
    of = decoder(kind)
    ids, chunks = text(40), chunks_of(20, 40)
    policy = line.build(skip_layers=[0, 2])

    def run(attention: str) -> list[Fed]:
        of.set_attention(attention)
        try:
            return [feed(kind, p, ids, chunks) for p in (policy, None)]
        finally:
            of.set_attention("sdpa")

    assert register_grouped_attention() == GROUPED
    for grouped, plain in zip(run(GROUPED), run("sdpa"), strict=True):
        torch.testing.assert_close(grouped.logits, plain.logits, rtol=0, atol=1e-5)


def test_no_mask_is_made_for_a_single_token() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    register_grouped_attention()
    mask = ALL_MASK_ATTENTION_FUNCTIONS[GROUPED]
    assert mask(batch_size=1, q_length=1, kv_length=9, q_offset=8) is None
    assert mask(batch_size=1, cache_position=torch.tensor([8]), kv_length=9) is None
