"""Captured decode steps give the logits of transformers."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("captured steps need a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from kvsuite.nanovllm.batch import BatchBuilder, GroupInputs  # noqa: E402
from kvsuite.nanovllm.decode_graphs import DecodeGraphs, default_sizes  # noqa: E402
from kvsuite.nanovllm.flashinfer_libraries import Libraries  # noqa: E402
from kvsuite.nanovllm.fused_layers import PRODUCTS, FusedDecoder  # noqa: E402
from kvsuite.nanovllm.groups import LayerGroup  # noqa: E402
from kvsuite.nanovllm.kernel_attention import KernelAttention  # noqa: E402
from kvsuite.nanovllm.kv_pool import KVPool  # noqa: E402
from kvsuite.nanovllm.row_linear import Tiling  # noqa: E402
from kvsuite.nanovllm.tiling_choice import choose_tilings  # noqa: E402

pytestmark = pytest.mark.gpu
BLOCK, LENGTHS, NEW = 16, [40, 3, 17], 20
DEVICE = torch.device("cuda:0")
# bfloat16 keeps 8 bits; four layers of them
BOUND = 2e-2


class Sequences:
    """Three sequences of known tokens whose blocks lie anywhere."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, head_dim=64,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval().requires_grad_(False).to(DEVICE, torch.bfloat16)
        group = LayerGroup(tuple(range(4)), 2, 64)
        self.pool = KVPool(group, num_blocks=30, block_size=BLOCK, device=DEVICE, dtype=torch.bfloat16)
        generator = np.random.default_rng(0)
        self.tokens = [generator.integers(0, 512, n + NEW) for n in LENGTHS]
        self.tables = (1 + generator.permutation(30)[:12]).reshape(3, 4).astype(np.int32)
        self.builder = BatchBuilder(DEVICE)

    def batch(self, lengths, counts, which=(0, 1, 2)):
        places = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
        rows = np.repeat(np.array(which), counts)
        group = GroupInputs(
            slots=self.tables[rows, places // BLOCK].astype(np.int64) * BLOCK + places % BLOCK,
            kv_lengths=np.array(lengths),
            block_tables=self.tables[list(which)],
            dropped=np.zeros(len(lengths), dtype=np.int64),
        )
        return self.builder.build(
            ids=np.array([self.tokens[row][place] for row, place in zip(rows, places, strict=True)]),
            positions=places.astype(np.int64),
            counts=np.array(counts),
            sample_rows=np.cumsum(counts) - 1,
            groups=[group],
        )

    def expected(self, row, length):
        ids = torch.from_numpy(self.tokens[row][:length]).to(DEVICE)
        with torch.inference_mode():
            return self.model(ids[None], use_cache=False).logits[0, -1]


def _error(found, expected):
    assert torch.isfinite(found).all()
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# the last ones are those of short steps: norms and sums are inside the products
OWN = {
    product: Tiling(block_k=64, splits=1 if product in ("gate_up", "final") else 2, prefetch=1) for product in PRODUCTS
}


@pytest.mark.parametrize("tuned", [False, True, OWN], ids=["torch", "tried", "own"])
def test_captured_steps_give_the_logits_of_transformers(tuned):
    sequences = Sequences()
    decoder = FusedDecoder(sequences.model, sequences.model.config, 128)
    if tuned is OWN:
        decoder.tilings = {(product, 16): tiling for product, tiling in OWN.items()}
    elif tuned:
        choose_tilings(decoder, [4])
    attention = KernelAttention([sequences.pool], query_heads=8, libraries=Libraries())
    prompt = sequences.batch(LENGTHS, LENGTHS)
    attention.begin(prompt)
    found = decoder.logits(prompt, attention)
    for row, length in enumerate(LENGTHS):
        assert _error(found[row], sequences.expected(row, length)) < BOUND
    graphs = DecodeGraphs(decoder.logits, attention, [2, 4], 4)
    graphs.capture()
    for step in range(1, NEW + 1):
        lengths = [n + step for n in LENGTHS]
        found = graphs.run(sequences.batch(lengths, [1, 1, 1])).clone()
        if step in (1, 7, NEW):
            for row, length in enumerate(lengths):
                assert _error(found[row], sequences.expected(row, length)) < BOUND


@pytest.mark.parametrize("tuned", [False, True], ids=["torch", "own"])
def test_a_replayed_step_begins_with_what_is_the_longest_sequence_now(tuned):
    sequences = Sequences()
    decoder = FusedDecoder(sequences.model, sequences.model.config, 128)
    if tuned:
        decoder.tilings = {(product, 16): tiling for product, tiling in OWN.items()}
    attention = KernelAttention([sequences.pool], query_heads=8, libraries=Libraries())
    prompt = sequences.batch(LENGTHS, LENGTHS)
    attention.begin(prompt)
    decoder.logits(prompt, attention)
    graphs = DecodeGraphs(decoder.logits, attention, [4], 4)
    graphs.capture()
    # the other rows are padding of one token
    for which, order in (((0, 1, 2), [0, 2, 1, 3]), ((1, 0, 2), [1, 2, 0, 3]), ((2, 0), [1, 0, 2, 3])):
        lengths = [LENGTHS[row] + 1 for row in which]
        found = graphs.run(sequences.batch(lengths, [1] * len(which), which))
        assert graphs.step(4).attention._orders[0].tolist() == order
        for at, row in enumerate(which):
            assert _error(found[at], sequences.expected(row, lengths[at])) < BOUND


def test_single_tokens_and_prompts_in_one_step():
    sequences = Sequences()
    decoder = FusedDecoder(sequences.model, sequences.model.config, 128)
    attention = KernelAttention([sequences.pool], query_heads=8, libraries=Libraries())
    # two sequences decode while the third one's prompt comes in two chunks; one of a single token stands behind
    for lengths, counts in (([40, 3, 9], [40, 3, 9]), ([41, 4, 16], [1, 1, 7]), ([42, 6, 17], [1, 2, 1])):
        batch = sequences.batch(lengths, counts)
        attention.begin(batch)
        found = decoder.logits(batch, attention)
        for row, length in enumerate(lengths):
            assert _error(found[row], sequences.expected(row, length)) < BOUND


def test_padding_rows_write_to_the_scratch_block_alone():
    sequences = Sequences()
    decoder = FusedDecoder(sequences.model, sequences.model.config, 128)
    attention = KernelAttention([sequences.pool], query_heads=8, libraries=Libraries())
    prompt = sequences.batch(LENGTHS, LENGTHS)
    attention.begin(prompt)
    decoder.logits(prompt, attention)
    graphs = DecodeGraphs(decoder.logits, attention, [4], 4)
    graphs.run(sequences.batch([n + 1 for n in LENGTHS], [1, 1, 1]))
    before = sequences.pool.keys.clone()
    # rows 1 and 2 of the step before have become padding: they must not write once more
    graphs.run(sequences.batch([LENGTHS[0] + 2], [1], which=(0,)))
    changed = (before != sequences.pool.keys).any(-1).any(-1).any(0).flatten()
    place = LENGTHS[0] + 1
    own = int(sequences.tables[0, place // BLOCK]) * BLOCK + place % BLOCK
    assert set(changed.nonzero().flatten().tolist()) <= {0, own}
    assert changed[own]


def test_a_batch_that_no_graph_can_run_is_left_to_the_caller():
    sequences = Sequences()
    decoder = FusedDecoder(sequences.model, sequences.model.config, 128)
    attention = KernelAttention([sequences.pool], query_heads=8, libraries=Libraries())
    graphs = DecodeGraphs(decoder.logits, attention, [2], 4)
    assert graphs.run(sequences.batch(LENGTHS, LENGTHS)) is None
    assert graphs.run(sequences.batch(LENGTHS, [1, 1, 1])) is None
    assert not graphs._steps


def test_default_sizes_end_with_the_largest():
    assert default_sizes(3) == [1, 2, 3]
    assert default_sizes(200)[-3:] == [128, 160, 192, 200][-3:]
    assert default_sizes(128)[-1] == 128
    assert len(set(default_sizes(256))) == len(default_sizes(256))
