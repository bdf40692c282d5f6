"""Kernels of engine nano, built ahead for one model on one device: FlashInfer's libraries, Triton's kernels, tried tilings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from kvsuite.errors import CaseInvalid, UserError
from kvsuite.kernel_builds import BUILDS
from kvsuite.options.devices import resolve_device

from .findings import Finding

# a step of more rows is bound by arithmetic, and has torch's products
_SEQUENCES = 128
_LONGEST = 4096
_BLOCK = 16
_PROMPT = 40


def prepare(model: str, device: str, dtype: str, *, say: Callable[[str], None]) -> dict[str, list[Finding]]:
    """Build what runs of ``model`` on engine nano would go without; what is there already is left alone.

    Parameters
    ----------
    model, device, dtype
        As for ``--kv-model``, ``--kv-device`` and ``--kv-dtype``. The device is one of CUDA.
    say
        Told what is going on.

    Returns
    -------
    dict
        Findings by title.

    Raises
    ------
    UserError
        If there is no CUDA device, or no such model.
    """
    device = resolve_device(device)
    if not device.startswith("cuda"):
        raise UserError(
            f"--prepare: builds kernels for CUDA, and --kv-device={device} needs none of them; give --kv-device=cuda:0, say"
        )
    from kvsuite.models.load import load_model
    from kvsuite.models.resolve import resolve_model
    from kvsuite.nanovllm.cuda_runner import cuda_runner
    from kvsuite.nanovllm.limits import Limits
    from kvsuite.nanovllm.request import Request
    from kvsuite.nanovllm.runtime import Runtime
    from kvsuite.nanovllm.sampling import SamplingParameters

    began, before = time.perf_counter(), len(BUILDS.done)
    say(f"loading {model}")
    loaded = load_model(resolve_model(model), device=device, dtype=dtype)
    trained = loaded.trained_length or _LONGEST
    longest = max(_PROMPT + 2, min(_LONGEST, trained))
    limits = Limits(
        max_model_len=longest,
        max_num_seqs=_SEQUENCES,
        block_size=_BLOCK,
        num_blocks=max(_SEQUENCES, -(-longest // _BLOCK)),
        admission="optimistic",
    )
    say("building kernels, and trying tilings of products")
    title = f"Kernels of engine nano for {model} on {device}"
    with BUILDS.telling(say):
        try:
            runtime = Runtime(loaded, limits, runner=cuda_runner(build=True))
        except CaseInvalid as error:
            return {title: [Finding("paged attention", "missing", str(error), "use another engine for this model")]}
        try:
            # what is there is used once, so that it is known to work
            for temperature in (0.0, 1.0):
                chosen = SamplingParameters(max_new_tokens=2, temperature=temperature, ignore_eos=True)
                runtime.run([Request(list(range(1, _PROMPT + 1)), chosen)])
            facts = dict(runtime.runner.facts)
        finally:
            runtime.close()
    built = Counter(one.by for one in BUILDS.done[before:])
    words = ", ".join(f"{count} by {name}" for name, count in sorted(built.items())) or "nothing was missing"
    missing = str(facts.get("kernels", "")).partition("not prepared: ")[2]
    mend = "python -m kvsuite doctor says what FlashInfer lacks here" if "flashinfer" in missing else None
    return {
        title: [
            Finding("attention", "ok", f"{facts['attention']}; decode steps {_decode(facts)}"),
            Finding("products", "ok", f"tilings of {tried} products" if (tried := _tried(facts)) else "torch's"),
            Finding("built now", "ok", f"{words}, in {time.perf_counter() - began:.0f} s with loading the model"),
            *([Finding("not built", "attention", missing, mend)] if missing else []),
        ]
    }


def _decode(facts: dict[str, object]) -> str:
    kinds = facts.get("decode_attention")
    if not isinstance(kinds, dict):
        return str(facts["decode_step"])
    return " and ".join(dict.fromkeys(str(kind) for kind in kinds.values()))


def _tried(facts: dict[str, object]) -> int:
    """Products at numbers of rows for which tilings were tried."""
    products = facts.get("products")
    return sum("<=" in name for name in products) if isinstance(products, dict) else 0
