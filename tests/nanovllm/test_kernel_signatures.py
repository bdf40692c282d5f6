"""What of a kernel's numbers Triton compiles for, without a device."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from kvsuite.nanovllm.attention_sums import _shifts_kernel, _sums_kernel
from kvsuite.nanovllm.eviction_kernel import _evict_kernel
from kvsuite.nanovllm.fill_kernel import _fill_rows_kernel
from kvsuite.nanovllm.gated_linear import _gated_linear_kernel
from kvsuite.nanovllm.gather_tokens import _gather_kernel, _gather_rows_kernel
from kvsuite.nanovllm.greedy_tokens import _greedy_kernel
from kvsuite.nanovllm.paged_norms import _key_norms_kernel
from kvsuite.nanovllm.split_attention import _longest_first_kernel
from kvsuite.nanovllm.window_weights import _mean_weights_kernel


def test_no_kernel_is_compiled_for_a_length_of_prompts() -> None:
    for kernel, numbers in (
        (_fill_rows_kernel, {"count", "width", "table_stride", "own_stride"}),
        (_gated_linear_kernel, {"rows"}),
        (_greedy_kernel, {"blocks"}),
        (_longest_first_kernel, {"count"}),
        (_gather_kernel, {"tokens"}),
        (_shifts_kernel, {"queries", "length"}),
        (_sums_kernel, {"queries", "length"}),
        (_gather_rows_kernel, {"rows"}),
        (_evict_kernel, {"length", "layer_slots", "stride", "sign", "protected"}),
        (_mean_weights_kernel, {"length", "window", "layer_slots"}),
        (_key_norms_kernel, {"tokens", "layer_slots"}),
    ):
        assert {each.name for each in kernel.params if each.do_not_specialize} == numbers
