"""What a step hands to the model, and that making it does not get dearer with the context."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType

import torch
from decoders import greedy, loaded, text
from serving import serving

from kvsuite.nanovllm.batch import StepBatch
from kvsuite.nanovllm.runtime import Runtime


def batches(runtime: Runtime) -> list[dict[str, object]]:
    """Run to the end; the numbers of every step, copied, since buffers are reused."""
    found: list[dict[str, object]] = []
    run = runtime.runner.run

    def note(batch: StepBatch) -> torch.Tensor:
        found.append(
            {
                "ids": batch.ids.tolist(), "positions": batch.positions.tolist(), "slots": batch.slots.tolist(),
                "query_start": batch.query_start.tolist(), "kv_lengths": batch.kv_lengths.tolist(),
                "tables": batch.block_tables.tolist(), "rows": batch.sample_rows.tolist(),
                "decode_only": batch.decode_only, "host": batch.block_tables_host.tolist(),
                "types": {t.dtype for t in (batch.query_start, batch.kv_lengths, batch.block_tables)},
                "where": batch.slots.data_ptr(),
            }
        )  # fmt: skip
        return run(batch)

    runtime.runner.run = note  # type: ignore[method-assign]
    runtime.run()
    return found


def test_the_numbers_of_every_step() -> None:
    long, short = text(11), text(3, seed=1)
    with serving(loaded("llama"), block_size=4, max_num_batched_tokens=10) as runtime:
        first, second = runtime.add(greedy(long, 3)), runtime.add(greedy(short, 3))
        steps = batches(runtime)
    # a chunk of the first; its last token and the second; the first waits for nobody
    assert steps[0] == {
        "ids": long[:10], "positions": [*range(10)], "slots": [*range(4, 14)], "query_start": [0, 10],
        "kv_lengths": [10], "tables": [[1, 2, 3]], "rows": [], "decode_only": False, "host": [[1, 2, 3]],
        "types": {torch.int32}, "where": steps[0]["where"],
    }  # fmt: skip
    assert steps[1] | {"where": 0} == {
        "ids": [long[10], *short], "positions": [10, 0, 1, 2], "slots": [14, 16, 17, 18], "query_start": [0, 1, 4],
        "kv_lengths": [11, 3], "tables": [[1, 2, 3], [4, 0, 0]], "rows": [0, 3], "decode_only": False,
        "host": [[1, 2, 3], [4, 0, 0]], "types": {torch.int32}, "where": 0,
    }  # fmt: skip
    assert steps[2] | {"where": 0} == {
        "ids": [first.output[0], second.output[0]], "positions": [11, 3], "slots": [15, 19], "query_start": [0, 1, 2],
        "kv_lengths": [12, 4], "tables": [[1, 2, 3], [4, 0, 0]], "rows": [0, 1], "decode_only": True,
        "host": [[1, 2, 3], [4, 0, 0]], "types": {torch.int32}, "where": 0,
    }  # fmt: skip
    assert steps[3]["tables"] == [[1, 2, 3, 5], [4, 6, 0, 0]]
    assert len(steps) == 4


def test_steps_of_equal_shape_use_the_same_tensors() -> None:
    with serving(loaded("llama"), block_size=16) as runtime:
        runtime.add(greedy(text(17), 10))
        steps = batches(runtime)
    assert len({step["where"] for step in steps[1:]}) == 1
    assert [step["positions"] for step in steps[1:]] == [[17 + i] for i in range(9)]


def test_work_on_the_host_does_not_grow_with_the_context() -> None:
    """Python calls of a decode step outside of the model, counted: the same after 20 tokens as after 200."""

    def calls(length: int) -> Counter[str]:
        counted: Counter[str] = Counter()

        def count(frame: FrameType, event: str, argument: object) -> None:
            if "nanovllm" in frame.f_code.co_filename and event in ("call", "c_call"):
                counted[frame.f_code.co_name] += 1

        with serving(loaded("llama"), max_model_len=256, num_blocks=64, max_num_batched_tokens=900) as runtime:
            for seed in range(4):
                runtime.add(greedy(text(length, seed=seed), 24))
            runtime.step()
            runtime.step()
            sys.setprofile(count)
            try:
                # a whole block's worth: every sequence fills one
                for _ in range(16):
                    runtime.step()
            finally:
                sys.setprofile(None)
        return counted

    assert calls(20) == calls(196)
