"""What policies look at of a prompt, by kernels and by the reference. On CUDA, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED

from kvsuite.compression import get_policy
from kvsuite.compression.prompt_view import PromptObservation, PromptView, attention_weights
from kvsuite.compression.prompt_view import attention_sums as exact_sums
from kvsuite.compression.ranked import key_norms
from kvsuite.nanovllm.attention_sums import attention_sums
from kvsuite.nanovllm.gather_tokens import gather_rows
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.paged_norms import paged_key_norms
from kvsuite.nanovllm.pooled_prompt import PooledPrompt
from kvsuite.nanovllm.window_weights import mean_weights

pytestmark = pytest.mark.gpu
# the interpreter multiplies bfloat16 by their bits
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16


def _made(heads, kv_heads, window, length, head_dim):
    generator = torch.Generator().manual_seed(heads + window + length)
    query = torch.randn(heads, window, head_dim, generator=generator).mul(2).to(DTYPE)
    keys = torch.randn(kv_heads, length, head_dim, generator=generator).to(DTYPE)
    # a token that everybody looks at: the weights of the others are small
    keys[:, 0] = query.float().mean(dim=(0, 1)).to(DTYPE)
    return query.to(DEVICE), keys.to(DEVICE)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "length", "head_dim"),
    [
        (4, 1, 64, 300, 128), (6, 2, 5, 131, 64), (2, 2, 16, 16, 16), (2, 1, 1, 129, 32), (3, 1, 100, 257, 64),
        (2, 1, 7, 8, 256), (2, 1, 64, 300, 256),
    ],
)  # fmt: skip
def test_it_is_the_mean_of_the_weights(heads, kv_heads, window, length, head_dim):
    query, keys = _made(heads, kv_heads, window, length, head_dim)
    found = mean_weights(query, keys, head_dim**-0.5)
    exact = attention_weights(query.double().cpu(), keys.double().cpu(), head_dim**-0.5, length - window).mean(dim=1)
    assert found.shape == (heads, length)
    torch.testing.assert_close(found.cpu(), exact.float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(heads, device=DEVICE))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "length", "head_dim"),
    [(4, 1, 300, 300, 64), (2, 2, 65, 290, 32), (6, 2, 1, 131, 16), (3, 1, 100, 101, 64), (2, 1, 1, 1, 16)],
)
def test_attention_sums_of_a_chunk(heads, kv_heads, queries, length, head_dim):
    query, keys = _made(heads, kv_heads, queries, length, head_dim)
    found = attention_sums(query, keys, head_dim**-0.5)
    exact = exact_sums(query.double().cpu(), keys.double().cpu(), head_dim**-0.5)
    torch.testing.assert_close(found.cpu(), exact.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.sum(dim=-1), torch.full((heads,), float(queries), device=DEVICE), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize(("rows", "width", "count"), [(9, 128, 33), (40, 80, 5), (3, 1, 7), (50, 2048, 2)])
def test_rows_are_copied_by_their_numbers(rows, width, count, dtype):
    generator = torch.Generator().manual_seed(width)
    source = torch.randint(200, (rows, width), generator=generator).to(DEVICE, dtype)
    index = torch.randint(rows, (count,), generator=generator).to(DEVICE)
    out = torch.full((count + 1, width), 7, device=DEVICE).to(dtype)
    gather_rows(source, index, out[:count])
    assert torch.equal(out[:count], source[index])
    assert (out[count] == 7).all()


def _stored(layers, kv_heads, length, head_dim, dtype=DTYPE):
    """A pool of random keys, and the slots of a sequence in it."""
    group = LayerGroup(tuple(range(layers)), kv_heads, head_dim, compressed=True)
    size, blocks = 4, -(-length // 4)
    pool = KVPool(group, num_blocks=blocks + 3, block_size=size, device=DEVICE, dtype=dtype)
    generator = torch.Generator().manual_seed(length + head_dim)
    for tensor in (pool.keys, pool.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    table = torch.randperm(blocks + 3, generator=generator)[:blocks] + 1
    slots = (table[:, None] * size + torch.arange(size)).flatten()[:length]
    return pool, slots.to(DEVICE)


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "window", "length", "head_dim"),
    [(3, 8, 2, 64, 300, 64), (2, 3, 3, 5, 130, 16), (2, 6, 2, 100, 257, 32), (1, 4, 1, 7, 8, 128)],
)
def test_keys_are_read_where_they_lie(layers, heads, kv_heads, window, length, head_dim):
    pool, slots = _stored(layers, kv_heads, length, head_dim)
    query = torch.randn(layers * heads, window, head_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    part = slice(layers - 2, layers) if layers > 2 else slice(None)
    query = query.view(layers, heads, window, head_dim)[part].flatten(0, 1)
    found = mean_weights(query, pool.keys[part], 0.3, slots)
    beside = mean_weights(query, pool.keys_of(slots, part).flatten(0, 1), 0.3)
    # two compilations, which may contract products and sums in other ways
    torch.testing.assert_close(found, beside, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("layers", "kv_heads", "length", "head_dim"), [(3, 8, 70, 128), (2, 3, 33, 80), (1, 1, 1, 16), (2, 2, 700, 64)]
)
def test_norms_of_keys_where_they_lie(layers, kv_heads, length, head_dim, dtype):
    pool, slots = _stored(layers, kv_heads, length, head_dim, dtype)
    for part in (slice(None), slice(layers - 1, layers)):
        found = paged_key_norms(pool.keys[part], slots)
        torch.testing.assert_close(found, key_norms(pool.keys_of(slots, part)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["snapkv", "knorm"])
def test_policies_rank_by_them(name):
    pool, slots = _stored(2, 2, 200, 64)
    policy = get_policy(name, keep_ratio=0.4, **({"window": 16} if name == "snapkv" else {}))
    observed = PromptObservation(policy.needs)
    query = torch.randn(2 * 8, 16, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    observed.add(query.repeat(1, 2, 1), lambda: pool.keys_of(slots).flatten(0, 1), 64**-0.5)
    view = PooledPrompt(
        torch.arange(200, device=DEVICE).expand(4, 200),
        199,
        observed=observed,
        pool=pool,
        slots=slots,
        part=slice(None),
    )
    plain = PromptView(view.positions, 199, keys=view.keys, values=view.values, observed=observed)
    found, wanted = policy.prompt_score(view), policy.prompt_score(plain)
    assert found.shape == wanted.shape == (4, 200)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)


def test_nothing_is_copied_for_what_kernels_read(monkeypatch):
    pool, slots = _stored(2, 2, 200, 64)
    # what the kernels read, whatever the device
    monkeypatch.setattr(pool, "device", torch.device("cuda"))

    def copied(*_):
        raise AssertionError("keys are copied")

    monkeypatch.setattr(pool, "keys_of", copied)
    for name in ("snapkv", "knorm", "h2o"):
        policy = get_policy(name, keep_ratio=0.4)
        observed = PromptObservation(policy.needs)
        observed.last, observed.sums = torch.randn(16, 64, 64).to(DEVICE, DTYPE), torch.rand(16, 200, device=DEVICE)
        view = PooledPrompt(
            torch.arange(200, device=DEVICE).expand(4, 200), 199, observed=observed, pool=pool, slots=slots,
            part=slice(None),
        )  # fmt: skip
        assert policy.prompt_score(view).shape == (4, 200)
