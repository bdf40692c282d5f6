"""What of a kernel's numbers Triton compiles for, without a device."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from kvsuite.nanovllm.attention_sums import _shifts_kernel, _sums_kernel
from kvsuite.nanovllm.gather_tokens import _gather_kernel, _gather_rows_kernel
from kvsuite.nanovllm.note_kernels import _least_kernel, _move_kernel, _note_kernel
from kvsuite.nanovllm.paged_norms import _key_norms_kernel
from kvsuite.nanovllm.window_weights import _mean_weights_kernel


def test_no_kernel_is_compiled_for_a_length_of_prompts() -> None:
    for kernel, numbers in (
        (_gather_kernel, {"tokens"}),
        (_shifts_kernel, {"queries", "length"}),
        (_sums_kernel, {"queries", "length"}),
        (_gather_rows_kernel, {"rows"}),
        (_note_kernel, {"tokens", "layer_slots"}),
        (_least_kernel, {"length", "layer_slots", "blocks_stride", "protected"}),
        (_move_kernel, {"layer_slots", "blocks_stride"}),
        (_mean_weights_kernel, {"length", "window", "layer_slots"}),
        (_key_norms_kernel, {"tokens", "layer_slots"}),
    ):
        assert {each.name for each in kernel.params if each.do_not_specialize} == numbers


def test_no_kernel_is_compiled_for_where_a_table_begins_in_an_upload() -> None:
    for kernel, tables in (
        (_note_kernel, {"slots", "positions"}),
        (_least_kernel, {"blocks", "seen"}),
        (_move_kernel, {"blocks", "last", "chosen"}),
    ):
        assert {each.name for each in kernel.params if each.do_not_specialize_on_alignment} == tables
