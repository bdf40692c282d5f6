"""The runtime behind a `nano` session: one at a time, made for the work at hand, and said what it really is."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.compression.base import Policy
from kvsuite.engines.nano.memory_model import (
    LIBRARY_WORKSPACE,
    PromptKernel,
    activation_bytes,
    attention_workspace,
    gathered_blocks,
    prompt_blocks,
    unpacked_bytes,
)
from kvsuite.engines.rotary import Rotary
from kvsuite.engines.window_batches import feed_forward_width
from kvsuite.errors import CaseInvalid
from kvsuite.kernel_builds import BUILDS, mend_line
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.attention_layers import without_positions
from kvsuite.nanovllm.green_contexts import SmPartition
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime, Stage
from kvsuite.nanovllm.steering import Controller
from kvsuite.quantization.packed import PackedWeight

BLOCK_SIZE = 16
# a step's tokens at most: prompts longer than this are fed in chunks
_STEP_TOKENS = {"cpu": 2048}
_STEP_TOKENS_ELSEWHERE = 8192


class RuntimeHolder:
    """Makes runtimes on one loaded model; the last one stays until another is needed.

    Parameters
    ----------
    loaded
        The model.
    decode_step
        ``eager``, ``graph``, or ``auto``: captured where the runner can.
    """

    def __init__(self, loaded: LoadedModel, decode_step: str) -> None:
        self._loaded = loaded
        self._decode_step = decode_step
        self._rotary: Rotary | None = None
        self._held: tuple[tuple[Any, ...], Runtime] | None = None
        #: how the prepared case stores keys and values, ``None`` for the model's own dtype
        self.cache_format: OwnFormat | None = None

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step."""
        return _STEP_TOKENS.get(self._loaded.device.type, _STEP_TOKENS_ELSEWHERE)

    def limits(self, longest: int, *, sequences: int = 1, step_tokens: int | None = None, full: bool = False) -> Limits:
        """Limits with a pool that holds ``sequences`` requests of ``longest`` tokens at the same time, and no more.

        Prefixes are not shared: every prompt of the suites is to be computed. ``full`` is in the model's dtype, whatever the
        case's format.
        """
        blocks = -(-longest // BLOCK_SIZE)
        return Limits(
            max_model_len=longest,
            max_num_seqs=sequences,
            max_num_batched_tokens=max(step_tokens or self.step_tokens, sequences),
            block_size=BLOCK_SIZE,
            num_blocks=sequences * blocks,
            prefix_caching=False,
            cache_format=None if full else self.cache_format,
        )

    def get(
        self,
        limits: Limits,
        policy: Policy | None,
        *,
        captures: bool,
        stage: Stage = "sync",
        lanes: int = 1,
        partition: SmPartition | None = None,
        controller: Controller | None = None,
        partitions: Mapping[float, SmPartition] | None = None,
        layers_per_step: int | None = None,
    ) -> Runtime:
        """A runtime with these limits and this very policy, with nothing to do.

        Parameters
        ----------
        limits, policy, stage, lanes, partition, controller, partitions, layers_per_step
            As for `Runtime`.
        captures
            Whether capturing decode steps is worth its time.

        Raises
        ------
        CaseInvalid
            If the model, or the policy on it, is nothing for paged attention, or ``--kv-decode-step=graph`` cannot be.
        UserError
            If the device has no room for the pool.
        """
        key = (limits, policy, captures, stage, lanes, id(partition), controller, layers_per_step)
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        self.drop()
        streams: dict[str, Any] = {"stage": stage, "lanes": lanes, "partition": partition}
        streams |= {"controller": controller, "partitions": partitions, "layers_per_step": layers_per_step}
        runtime = self._make(limits, policy, captures, streams)
        self._held = (key, runtime)
        return runtime

    def drop(self) -> None:
        """Give the pool back."""
        if self._held is None:
            return
        self._held[1].close()
        self._held = None
        if self._loaded.device.type == "cuda":
            # captured steps and FlashInfer's wrappers hold cycles, and a pool is most of the memory
            gc.collect()

    def state(self, runtime: Runtime, effective: dict[str, Any]) -> None:
        """Write a runtime's facts over those of another one, which may have had a reason that this one has not."""
        for name in (
            "decode_step_reason",
            "prompt_sizes",
            "prompt_step_reason",
            "stage",
            "stepwise",
            "lanes",
            "kv_cache_dtype",
            "layers_per_step",
            "merged_after",
        ):
            effective.pop(name, None)
        effective |= self.facts(runtime)

    def facts(self, runtime: Runtime) -> dict[str, Any]:
        """What a runtime really applies, in JSON types."""
        limits = runtime.limits
        done = dict(runtime.runner.facts)
        step, _, reason = str(done.pop("decode_step")).partition(" (")
        step = step.replace(" ", "_")
        found = done | {
            "decode_step": step,
            "block_size": limits.block_size,
            "num_blocks": runtime.num_blocks,
            "max_model_len": limits.max_model_len,
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "prefix_caching": limits.prefix_caching,
            "layer_groups": [list(group.layers) for group in runtime.groups],
            "overlap": runtime.overlap,
        }
        if limits.cache_format is not None:
            found["kv_cache_dtype"] = str(limits.cache_format)
        if runtime.lanes > 1:
            found["lanes"] = runtime.lanes
        if runtime.policy is not None:
            found |= {"stage": runtime.stage, "stepwise": runtime.policy.acts == "decode"}
            if runtime.controller is None and (layers := runtime.compression.layers_per_step) is not None:
                found |= {"layers_per_step": layers, "merged_after": runtime.compression.steps_of_all_layers}
        if step != "cuda_graph" and reason:
            found.setdefault("decode_step_reason", reason.removesuffix(")"))
        return found

    def _make(self, limits: Limits, policy: Policy | None, captures: bool, streams: dict[str, Any]) -> Runtime:
        rotation = None
        turns = policy is not None and (policy.positions == "cache" or policy.needs.query_statistics is not None)
        if turns and not without_positions(self._loaded.text_config):
            # made while the model has its own attention
            rotation = self._rotary = self._rotary or Rotary(self._loaded.model)
        options: dict[str, Any] = {"policy": policy, "rotation": rotation, "eos_token_ids": (), **streams}
        if policy is not None and policy.acts == "decode":
            # what it does to a sequence comes between two of its tokens
            options["overlap"] = False
        if self._loaded.device.type == "cuda":
            from kvsuite.nanovllm.cuda_runner import cuda_runner

            graphs = captures and self._decode_step != "eager"
            # a lane of prompts has a stream of its own, and launches them as they come
            options["runner"] = cuda_runner(
                rotation=rotation, graphs=graphs, prompts_apart=streams["lanes"] == 2, tune=graphs
            )
        runtime = Runtime(self._loaded, limits, **options)
        if missing := runtime.runner.facts.get("kernels", "").partition("not prepared: ")[2].partition(";")[0]:
            loaded = self._loaded
            dtype = str(loaded.dtype).removeprefix("torch.")
            mend = mend_line(missing, loaded.spec.request, str(loaded.device), dtype)
            BUILDS.once(f"nano runs without kernels that would be faster ({missing}); to have them: {mend}")
        if captures and self._decode_step == "graph":
            facts = self.facts(runtime)
            if facts["decode_step"] != "cuda_graph":
                runtime.close()
                reason = facts.get("decode_step_reason") or "CUDA graphs need a CUDA device"
                raise CaseInvalid(f"--kv-decode-step=graph: {reason}; use auto or eager")
        return runtime


def workspace_bytes(loaded: LoadedModel, limits: Limits, groups: Sequence[LayerGroup], prompts: PromptKernel) -> int:
    """Predicted bytes of a step's activations and logits; on CUDA of cuBLAS, FlashInfer and prompts unpacked for it.

    Torch's attention and FlashInfer's ``fa3`` have keys and values that prompts see gathered, layer by layer. As
    `kvsuite.engines.nano.memory_model.NanoMemory` predicts them.
    """
    config = loaded.text_config
    hidden = int(config.hidden_size)
    attention = attention_workspace(
        device=loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."),
        head_dim=int(getattr(config, "head_dim", None) or hidden // int(config.num_attention_heads)),
    )
    wide = feed_forward_width(config)
    tokens = min(limits.max_num_batched_tokens, limits.max_num_seqs * limits.max_model_len)
    element = loaded.dtype.itemsize
    logits = limits.max_num_seqs * int(config.vocab_size) * (element + torch.float32.itemsize)
    packed = loaded.device.type == "cuda" and any(isinstance(module, PackedWeight) for module in loaded.model.modules())
    activations = activation_bytes(
        tokens=tokens, hidden=hidden, intermediate=wide, element_bytes=element, unpacks=packed
    )
    products = LIBRARY_WORKSPACE if loaded.device.type == "cuda" else 0
    blocks = prompt_blocks(
        prompt=limits.max_model_len, sequences=limits.max_num_seqs, chunk=limits.max_num_batched_tokens
    )
    seen = [group for group in groups if group.window is None]
    if not attention or not seen:
        return activations + logits + products
    gathered = gathered_blocks(prompts, blocks, limits.max_num_batched_tokens)

    def most(count: int, chosen: Sequence[LayerGroup]) -> int:
        sizes = [
            unpacked_bytes(count, kv_heads=group.kv_heads, head_dim=group.head_dim, element_bytes=element)
            for group in chosen
        ]
        return max(sizes, default=0)

    unpacked = most(blocks, [group for group in seen if group.format is not None])
    return activations + logits + products + attention * (prompts != "torch") + most(gathered, seen) + unpacked


def pool_bytes(runtime: Runtime, element_bytes: int) -> int:
    """Predicted bytes of the pools: ``(blocks + 1 for scratch) * block_size`` tokens of every layer, in the case's format."""
    tokens = (runtime.num_blocks + 1) * runtime.limits.block_size
    return sum(group.token_bytes(element_bytes) * tokens for group in runtime.groups)
