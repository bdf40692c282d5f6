"""Ways to serve the same requests that measuring scripts compare: prompts first, chunks, two streams, parted SMs.

An arm is typed as ``chunk512``, ``prompts-first``, ``streams`` or ``32:96`` (SMs of the decode lane, of the prompt lane), with
``/5`` behind it for prompts compressed by a factor of 5 (streaming_llm), ``/5/snapkv`` for another policy.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvsuite.compression import get_policy
from kvsuite.compression.base import Policy
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.green_contexts import open_partition
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.sm_split import PartitionRequest

STEP_TOKENS = 8192


@dataclass(frozen=True)
class Arm:
    """One way to serve.

    Parameters
    ----------
    name
        As typed.
    chunk
        Tokens of a step, decoding requests first and prompts in what is left; ``None``: prompts go first, whole.
    lanes
        1, or 2: prompts beside decoding.
    sms
        SMs of the decode lane and of the prompt lane; ``None`` for shared ones.
    method, factor
        What compresses prompts, and by how much; nothing by 1.
    """

    name: str
    chunk: int | None = None
    lanes: int = 1
    sms: tuple[int, int] | None = None
    method: str = "streaming_llm"
    factor: float = 1.0

    @classmethod
    def parse(cls, typed: str) -> Arm:
        kind, *compression = typed.split("/")
        found: dict[str, Any] = {"name": typed}
        if compression:
            found["factor"] = float(compression[0])
            found |= {"method": compression[1]} if len(compression) > 1 else {}
        if kind.startswith("chunk"):
            return cls(**found, chunk=int(kind.removeprefix("chunk")))
        if kind == "prompts-first":
            return cls(**found)
        if kind == "streams":
            return cls(**found, lanes=2)
        decode, prompt = map(int, kind.split(":"))
        return cls(**found, lanes=2, sms=(decode, prompt))

    def policy(self) -> Policy | None:
        return None if self.factor == 1 else get_policy(self.method, factor=self.factor)


@contextmanager
def opened(
    loaded: LoadedModel,
    arm: Arm,
    *,
    longest: int,
    sequences: int,
    blocks: int,
    sizes: Sequence[int] | None = None,
    prompt_layers: int | None = 4,
    **limits: Any,
) -> Iterator[Runtime]:
    """A runtime that serves this way. On a CPU without captured steps, and without parted SMs.

    Parameters
    ----------
    longest, sequences, blocks
        Limits of the runtime, others in ``limits``.
    sizes
        Batch sizes to capture.
    prompt_layers
        With two lanes, layers of a prompt between two looks at the decoding.
    """
    on_cuda = loaded.device.type == "cuda"
    with ExitStack() as stack:
        options: dict[str, Any] = {"policy": arm.policy(), "eos_token_ids": ()}
        if options["policy"] is not None:
            options["stage"] = "async"
        if arm.lanes == 2:
            options |= {"lanes": 2, "prompt_layers": prompt_layers}
            if arm.sms is not None and on_cuda:
                partition = open_partition(PartitionRequest(decode=arm.sms[0], prompt=arm.sms[1]), loaded.device)
                stack.callback(partition.close)
                options["partition"] = partition
        if on_cuda:
            from kvsuite.nanovllm.cuda_runner import cuda_runner

            options["runner"] = cuda_runner(build=True, sizes=sizes, prompts_apart=arm.lanes == 2)
        runtime = Runtime(
            loaded,
            Limits(
                max_model_len=longest, max_num_seqs=sequences, num_blocks=blocks, prefix_caching=False,
                max_num_batched_tokens=arm.chunk or STEP_TOKENS, prefill_first=arm.chunk is None, **limits,
            ),
            **options,
        )  # fmt: skip
        try:
            yield runtime
        finally:
            runtime.close()
            del runtime, options
            # captured steps hold cycles, and a pool is most of the memory
            gc.collect()
            if on_cuda:
                torch.cuda.empty_cache()


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Tokens that are no other seed's."""
    found: list[int] = torch.randint(
        3, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()  # fmt: skip
    return found
