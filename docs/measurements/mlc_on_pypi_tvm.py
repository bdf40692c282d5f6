"""Fit the source of MLC-LLM (July 2026) to the apache-tvm 0.26.0 of PyPI: what docs/mlc.md, "On CUDA", was measured with.

    python docs/measurements/mlc_on_pypi_tvm.py /path/of/mlc-llm          # a checkout, or what it has under python/mlc_llm

Five places follow a newer TVM, and a pass keeps its scheduler from the tensor cores, since with them ``mlc_llm compile`` of
``q0f16`` ends with a segmentation fault. Every replacement has to be found, or nothing is written. Made for
commit 79d603f0 of 23 July 2026.

The library beside it was built of ``cpp/**/*.cc`` and xgrammar's sources (without its Python binding) by g++ -std=c++17 against
the headers of TVM and of the wheel's ``tvm_ffi``, linked to the wheel's ``libtvm_runtime`` and ``libtvm_ffi``, in 20 minutes of
two busy cores; a tokenizer that knows bytes and words stood in for tokenizers-cpp, whose Rust packages could not be fetched.
Libraries of models need no card: ``mlc_llm compile --device '{"kind":"cuda","arch":"sm_90",...}'`` wants nvcc alone, which
PyPI has as well (nvidia-cuda-nvcc).
"""

from __future__ import annotations

import argparse
from pathlib import Path

_NAMES = ("func.params[num_input]", "receive_var", "stage_binding.var", "binding.var", "required_param")
_NO_TENSOR_CORES = '''@tvm.transform.module_pass(opt_level=0, name="NoTensorCores")
class _NoTensorCores:
    """Keeps the scheduler from tensor cores."""

    def transform_module(self, mod: IRModule, _ctx: tvm.transform.PassContext) -> IRModule:
        for g_var, func in mod.functions_items():
            if isinstance(func, tvm.tirx.PrimFunc):
                mod.update_func(g_var, func.with_attr("dlight.do_not_tensorize", 1))
        return mod


@register_pipeline("mlc_llm")'''
#: by file of python/mlc_llm/compiler_pass: what is there, and what takes its place, wherever it stands
CHANGES: dict[str, tuple[tuple[str, str], ...]] = {
    "low_batch_specialization.py": (
        (
            "buffers = func.buffer_map.values()",
            "buffers = [param for param in func.params if tirx.buffer.is_buffer_var(param)]",
        ),
    ),
    "scatter_tuple_get_item.py": (("var.name_hint", "var.name"),),
    "pipeline_parallel_rewrite.py": tuple((f"{name}.name_hint", f"{name}.name") for name in _NAMES),
    "fuse_dequantize_transpose.py": (
        (
            "        new_func_buffers = [\n"
            "            dequantize_tir_func.buffer_map[var] for var in dequantize_tir_func.params\n"
            "        ]\n",
            "        new_func_buffers = list(dequantize_tir_func.params)\n",
        ),
    ),
    "lift_global_buffer_alloc.py": (
        ("    buffer_map = dict(func.buffer_map)\n", ""),
        (
            "isinstance(params[insertion_point - 1].ty, tvm.ir.PointerType)",
            "tirx.buffer.is_buffer_var(params[insertion_point - 1])",
        ),
        (
            '            param = tirx.Var("var_" + buf_alloc.name, "handle")\n'
            "            params.insert(insertion_point, param)\n",
            "            params.insert(insertion_point, buf_alloc)\n",
        ),
        ("            buffer_map[param] = buf_alloc\n", ""),
        ("        buffer_map=buffer_map,\n", ""),
        (
            "        buffer_shape = func.buffer_map[func.params[i]].shape\n",
            "        if not tirx.buffer.is_buffer_var(func.params[i]):\n"
            "            continue\n"
            "        buffer_shape = func.params[i].shape\n",
        ),
        ("func.buffer_map[func.params[n_arg + i]].shape", "func.params[n_arg + i].shape"),
    ),
    "attach_sampler.py": (
        ("def full(var_result: T.handle, value: T.int32):", "def full(value: T.int64, var_result: T.handle):"),
        ("            result[vi, 0] = value\n", '            result[vi, 0] = T.Cast("int32", value)\n'),
    ),
    "pipeline.py": (
        (
            "                LowBatchGemvSpecialize(),\n",
            "                _NoTensorCores(),\n                LowBatchGemvSpecialize(),\n",
        ),
        ('@register_pipeline("mlc_llm")', _NO_TENSOR_CORES),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    source: Path = parser.parse_args().source
    found = next(source.glob("**/mlc_llm/compiler_pass"), source / "compiler_pass")
    if not found.is_dir():
        parser.error(f"{source}: no mlc_llm/compiler_pass in it")
    written = {}
    for name, changes in CHANGES.items():
        text = (found / name).read_text(encoding="utf-8")
        for old, new in changes:
            if old not in text:
                parser.error(
                    f"{found / name}: {old.strip().splitlines()[0]!r} is not in it: another MLC-LLM, or one changed already"
                )
            text = text.replace(old, new)
        written[found / name] = text
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    print(f"{found}: {len(written)} files")


if __name__ == "__main__":
    main()
