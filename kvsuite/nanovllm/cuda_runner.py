"""The runner of a runtime on CUDA: captured decode steps, fused layers, attention kernels; and what was chosen, and why.

Which kernels run is settled at the start, by what is there: FlashInfer's libraries, tilings that were tried on this machine.
What takes a compiler minutes is built where that is asked for (``build``), which ``doctor --prepare`` does ahead; what Triton
compiles in seconds is compiled at the start, side by side. Nothing is replaced in silence: `CudaRunner.facts` says what
attends, what is fused and captured, and why not.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from kvsuite.errors import CaseInvalid, UserError
from kvsuite.kernel_builds import BUILDS
from kvsuite.models.load import LoadedModel

from .batch import StepBatch
from .captured_layers import CapturedLayers, layer_sizes
from .compile_ahead import compiling_ahead
from .decode_graphs import CapturableAttention, DecodeGraphs, default_sizes
from .dry_steps import DrySteps
from .flashinfer_libraries import HEAD_DIMS, libraries_for, takes_flashinfer
from .fused_layers import FusedDecoder, not_fusable
from .kernel_attention import KernelAttention
from .kv_pool import KVPool
from .limits import Limits
from .paged_attention import AttentionBackend, attending
from .reference_attention import KeyRotation, ReferenceAttention
from .runner import ModelRunner
from .sequence_rotary import switch_length
from .turns import Turns

# Ada's and Hopper's
_FLOAT8_CAPABILITY = (8, 9)
# the captured reference gathers the longest possible sequence for every row of a batch
_REFERENCE_BYTES = 1 << 30
_APART = "prompts have a lane of their own"
# torch's flash attention
_FLASH_CAPABILITY = (8, 0)


class CapturableReference(ReferenceAttention):
    """The exact attention, for captured steps as well: they attend over the longest possible sequence, and mask."""

    def __init__(self, pools: Sequence[KVPool], rotation: KeyRotation | None = None) -> None:
        super().__init__(pools, rotation)
        self.pools = list(pools)
        self.kinds = ["reference" for _ in self.pools]

    @property
    def capturable(self) -> bool:
        """Whether every group's decode attention can be captured."""
        return not any(pool.is_packed or pool.group.window is not None or pool.group.places for pool in self.pools)

    @property
    def why_not_capturable(self) -> str:
        if any(pool.is_packed for pool in self.pools):
            return "packed pages are unpacked by many small kernels, which are not captured yet"
        return "a sliding window, or keys placed in the cache, go through the reference's masks of the host"

    def captured(self, batch: StepBatch) -> CapturableReference:
        """Attention of decode steps of one size over the static tensors of ``batch``."""
        return CapturableReference(self.pools)


def attention_for(
    pools: Sequence[KVPool], *, query_heads: int, rotation: KeyRotation | None = None, build: bool = False
) -> tuple[KernelAttention | CapturableReference, str]:
    """The attention for these pools, and why it is the reference.

    Parameters
    ----------
    pools
        Keys and values of every layer group.
    query_heads
        Query heads of a layer.
    rotation
        For groups that place their keys in the cache.
    build
        Whether FlashInfer's libraries are built where they are missing; else torch's kernels and our own take their place.
    """
    first = pools[0]
    if first.device.type != "cuda":
        return CapturableReference(pools, rotation), f"the kernels need CUDA, not {first.device.type}"
    if first.dtype not in (torch.bfloat16, torch.float16):
        return CapturableReference(pools, rotation), f"the kernels do not compute in {first.dtype}"
    odd = {pool.group.head_dim for pool in pools} - set(HEAD_DIMS)
    if odd:
        return CapturableReference(pools, rotation), f"no kernel for head_dim {min(odd)}"
    if without := _without_kernel(pools):
        return CapturableReference(pools, rotation), without
    libraries = libraries_for(pools, build=build)
    if libraries.prompts is None and any(takes_flashinfer(pool) for pool in pools):
        capability = torch.cuda.get_device_capability(first.device)
        if capability < _FLASH_CAPABILITY:
            version = ".".join(map(str, capability))
            return CapturableReference(pools, rotation), (
                f"torch's flash attention needs compute capability 8.0, the device has {version}, and FlashInfer is not built"
            )
    return KernelAttention(pools, query_heads=query_heads, libraries=libraries, rotation=rotation), ""


