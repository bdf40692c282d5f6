"""Notes of tokens by kernels and by plain torch: equal. On CUDA, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("the kernels need a CUDA device", allow_module_level=True)

from kvsuite.compression import get_policy  # noqa: E402
from kvsuite.compression.base import CacheView  # noqa: E402
from kvsuite.compression.ranked import ROUNDING  # noqa: E402
from kvsuite.nanovllm.groups import LayerGroup  # noqa: E402
from kvsuite.nanovllm.kv_pool import KVPool  # noqa: E402
from kvsuite.nanovllm.note_kernels import least_norms, move_last, note_norms  # noqa: E402
from kvsuite.nanovllm.token_notes import TokenNotes  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
LAYERS, SIZE, SEQUENCES = 2, 4, 3


def _made(kv_heads: int, head_dim: int, length: int, *, scored: bool = True, dtype: torch.dtype = torch.float16):
    """A pool with notes, tables of sequences that store as many tokens, and a generator."""
    generator = torch.Generator().manual_seed(length + head_dim)
    width = -(-length // SIZE)
    group = LayerGroup(tuple(range(LAYERS)), kv_heads, head_dim, compressed=True)
    pool = KVPool(group, num_blocks=SEQUENCES * width + 2, block_size=SIZE, device=DEVICE, dtype=dtype)
    for tensor in (pool.keys, pool.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    blocks = torch.randperm(SEQUENCES * width + 2, generator=generator)[: SEQUENCES * width].view(SEQUENCES, width) + 1
    notes = pool.notes = TokenNotes(
        layers=LAYERS, heads=kv_heads, blocks=pool.num_blocks + 1, block_size=SIZE, scored=scored, device=DEVICE
    )
    return pool, notes, blocks.to(DEVICE), generator


def _slots(blocks, length):
    return (blocks[..., None] * SIZE + torch.arange(SIZE, device=DEVICE)).flatten(1)[:, :length].contiguous()


def _noted(pool, notes, blocks, length, generator, norms=None):
    """Note positions in any order, some left out, and norms of the keys, or those given."""
    positions = torch.stack([torch.randperm(3 * length, generator=generator)[:length] for _ in blocks]).to(DEVICE)
    slots = _slots(blocks, length).flatten()
    scores = torch.linalg.vector_norm(pool.keys_of(slots), dim=-1, dtype=torch.float32) if norms is None else norms
    notes.write(slots, positions.flatten(), scores)
    return positions


@pytest.mark.parametrize(("kv_heads", "head_dim", "length"), [(8, 128, 5), (3, 80, 33), (1, 16, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_norms_and_positions_are_noted(kv_heads, head_dim, length, dtype):
    pool, notes, blocks, generator = _made(kv_heads, head_dim, length, dtype=dtype)
    slots = _slots(blocks, length).flatten()
    positions = torch.randint(1000, slots.shape, generator=generator).to(DEVICE)
    note_norms(pool.keys, slots, positions, notes.by_slot)
    found = notes.by_slot.clone()
    notes.by_slot.zero_()
    notes.write(slots, positions, torch.linalg.vector_norm(pool.keys_of(slots), dim=-1, dtype=torch.float32))
    assert torch.equal(found[0], notes.by_slot[0])
    torch.testing.assert_close(found[1].view(torch.float32), notes.by_slot[1].view(torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("fix_size_l2", {"size": 40, "keep_ratio": 0.25, "strategy": "keep_low"}),
        ("fix_size_l2", {"size": 150, "keep_ratio": 0.5, "strategy": "keep_high"}),
        ("fix_size_l2", {"size": 1, "keep_ratio": 0.0, "strategy": "keep_low"}),
        ("l2_compress", {"keep_ratio": 0.9, "prune_after": 7, "mode": "every_token"}),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_the_lowest_norm_goes_as_the_policy_has_it(name, own, ties):
    policy = get_policy(name, **own)
    length = own.get("size", 8) + 1
    pool, notes, blocks, generator = _made(2, 32, length)
    norms = None
    if ties:
        # of few values, some of which are as near as rounding
        norms = torch.randint(1, 4, (LAYERS, 2, SEQUENCES * length), generator=generator).to(DEVICE, torch.float32)
        norms *= 1 + 3e-7 * torch.randint(2, norms.shape, generator=generator).to(DEVICE)
    noted = _noted(pool, notes, blocks, length, generator, norms)
    seen = noted.amax(dim=1) + 1
    positions, scores = notes.read(blocks, length)
    steps = seen.view(-1, 1, 1)
    wanted = policy.victim(CacheView(positions, steps[..., None] - 1, scores, step=steps))
    rule = policy.norm_rule(length)
    found = least_norms(
        notes.by_slot, blocks, seen, length, SIZE, sign=rule.sign, protected=rule.protected, rounding=ROUNDING
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("kv_heads", "head_dim", "length", "scored"), [(8, 64, 5, True), (3, 80, 33, False)])
def test_the_last_token_moves_to_where_each_head_wants_it(kv_heads, head_dim, length, scored):
    pool, notes, blocks, generator = _made(kv_heads, head_dim, length, scored=scored)
    notes.by_slot.copy_(torch.randint(1000, notes.by_slot.shape, generator=generator))
    chosen = torch.randint(length, (SEQUENCES, LAYERS, kv_heads), generator=generator).to(DEVICE)
    # one is the last itself
    chosen[0, 0, 0] = length - 1
    slots, before = _slots(blocks, length), [each.clone() for each in (pool.keys, pool.values, notes.by_slot)]
    move_last(pool.keys, pool.values, notes.by_slot, blocks, slots[:, -1].contiguous(), chosen)
    found = [each.clone() for each in (pool.keys, pool.values, notes.by_slot)]
    for tensor, own in zip((pool.keys, pool.values, notes.by_slot), before, strict=True):
        tensor.copy_(own)
    pool.move(slots.gather(1, chosen.flatten(1)).view_as(chosen), slots[:, -1])
    assert all(map(torch.equal, found, (pool.keys, pool.values, notes.by_slot)))
    assert not torch.equal(found[0], before[0])
