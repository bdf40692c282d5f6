"""Requests with images on a CUDA device: fused prompts take features, captured decode steps go on as they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("the runtime on CUDA needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

import numpy as np  # noqa: E402
from decoders import fresh, greedy  # noqa: E402
from image_prompts import MIXED, image, prompt  # noqa: E402
from serving import LogitsByRequest, assert_nothing_lost  # noqa: E402

from kvsuite.models.image_reader import ImageReader  # noqa: E402
from kvsuite.nanovllm.cuda_runner import cuda_runner  # noqa: E402
from kvsuite.nanovllm.limits import Limits  # noqa: E402
from kvsuite.nanovllm.runtime import Runtime  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
NEW = 16
SMALL: dict[str, Any] = {
    "max_model_len": 64, "max_num_seqs": 6, "max_num_batched_tokens": 7, "num_blocks": 13, "block_size": 4,
    "admission": "optimistic",
}  # fmt: skip


def _on_cuda(dtype):
    of = fresh("llava")
    return replace(of, model=of.model.to(DEVICE, dtype), device=DEVICE, dtype=dtype)


def _given(images):
    return {"pixel_values": torch.from_numpy(np.stack([one.pixels for one in images])).to(DEVICE)} if images else {}


def _generated(of, tokens, images):
    ids = torch.tensor([list(tokens)], device=DEVICE)
    out = of.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None,
        **_given(images),
    )  # fmt: skip
    return out[0, len(tokens) :].tolist()


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("prefill_first", [False, True])
def test_float32_output_equals_generate(prefill_first, lanes):
    """Steps of 7 tokens cut images, one token of which may come alone; 13 blocks preempt."""
    if lanes == 2 and prefill_first:
        pytest.skip("two lanes have one order")
    of = _on_cuda(torch.float32)
    expected = [_generated(of, *one) for one in MIXED]
    runtime = Runtime(
        of, Limits(**SMALL | {"prefill_first": prefill_first}), runner=cuda_runner(sizes=[1, 2, 6]), lanes=lanes
    )
    assert runtime.runner.facts["decode_step"] == "cuda_graph", runtime.runner.facts
    assert runtime.runner.facts["fused"], runtime.runner.facts
    requests = runtime.run([greedy(tokens, NEW, images=images) for tokens, images in MIXED])
    assert runtime.counters.preemptions > 0
    runtime.close()
    assert_nothing_lost(runtime)
    assert [request.output for request in requests] == expected


def test_a_last_token_of_an_image_alone_takes_no_captured_step():
    """A step of one token that is an image's looks like a decode step, and its graph would embed the token."""
    of = _on_cuda(torch.float32)
    tokens, images = prompt(5, image(1))
    expected = _generated(of, tokens, images)
    # the budget leaves the image's last token for a step of its own
    limits = Limits(**SMALL | {"max_num_batched_tokens": len(tokens) - 1, "max_num_seqs": 1, "num_blocks": 16})
    runtime = Runtime(of, limits, runner=cuda_runner(sizes=[1]))
    [request] = runtime.run([greedy(tokens, NEW, images=images)])
    runtime.close()
    assert request.output == expected


def test_bfloat16_logits_of_captured_steps_and_fused_layers():
    of = _on_cuda(torch.bfloat16)
    texts, wanted = [(tokens, images, _generated(of, tokens, images)) for tokens, images in MIXED], []
    # before the runtime takes the model's attention
    for tokens, images, output in texts:
        with torch.inference_mode():
            ids = torch.tensor([[*tokens, *output]], device=DEVICE)
            whole = of.model(input_ids=ids, use_cache=False, **_given(images)).logits
        wanted.append(whole[0, len(tokens) - 1 : -1].float())
    limits = Limits(**SMALL | {"max_num_batched_tokens": 64, "num_blocks": 64, "block_size": 16})
    runtime = Runtime(of, limits, runner=cuda_runner(sizes=[1, 2, 6]))
    seen = LogitsByRequest(runtime)
    requests = runtime.run([greedy(tokens, NEW, images=images, forced=output) for tokens, images, output in texts])
    runtime.close()
    for request, whole in zip(requests, wanted, strict=True):
        found = seen.of(request)
        assert (found - whole).norm() < 3e-2 * whole.norm()


def test_features_on_the_device_are_those_of_the_host():
    host, device = fresh("llava"), _on_cuda(torch.float32)
    ours = ImageReader(device.model).features(image(1))
    assert ours.device.type == "cuda"
    torch.testing.assert_close(ours.cpu(), ImageReader(host.model).features(image(1)), atol=1e-4, rtol=1e-3)