def _without_kernel(pools: Sequence[KVPool]) -> str:
    """Why our kernels cannot read the pools, empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "single tokens need triton, which is not installed"
    packed = [pool for pool in pools if pool.is_packed]
    numbers = {pages.side.number for pool in packed for pages in pool.layer(0)}
    if "fp8_e4m3" in numbers and torch.cuda.get_device_capability(packed[0].device) < _FLOAT8_CAPABILITY:
        return "the device has no instructions for fp8_e4m3"
    return ""


def cuda_runner(**options: Any) -> Callable[[LoadedModel, Sequence[KVPool], Limits], CudaRunner]:
    """A runner factory for `Runtime`, with options of `CudaRunner`."""
    return partial(CudaRunner, **options)


class CudaRunner(ModelRunner):
    """Decode steps from graphs, all others as they come; layers fused where the model allows it.

    On a CPU nothing is captured or tuned, and the reference attends: the same way through the code, for tests.

    Parameters
    ----------
    loaded
        The model. If it can be fused its projections become views of merged weights.
    pools
        Keys and values of every layer group.
    limits
        Of the runtime.
    rotation
        For groups that place their keys in the cache.
    graphs
        Whether decode steps are captured, and layers of steps with prompts.
    prompts_apart
        Whether prompts have a lane of their own, whose steps another runner launches: no layers are captured for them here
        (`captured_layers`).
    fuse
        Whether layers are fused.
    tune
        Whether products of few rows have the tilings that `kvsuite.nanovllm.known_tilings` knows for this machine; else they
        are torch's.
    build
        Whether what is missing is built: FlashInfer's libraries, and tilings found by trying, which compiles some fifty
        kernels. Both are kept for later runs.
    sizes
        Batch sizes to capture; a choice up to ``max_num_seqs`` if left out.
    warm_up
        Whether prompts are computed in the scratch block and tokens drawn, so that the first request waits for no
        compilation.

    Raises
    ------
    UserError
        If the captured steps do not fit beside the pool.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pools: Sequence[KVPool],
        limits: Limits,
        *,
        rotation: KeyRotation | None = None,
        graphs: bool = True,
        prompts_apart: bool = False,
        fuse: bool = True,
        tune: bool = True,
        build: bool = False,
        sizes: Iterable[int] | None = None,
        warm_up: bool = False,
    ) -> None:
        config = loaded.text_config
        attention, self._why_reference = attention_for(
            pools, query_heads=int(config.num_attention_heads), rotation=rotation, build=build
        )
        super().__init__(loaded, attention)
        if self.device.type == "cuda":
            BUILDS.watch_triton()
            # what an earlier runtime held must not count as given back by the captures of this one
            gc.collect()
        self.attention = attention
        #: row counts whose products have no tilings tried on this machine
        self._untried: list[int] = []
        self._tunes = tune
        self._why_not_fused = self._objection(loaded, pools, fuse)
        self._dry = DrySteps(self._unobserved, pools, limits, self.device)
        self.decoder: FusedDecoder | None = None
        self.graphs: DecodeGraphs | None = None
        self.layers: CapturedLayers | None = None
        self._why_not_captured = self._why_eager_prompts = ""
        # by the streams that they were captured on, whose SMs they keep
        self._captured: dict[str, DecodeGraphs] = {}
        self._again: Callable[[], DecodeGraphs | None] = lambda: None
        try:
            if not self._why_not_fused:
                self.decoder = FusedDecoder(loaded.model, config, limits.max_model_len + 1)
            wanted = sorted(set(default_sizes(limits.max_num_seqs) if sizes is None else sizes))
            if tune and self.decoder is not None and loaded.dtype in (torch.bfloat16, torch.float16):
                self._tune(self.decoder, wanted, build)
            if not graphs:
                self._why_not_captured = "switched off"
            elif (switch := switch_length(loaded.model)) is not None and switch < limits.max_model_len:
                self._why_not_captured = "rotary frequencies follow the length of each sequence"
            elif not attention.capturable:
                self._why_not_captured = attention.why_not_capturable
            else:
                self._again = partial(self._capture, attention, wanted, limits)
                self.graphs = self._again()
                if self.graphs is not None:
                    self._captured[""] = self.graphs
            if self.graphs is None:
                self._compile_ahead(None)
            if prompts_apart:
                self._why_eager_prompts = _APART
            elif not graphs:
                self._why_eager_prompts = "switched off"
            elif self.decoder is None:
                self._why_eager_prompts = "layers are not fused"
            elif self.device.type == "cuda" and not self._all_ours:
                self._why_eager_prompts = f"attention is the reference: {self._why_reference}"
            else:
                self.layers = self._capture_layers(self.decoder, attention, limits)
            if warm_up and not any(pool.group.places for pool in pools):
                self._dry.warm_up()
        except BaseException:
            self.close()
            raise

    @property
    def facts(self) -> Mapping[str, Any]:
        attention = self.attention
        if isinstance(attention, KernelAttention):
            attends = ", ".join(dict.fromkeys(attention.effective["attention"]))
        else:
            attends = f"reference ({self._why_reference})"
        found: dict[str, Any] = {"attention": f"paged: {attends}"}
        if self.device.type == "cuda":
            found["kernels"] = self._kernels
        captured = self.graphs is not None and self.device.type == "cuda"
        found["decode_step"] = "cuda_graph" if captured else "eager"
        if not captured:
            found["decode_step_reason"] = self._why_not_captured or f"{self.device.type} captures nothing"
        if self.graphs is not None:
            found["decode_sizes"] = self.graphs.sizes
            found["decode_attention"] = self.graphs.kinds
        if self.layers is not None:
            found["prompt_sizes"] = self.layers.sizes
        if self.layers is not None and self.device.type == "cuda":
            # larger ones of the same run are eager
            found["prompt_step"] = f"layers captured up to {self.layers.sizes[-1]} tokens"
        else:
            found["prompt_step"] = "eager"
            found["prompt_step_reason"] = self._why_eager_prompts or f"{self.device.type} captures nothing"
        if self.decoder is None:
            return found | {"fused": [], "not_fused": self._why_not_fused}
        return found | dict(self.decoder.effective)

    @property
    def _kernels(self) -> str:
        """Whether all kernels are there that `build` makes, which are not, and which are not used."""
        if not isinstance(self.attention, KernelAttention):
            return f"none: {self._why_reference}"
        library = self.attention.libraries.missing
        missing = [] if library is None else [f"flashinfer {library}"]
        if self._untried:
            missing.append(f"tilings of products of {', '.join(map(str, self._untried))} rows")
        words = f"not prepared: {', '.join(missing)}" if missing else "prepared"
        return words if self._tunes or self.decoder is None else f"{words}; tilings not used"

    def run(self, batch: StepBatch) -> Tensor:
        """Run one step and return logits ``[R, vocab]`` of ``batch.sample_rows``, in the model's dtype.

        The result may be overwritten by the next step.
        """
        # a prompt's last token may come alone, and a captured step would show nobody its query
        observed = self.observer is not None and self.observer.active
        captured = None if self.graphs is None or observed else self.graphs.run(batch)
        if captured is not None:
            return captured
        return self._eager(batch)

    def _eager(self, batch: StepBatch) -> Tensor:
        if self.decoder is None:
            return super().run(batch)
        return self.decoder.head(self._fused(self.decoder, batch))

    def _fused(self, decoder: FusedDecoder, batch: StepBatch) -> Tensor:
        """`hidden` of fused layers, captured ones if there are some for the step."""
        backend = self._observed(self.attention, batch)
        # who looks at queries finds them by their place in the step
        observed = backend is not self.attention
        found = None if self.layers is None else self.layers.hidden(batch, backend, whole=observed)
        if found is not None:
            return found
        self.attention.begin(batch)
        return decoder.hidden(batch, backend)

    def _unobserved(self, batch: StepBatch) -> Tensor:
        """A step of no request: what was said of the last one's prompts is not of it."""
        observer, self.observer = self.observer, None
        try:
            return self._eager(batch)
        finally:
            self.observer = observer

    def hidden(self, batch: StepBatch) -> Tensor:
        """Run one step and return the last hidden states ``[R, hidden]`` of ``batch.sample_rows``."""
        if self.decoder is None:
            return super().hidden(batch)
        return self._fused(self.decoder, batch)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of some rows of what `hidden` returned."""
        return super().logits(rows) if self.decoder is None else self.decoder.head(rows)

    def use_captured(self, streams: str) -> None:
        """Replay the decode steps that were captured on the streams of a name, ``""`` for the first.

        Those of a new name are captured now, on the current stream, if any are captured at all.

        Raises
        ------
        UserError
            If the captured steps do not fit beside the pool.
        CaseInvalid
            If the model can be captured once and not again.
        """
        if not self._captured:
            return
        if streams not in self._captured:
            graphs = self._again()
            if graphs is None:
                raise CaseInvalid(f"decode steps cannot be captured on other streams: {self._why_not_captured}")
            self._captured[streams] = graphs
        self.graphs = self._captured[streams]

    def beside(self, turns: Turns) -> Self:
        """Another runner for steps on another stream, the current one; it shares the fused layers and captures nothing."""
        other = super().beside(turns)
        assert isinstance(other.backend, KernelAttention | CapturableReference)
        other.attention, other.graphs, other.layers, other.captured_bytes = other.backend, None, None, 0
        other._why_not_captured = "steps of prompts are not captured"
        other._why_eager_prompts = _APART
        return other

    def close(self) -> None:
        """Give the model its own attention back, and the memory of the graphs."""
        self.graphs = self.layers = None
        self._captured.clear()
        super().close()

    def _objection(self, loaded: LoadedModel, pools: Sequence[KVPool], fuse: bool) -> str:
        """Why layers are not fused, empty if they are."""
        if not fuse:
            return "switched off"
        if any(pool.group.places for pool in pools):
            return "keys placed in the cache are stored unrotated, and the fused write rotates"
        if loaded.device.type == "cpu" and not _interpreted():
            return "the kernels need CUDA"
        return not_fusable(loaded.model, loaded.text_config) or ""

    @property
    def _all_ours(self) -> bool:
        """Whether no part of a layer is anybody else's."""
        return self.device.type == "cuda" and self.decoder is not None and isinstance(self.attention, KernelAttention)

    def _compile_ahead(self, graphs: DecodeGraphs | None) -> None:
        """Compile what steps of any make-up launch, and the captured ones of ``graphs``.

        Only where all of a layer is ours: what a step computes meanwhile means nothing, and must not be stored by others.
        """
        if not self._all_ours:
            return
        with compiling_ahead() as compiles:
            if not compiles:
                return
            if graphs is not None:
                graphs.rehearse()
            if self.decoder is not None:
                self.decoder.rehearse()
            # cut for the SMs of the current stream
            self._dry.singles()
            if not self._captured:
                self._dry.prompts()

    def _tune(self, decoder: FusedDecoder, sizes: Sequence[int], build: bool) -> None:
        if self.device.type == "cuda":
            from .known_tilings import set_tilings

            self._untried = set_tilings(decoder, sizes, build=build)

    def _capture(self, attention: CapturableAttention, sizes: Sequence[int], limits: Limits) -> DecodeGraphs | None:
        """Decode steps captured on the current stream; ``None`` where that cannot be, for a reason that `facts` has then."""
        forward = self._plain if self.decoder is None else self.decoder.logits
        if isinstance(attention, CapturableReference):
            row = max(pool.block_bytes // len(pool.group.layers) for pool in attention.pools)
            most = _REFERENCE_BYTES // (row * limits.blocks_per_sequence)
            sizes = [size for size in sizes if size <= most]
            if not sizes:
                self._why_not_captured = "the reference would gather more than 1 GiB a layer"
                return None
        before = _reserved_bytes(self.device)
        graphs = DecodeGraphs(forward, attention, sizes, limits.blocks_per_sequence)
        try:
            self._compile_ahead(graphs)
            graphs.capture()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"max_num_seqs={limits.max_num_seqs}: {self.device} has no room to capture decode steps of up to "
                f"{max(sizes)} sequences beside the pool; give a smaller memory_share or pool_bytes, or fewer max_num_seqs"
            ) from error
        except RuntimeError as error:
            # our own layers can be captured; whether a model's can is its own affair
            if self.decoder is not None:
                raise
            self._why_not_captured = f"the model cannot be captured: {str(error).splitlines()[0][:200]}"
            return None
        self.captured_bytes += _reserved_bytes(self.device) - before
        return graphs

    def _capture_layers(self, decoder: FusedDecoder, attention: CapturableAttention, limits: Limits) -> CapturedLayers:
        """Layers of steps with prompts, captured on the current stream."""
        before = _reserved_bytes(self.device)
        sizes = layer_sizes(limits.most_step_tokens)
        try:
            layers = CapturedLayers(
                decoder,
                attention,
                sizes,
                max_sequences=limits.max_num_seqs,
                max_blocks=limits.blocks_per_sequence,
                # only where others may decode while a prompt is fed
                singles_apart=attention.capturable and limits.max_num_seqs > 1 and not limits.prefill_first,
            )
            if self._all_ours:
                with compiling_ahead() as compiles:
                    if compiles:
                        layers.rehearse()
            layers.capture()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"max_num_batched_tokens={limits.max_num_batched_tokens}: {self.device} has no room to capture layers for "
                f"{sizes[-1]} tokens beside the pool; give a smaller memory_share or pool_bytes"
            ) from error
        self.captured_bytes += _reserved_bytes(self.device) - before
        return layers

    def _plain(self, batch: StepBatch, backend: AttentionBackend) -> Tensor:
        """`FusedDecoder.logits` of a model that is not fused."""
        with torch.inference_mode(), attending(backend):
            logits: Tensor = self.model(
                input_ids=batch.ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.sample_rows,
            ).logits
        return logits[0]


def _reserved_bytes(device: torch.device) -> int:
    """What torch has of a CUDA device for tensors that are alive and for captured steps; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved(device))


def _interpreted() -> bool:
    """Whether triton computes on the CPU, for tests."""
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"
