"""A controller over two lanes on a CUDA device: lanes move between real partitions, and no token changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("partitions need a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from decoders import fresh, greedy, prompts  # noqa: E402
from serving import assert_nothing_lost  # noqa: E402

from kvsuite.compression import get_policy  # noqa: E402
from kvsuite.errors import CaseSkipped  # noqa: E402
from kvsuite.nanovllm import cuda_driver  # noqa: E402
from kvsuite.nanovllm.controller import ControllerSettings, ratios  # noqa: E402
from kvsuite.nanovllm.cuda_runner import cuda_runner  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.partition_ladder import PartitionLadder  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402
from kvsuite.nanovllm.steering import Controller  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
LENGTHS = (48, 40, 56, 33, 64, 50, 37, 61) * 2
LIMITS: dict[str, Any] = {
    "max_model_len": 96, "max_num_seqs": 2, "max_num_batched_tokens": 64, "num_blocks": 64, "block_size": 4,
    "prefix_caching": False,
}  # fmt: skip
SETTINGS = ControllerSettings(
    method="streaming_llm", factor=2, layers=3, kv_heads=2, head_dim=16, weight_bytes=10**6, token_bytes=768, bandwidth=4e12,
    min_seq_len=32, min_output_len=8, force=True,
)  # fmt: skip


@pytest.fixture
def ladder():
    try:
        opened = PartitionLadder(DEVICE)
    except CaseSkipped as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def served(**options):
    of = fresh("llama")
    of = replace(of, model=of.model.to(DEVICE), device=DEVICE)
    runtime = Runtime(
        of,
        Limits(**LIMITS),
        policy=get_policy("streaming_llm", factor=2),
        stage="async",
        runner=cuda_runner(sizes=[1, 2]),
        **options,
    )
    try:
        assert runtime.runner.facts["decode_step"] == "cuda_graph"
        requests = runtime.run(greedy(prompt, 24) for prompt in prompts(LENGTHS))
        return [request.output for request in requests], runtime
    finally:
        runtime.close()
        assert_nothing_lost(runtime)


class Moving(Controller):
    """One whose shares go up and down, whatever the clocks say: compression is always too slow, then always too fast."""

    def prompts(self, **step):
        self.prefill.mean, self.compress.mean = 1.0, 0.9 if len(self.log) < 5 else 0.36
        return super().prompts(**step)


def test_lanes_move_between_real_partitions_and_no_token_changes(ladder):
    alone, _ = served()
    controller = Moving(SETTINGS)
    found, _ = served(lanes=2, controller=controller, partitions=ladder.by_ratio)
    assert found == alone
    entries = [entry for entry in controller.log if "decision" in entry]
    shares = [entry["decision"]["sm_compress_ratio"] for entry in entries]
    assert len(set(shares)) > 2
    for entry in entries:
        partition = ladder.by_ratio[entry["decision"]["sm_compress_ratio"]]
        assert entry["applied"]["partition"] == {
            "decode_sms": partition.decode_sms,
            "prompt_sms": partition.prompt_sms,
        }


def test_the_ladder_is_what_the_driver_says(ladder):
    assert list(ladder.by_ratio) == ratios()
    for partition in ladder.by_ratio.values():
        assert cuda_driver.sms_of(partition.decode_stream.cuda_stream) == partition.decode_sms
        assert cuda_driver.sms_of(partition.prompt_stream.cuda_stream) == partition.prompt_sms


def test_meters_read_the_device():
    controller = Controller(replace(SETTINGS, greenctx=False))
    served(lanes=2, controller=controller)
    assert controller.decode.samples
    assert controller.decode.mean
    assert controller.prefill.samples
    assert controller.compress.samples
