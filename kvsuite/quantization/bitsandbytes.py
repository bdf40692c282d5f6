"""``4bit`` (nf4, double quantisation) and ``8bit`` by bitsandbytes' own modules."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvsuite.errors import CaseSkipped

from .targets import Target, replace_module

NAMES = ("4bit", "8bit")
INSTALL = 'pip install "kvsuite[quantization]"'
_DEVICES = ("cpu", "cuda")
_BLOCK = 64
_OUTER_BLOCK = 256
_NF4_LEVELS, _DYNAMIC_LEVELS = 16, 256


def unavailable(name: str, device: str) -> str | None:
    """Why ``4bit`` or ``8bit`` cannot run on ``device``, ``None`` if it can. Imports nothing."""
    kind = device.partition(":")[0]
    if kind not in _DEVICES:
        return f"{name} by bitsandbytes runs on {' and '.join(_DEVICES)}, not on {device}"
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"{name} needs bitsandbytes, which is not installed; run: {INSTALL}"
    return None


def bitsandbytes_config(name: str, compute_dtype: torch.dtype) -> Any:
    """transformers' ``BitsAndBytesConfig`` of ``4bit`` or ``8bit``, for `from_pretrained`; needs bitsandbytes."""
    from transformers import BitsAndBytesConfig

    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def convert_bitsandbytes(model: Any, name: str, targets: list[Target], device: torch.device) -> None:
    """Replace the linear modules of ``targets`` in place, one at a time, with the parameters of `bitsandbytes_config`.

    Works for any loaded model, random weights included. Other parameters keep their dtype, which is the compute dtype.

    Raises
    ------
    CaseSkipped
        If bitsandbytes is missing or does not run on the device.
    """
    if reason := unavailable(name, str(device)):
        raise CaseSkipped(reason)
    bnb = importlib.import_module("bitsandbytes")
    # the int8 product logs a line a call for activations that are not float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for target in targets:
        old = model.get_submodule(target.path)
        new = (_linear_4bit if name == "4bit" else _linear_8bit)(bnb.nn, old)
        if old.bias is not None:
            new.bias = old.bias
        replace_module(model, target.path, new.to(device).eval())
        del old


def _linear_4bit(bnb_nn: Any, old: nn.Linear) -> Any:
    config = bitsandbytes_config("4bit", old.weight.dtype)
    new = bnb_nn.Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=config.bnb_4bit_compute_dtype,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        device="meta",
    )
    new.weight = bnb_nn.Params4bit(
        old.weight.detach(),
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        blocksize=_BLOCK,
        module=new,
    )
    # on CPUs with bfloat16 products the first forward would lay the weight out anew, in other bytes and another dtype than
    # the record says, and fail for shapes that are no multiple of its tile
    new.support_avx512bf16_for_cpu = False
    return new


def _linear_8bit(bnb_nn: Any, old: nn.Linear) -> Any:
    config = bitsandbytes_config("8bit", old.weight.dtype)
    new = bnb_nn.Linear8bitLt(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        has_fp16_weights=config.llm_int8_has_fp16_weight,
        threshold=config.llm_int8_threshold,
        device="meta",
    )
    # it quantises on the way from the CPU to the device, and only then
    new.weight = bnb_nn.Int8Params(
        old.weight.detach().cpu(), requires_grad=False, has_fp16_weights=config.llm_int8_has_fp16_weight
    )
    return new


def quantization_state(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that bitsandbytes keeps beside a module's parameters: block maxima, codes, row scales."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor))
        state = getattr(state, "state2", None)
    for holder in (weight, getattr(module, "state", None)):
        if isinstance(row_scales := getattr(holder, "SCB", None), Tensor):
            yield row_scales


def linear_bytes(name: str, rows: int, columns: int) -> int:
    """Closed form of one converted ``rows x columns`` weight.

    4bit: half a byte a value, a byte for the maximum of 64 values, a float32 for 256 of those, and per matrix the 16 float32
    levels, the 256 of the maxima and an offset. 8bit: a byte a value and a float32 a row.
    """
    if name == "8bit":
        return rows * columns + 4 * rows
    values = rows * columns
    blocks = -(-values // _BLOCK)
    return -(-values // 2) + blocks + 4 * -(-blocks // _OUTER_BLOCK) + 4 * (_NF4_LEVELS + _DYNAMIC_LEVELS + 1)
