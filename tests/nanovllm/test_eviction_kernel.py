"""A token of each sequence is evicted by the kernel as by policy and plain torch. On CUDA, or with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE

from kvsuite.compression import get_policy
from kvsuite.compression.base import CacheView
from kvsuite.nanovllm.eviction_kernel import EvictionKernel
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.token_notes import TokenNotes

pytestmark = pytest.mark.gpu
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


def _kernel(pool, notes=None):
    return EvictionKernel(pool.keys, pool.values, notes, rows=SEQUENCES + 1, blocks=pool.num_blocks)


def _on_host(blocks):
    return blocks.cpu().numpy().astype("int32")


def _all(pool):
    return [pool.keys, pool.values, pool.notes.by_slot]


def _restored(pool, before):
    found = [each.clone() for each in _all(pool)]
    for tensor, own in zip(_all(pool), before, strict=True):
        tensor.copy_(own)
    return found


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("fix_size_l2", {"size": 40, "keep_ratio": 0.25, "strategy": "keep_low"}),
        # more than a program looks at together
        ("fix_size_l2", {"size": 600, "keep_ratio": 0.5, "strategy": "keep_high"}),
        ("fix_size_l2", {"size": 1, "keep_ratio": 0.0, "strategy": "keep_low"}),
        ("fix_size_l2", {"size": 12, "keep_ratio": 1.0, "strategy": "keep_low"}),
        ("l2_compress", {"keep_ratio": 0.9, "prune_after": 7, "mode": "every_token"}),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("kv_heads", "head_dim", "dtype"), [(2, 32, torch.float16), (3, 80, torch.float32)])
def test_the_lowest_norm_goes_as_the_policy_has_it(name, own, ties, kv_heads, head_dim, dtype):
    policy = get_policy(name, **own)
    length = own.get("size", 8) + 1
    pool, notes, blocks, generator = _made(kv_heads, head_dim, length, dtype=dtype)
    slots, last = _slots(blocks, length), _slots(blocks, length)[:, -1].contiguous()
    if ties:
        # tokens that occur several times have keys of one norm
        pool.keys.copy_(pool.keys[:, :1, torch.randint(2, (SIZE,), generator=generator)].clone())
    # the positions of all but the last stand in any order
    positions = torch.stack([torch.randperm(3 * length, generator=generator)[:length] for _ in blocks]).to(DEVICE)
    seen = positions.amax(dim=1) + 1
    positions[:, -1], seen = seen, seen + 1
    norms = torch.linalg.vector_norm(pool.keys_of(slots.flatten()), dim=-1, dtype=torch.float32)
    notes.write(slots.flatten(), positions.flatten(), norms)
    # what is noted of the last is no matter
    notes.by_slot[..., last] = torch.randint(1000, (1, len(last)), dtype=torch.int32).to(DEVICE)
    before = [each.clone() for each in _all(pool)]
    _kernel(pool, notes.by_slot).evict_by_norm(length, _on_host(blocks), seen.cpu().numpy(), policy.norm_rule(length))
    found = _restored(pool, before)

    notes.write(slots.flatten(), positions.flatten(), norms)
    noted, scores = notes.read(blocks, length)
    steps = seen.view(-1, 1, 1)
    victim = policy.victim(CacheView(noted, steps[..., None] - 1, scores, step=steps))
    pool.move(slots.gather(1, victim.flatten(1)).view_as(victim), last)
    rest = slots[:, :-1].flatten()
    for one, wanted in zip(found[:2], _all(pool)[:2], strict=True):
        assert torch.equal(one, wanted)
    assert torch.equal(found[2][0][..., rest], notes.by_slot[0][..., rest])
    given, wanted = (each[1][..., rest].view(torch.float32) for each in (found[2], notes.by_slot))
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=0)
    assert length == 2 or not all(map(torch.equal, found[:2], before[:2]))


@pytest.mark.parametrize(("kv_heads", "head_dim", "length", "scored"), [(8, 64, 5, True), (3, 80, 33, False)])
def test_the_last_token_goes_where_each_head_wants_it(kv_heads, head_dim, length, scored):
    pool, notes, blocks, generator = _made(kv_heads, head_dim, length, scored=scored)
    notes.by_slot.copy_(torch.randint(1000, notes.by_slot.shape, generator=generator))
    chosen = torch.randint(length, (SEQUENCES, LAYERS, kv_heads), generator=generator).to(DEVICE)
    # one is the last itself
    chosen[0, 0, 0] = length - 1
    slots, before = _slots(blocks, length), [each.clone() for each in _all(pool)]
    _kernel(pool, notes.by_slot).evict(length, _on_host(blocks), chosen)
    found = _restored(pool, before)
    pool.move(slots.gather(1, chosen.flatten(1)).view_as(chosen), slots[:, -1])
    assert all(map(torch.equal, found, _all(pool)))
    assert not torch.equal(found[0], before[0])


@pytest.mark.parametrize(("kv_heads", "head_dim", "length"), [(8, 64, 5), (1, 80, 33)])
def test_the_last_token_goes_where_all_heads_want_it_launch_after_launch(kv_heads, head_dim, length):
    pool, notes, blocks, generator = _made(kv_heads, head_dim, length)
    kernel, slots = _kernel(pool), _slots(blocks, length)
    pool.notes = None
    noted = notes.by_slot.clone()
    # buffers are filled again, sequences become fewer, and tables narrower
    for count, stored in ((3, length), (3, length), (2, length), (2, length), (2, length - 2), (3, length)):
        before = [each.clone() for each in (pool.keys, pool.values)]
        victim = torch.randint(stored - 1, (count,), generator=generator)
        kernel.evict(stored, _on_host(blocks[:count, : -(-stored // SIZE)]), victim.numpy())
        found = [each.clone() for each in (pool.keys, pool.values)]
        pool.keys.copy_(before[0])
        pool.values.copy_(before[1])
        pool.move(slots[:count].gather(1, victim[:, None].to(DEVICE))[:, 0], slots[:count, stored - 1])
        assert all(map(torch.equal, found, [pool.keys, pool.values]))
        assert not torch.equal(found[0], before[0])
        pool.keys.copy_(torch.randn(pool.keys.shape, generator=generator))
    assert torch.equal(notes.by_slot, noted)
