"""TVM's own paged cache (`TIRPagedKVCache`, compiled for this CPU): what MLC-LLM attends through, fed by hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# the only page size that its kernels are right with
_PAGE = 16
_TOKENS, _CHUNK = 512, 256
_THETA = 10_000


@functools.cache
def _compiled(windows: tuple[int | None, ...], heads: int, kv_heads: int, head_dim: int) -> Any:
    """A virtual machine whose ``create`` makes caches of this shape; five seconds."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache

    target = tvm.target.Target("llvm")

    class Caches(nn.Module):
        def create(self, batch: Any, total: Any, chunk: Any, page: Any, slides: Any) -> Any:
            return TIRPagedKVCache(
                attn_kind=["mha" if window is None else "mha_sliding" for window in windows],
                layer_sliding_window_size=max((window for window in windows if window is not None), default=_TOKENS),
                max_batch_size=batch, max_total_seq_len=total, prefill_chunk_size=chunk, page_size=page,
                support_sliding_window=slides, layer_partition=relax.ShapeExpr([0, len(windows)]),
                num_hidden_layers=len(windows), num_attention_heads=heads, num_key_value_heads=kv_heads,
                qk_head_dim=head_dim, v_head_dim=head_dim, mla_original_qk_head_dim=0, mla_original_v_head_dim=0,
                # keys are stored as they come, and turned to their place in the cache where they are read
                rope_mode=RopeMode.INLINE, rope_scale=1, rope_theta=_THETA, rope_scaling={}, rotary_dim=head_dim,
                rope_ext_factors=relax.prim_value(0), enable_disaggregation=False, dtype="float32", target=target,
            )  # fmt: skip

    names = dict.fromkeys(("batch", "total", "chunk", "page", "slides"), int)
    with target:
        module, _ = Caches().export_tvm({"create": {**names, "$": {"param_mode": "none", "effect_mode": "none"}}})
        return relax.VirtualMachine(tvm.compile(module, target), tvm.cpu())


class TvmCache:
    """One cache for sequences ``0 .. sequences - 1``; the rotary embedding is Llama's plain one, its base 10000.

    Parameters
    ----------
    windows
        A layer each: tokens that its queries see at most, their own among them, as in models with windows of their own;
        ``None`` for all. TVM wants the first layer to be one of these, and has one size for the others.
    heads, kv_heads, head_dim
        Of the model.
    slides
        ``(window, sinks)``: what stays of each sequence after a step, the first ``sinks`` tokens counted; ``None`` for all.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        sequences: int = 1,
        slides: tuple[int, int] | None = None,
    ) -> None:
        import tvm

        self._tvm = tvm
        self._layers, self._scale = len(windows), head_dim**-0.5
        make = _compiled(tuple(windows), heads, kv_heads, head_dim)["create"]
        sizes = (sequences, _TOKENS, _CHUNK, _PAGE, int(slides is not None))
        self._cache = make(*(tvm.runtime.ShapeTuple([size]) for size in sizes))
        for sequence in range(sequences):
            self._call("kv_state_add_sequence", sequence)
            if slides is not None:
                self._call("attention_kv_cache_enable_sliding_window_for_seq", sequence, *slides)

    def step(self, fed: Mapping[int, int], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention ``[layers, T, heads, head_dim]`` of the next tokens of some sequences.

        Parameters
        ----------
        fed
            How many tokens each sequence brings, in the order in which they lie in the tensors.
        queries, keys, values
            Not rotated, ``[layers, T, heads or kv_heads, head_dim]``.
        """
        shape = self._tvm.runtime.ShapeTuple
        self._call("kv_state_begin_forward", shape(list(fed)), shape(list(fed.values())))
        out = []
        for layer in range(self._layers):
            together = torch.cat([queries[layer], keys[layer], values[layer]], dim=1).contiguous()
            mixed = self._tvm.runtime.tensor(np.zeros(queries[layer].shape, dtype=np.float32))
            given = self._tvm.runtime.tensor(together.numpy())
            self._call("attention_kv_cache_attention_with_fused_qkv", layer, self._scale, given, mixed)
            out.append(torch.from_numpy(mixed.numpy().copy()))
        self._call("kv_state_end_forward")
        return torch.stack(out)

    def _call(self, name: str, *arguments: Any) -> None:
        self._tvm.get_global_func(f"vm.builtin.{name}")(self._cache, *arguments)
