"""The `hf` engine: any transformers decoder on torch, with cache policies and kvpress presses. Reference semantics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kvsuite.case import Case
from kvsuite.errors import CaseInvalid
from kvsuite.meters.bandwidth import copy_bandwidth
from kvsuite.meters.clock import Clock
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.resolve import resolve_model

from .attention import register_grouped_attention
from .base import Engine, MemoryPass, Session
from .cache import EvictionCache, Implementation
from .cache_plan import CachePlan, plan
from .decoder import Decoder
from .graph import CapturedDecode
from .hf_memory import measure_memory
from .hf_scoring import score_reference, score_tokens
from .method import Method, method_for
from .press_cache import PressCache
from .rotary import Rotary
from .threads import choose_threads

if TYPE_CHECKING:
    from kvsuite.compression.kvpress_session import KvpressSession

AnyCache = EvictionCache | PressCache
_TORCH_DEVICES = ("cpu", "cuda", "mps")


class HfEngine(Engine):
    """Loads transformers models."""

    name: ClassVar[str] = "hf"

    def unavailable(self, device: str) -> str | None:
        kind, _, index = device.partition(":")
        if kind not in _TORCH_DEVICES:
            return f"engine hf cannot use {device}: it runs where torch does ({', '.join(_TORCH_DEVICES)})"
        if kind == "cuda":
            if not torch.cuda.is_available():
                return (
                    f"engine hf cannot use {device}: this torch {torch.__version__} sees no CUDA device; install a CUDA "
                    "build (make bench TORCH_INDEX=https://download.pytorch.org/whl/cu130) or use --kv-device=cpu"
                )
            if int(index or 0) >= torch.cuda.device_count():
                return (
                    f"engine hf cannot use {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
                )
        if kind == "mps" and not torch.backends.mps.is_available():
            return f"engine hf cannot use {device}: this torch has no MPS; use --kv-device=cpu"
        return None

    def load(self, case: Case, **options: Any) -> HfSession:
        return HfSession(case, **options)


class HfSession(Session):
    """A loaded transformers model.

    Parameters
    ----------
    case
        Names model, device and dtype.
    seed
        Seed of a dummy model's weights.
    threads
        CPU threads, ``None`` for the probe.
    decode_step
        ``eager``, ``graph``, or ``auto``: captured on CUDA where the method allows.
    implementation
        Slot handling of policies: ``ring`` or ``copy``.
    cache_dir
        Where converted models lie.
    """

    def __init__(
        self,
        case: Case,
        *,
        seed: int = 0,
        threads: int | None = None,
        decode_step: str = "auto",
        implementation: Implementation = "ring",
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__()
        attention = register_grouped_attention() if case.device_kind == "cuda" else "sdpa"
        spec = resolve_model(case.model, cache_dir=cache_dir)
        self._loaded: LoadedModel = load_model(
            spec,
            device=case.device,
            dtype=None if case.dtype == "checkpoint" else case.dtype,
            seed=seed,
            attn_implementation=attention,
            cache_dir=cache_dir,
        )
        self.decoder = Decoder(self._loaded.model, self._loaded.text_config, self._loaded.device)
        self._decode_step = decode_step
        self._implementation: Implementation = implementation
        self._method = Method()
        self._press: KvpressSession | None = None
        self._seed = seed
        self._rotary: Rotary | None = None
        self._captured: dict[tuple[int, int], CapturedDecode] = {}
        self._cache: tuple[tuple[int, int], EvictionCache] | None = None
        self._base_attention = attention
        self.model = {
            "label": spec.label,
            "kind": spec.kind,
            "revision": spec.revision,
            "notes": list(self._loaded.notes),
            "parameters": self._loaded.parameters,
            "weights_bytes": self._loaded.weights_bytes,
            "step_weight_bytes": self.decoder.step_weight_bytes(),
            "trained_length": self._loaded.trained_length,
            "tokenizer_hash": self._loaded.tokenizer_hash,
            "load_s": self._loaded.load_s,
            "is_dummy": spec.is_dummy,
        }
        if case.device_kind == "cpu":
            threads = self._set_threads(threads)
        self._facts = {
            "device": str(self.device),
            "dtype": str(self._loaded.dtype).removeprefix("torch."),
            "attention": attention,
            "threads": threads if case.device_kind == "cpu" else None,
        }
        self._bandwidth: float | None = None
        #: output of the last `generate`
        self.last_tokens: list[int] = []

    @property
    def dtype_name(self) -> str:
        """The dtype the model really computes in."""
        return str(self._facts["dtype"])

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, ``None`` for a dummy model."""
        return self._loaded.tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding that prompts may use."""
        return int(self._loaded.text_config.vocab_size)

    @property
    def bandwidth(self) -> float:
        """Measured copy bandwidth of the device in bytes a second, read plus written; measured once."""
        if self._bandwidth is None:
            self._bandwidth = copy_bandwidth(self.device)
        return self._bandwidth

    def prepare(self, case: Case) -> None:
        self.finish()
        if self.decoder.sliding_window:
            raise CaseInvalid(
                f"the model has its own sliding window of {self.decoder.sliding_window}: a policy's window would be "
                "measured on top of it; use a model without one"
            )
        if case.partition is not None:
            raise CaseInvalid("SM partitions need the serving runtime; engine hf runs on the whole device")
        self._method = method_for(case, layers=self.decoder.layers)
        press, policy = self._method.press, self._method.policy
        if press:
            press.supports_layout(self._loaded.model)
        attention = "eager" if press and press.info.attention == "eager" else self._base_attention
        self.decoder.set_attention(attention)
        self._rotary = Rotary(self._loaded.model) if policy and policy.positions == "cache" else None
        reason = self._eager_reason()
        if reason and self._decode_step == "graph":
            raise CaseInvalid(f"--kv-decode-step=graph: {reason}; use auto or eager")
        self.effective = self._facts | {
            "attention": attention,
            "decode_step": "eager" if reason else "cuda_graph",
            "implementation": self._implementation if not press else "press",
            "positions": policy.positions if policy else press.info.positions if press else "original",
            "skip_layers": sorted(policy.skip_layers) if policy else [],
            "frees_memory": self._method.frees_memory,
        }
        if reason and self.device.type == "cuda":
            self.effective["decode_step_reason"] = reason

    def plan(self, prompt_tokens: int, new_tokens: int) -> tuple[CachePlan, CachePlan] | None:
        """Stored tokens of a compressed and of an uncompressed layer; ``None`` where only a press knows."""
        if self._method.press:
            return None
        return plan(self._method.policy, prompt_tokens, new_tokens - 1), plan(None, prompt_tokens, new_tokens - 1)

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int) -> int | None:
        """Predicted bytes of keys and values at the end of decode, from the policy's sizes alone."""
        plans = self.plan(prompt_tokens, new_tokens)
        if plans is None:
            return None
        skipped = self._method.policy.skip_layers if self._method.policy else range(self.decoder.layers)
        tokens = [plans[1 if layer in skipped else 0].final for layer in range(self.decoder.layers)]
        return self.decoder.kv_bytes(tokens)

    @property
    def device(self) -> torch.device:
        return self._loaded.device

    def full_kv_bytes(self, tokens: int) -> int:
        return self.decoder.kv_bytes([tokens] * self.decoder.layers)

    @property
    def ratio_requested(self) -> float | None:
        return self._method.ratio_requested

    @property
    def method(self) -> Method:
        """What the prepared case does to the cache."""
        return self._method

    def warm(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Run the timed shape once, untimed, without captured steps."""
        cache = self._new_cache(len(prompt), new_tokens)
        with torch.inference_mode(), self._pressed():
            token = self._prefill(self._ids(prompt), cache)
            token, cache = self._adopt(token, cache, new_tokens)
            for _ in range(new_tokens - 1):
                token = self._step(token, cache)

    def capture(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Capture the decode steps of this shape where the case's effective decode step is ``cuda_graph``."""
        key = (len(prompt), new_tokens)
        if self.effective["decode_step"] != "cuda_graph" or key in self._captured or new_tokens < 2:
            return
        with torch.inference_mode():
            cache = self._persistent_cache(key)
            with self._pressed():
                token = self._prefill(self._ids(prompt), cache)
                token, cache = self._adopt(token, cache, new_tokens)
            assert isinstance(cache, EvictionCache)
            try:
                self._captured[key] = CapturedDecode(self._step, cache, token, new_tokens - 1)
            except RuntimeError as error:
                if self._decode_step == "graph":
                    raise CaseInvalid(f"--kv-decode-step=graph: the step cannot be captured: {error}") from error
                self.effective |= {"decode_step": "eager", "decode_step_reason": f"not capturable: {error}"}
                self._cache = None

    def generate(self, prompt: Sequence[int], new_tokens: int, clock: Clock) -> RequestTimes:
        key = (len(prompt), new_tokens)
        captured = self._captured.get(key)
        # a press is built before the clock starts: it is part of loading, not of the request
        with torch.inference_mode(), self._pressed():
            ids = self._ids(prompt)
            cache = self._persistent_cache(key)
            clock.start()
            logits = self._forward(ids, cache)
            clock.mark()
            token = logits[:, -1].argmax(-1, keepdim=True)
            token, cache = self._adopt(token, cache, new_tokens)
            clock.mark()
            output = [token]
            if captured:
                output.append(captured.run(token, clock))
            else:
                for _ in range(new_tokens - 1):
                    output.append(self._step(output[-1], cache))
                    clock.mark()
            prefill_end, *tokens = clock.seconds()
        self.last_tokens = _token_list(output)
        return RequestTimes(len(prompt), len(prompt), [(t, 1) for t in tokens], prefill_end=prefill_end)

    def generate_tokens(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy output of the prepared case: ``new_tokens`` token ids, eager steps."""
        cache = self._new_cache(len(prompt), new_tokens)
        with torch.inference_mode(), self._pressed():
            token, cache = self._adopt(self._prefill(self._ids(prompt), cache), cache, new_tokens)
            output = [token]
            for _ in range(new_tokens - 1):
                output.append(self._step(output[-1], cache))
        return _token_list(output)

    def memory_pass(self, prompt: Sequence[int], new_tokens: int) -> MemoryPass:
        self._drop_cache()
        return measure_memory(self, self._ids(prompt), new_tokens)

    def score(self, tokens: Sequence[int], protocol: str, prefix: int, progress: Any = None) -> TokenScores:
        return score_tokens(self, tokens, protocol, prefix, progress)

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        return score_reference(self.decoder, tokens, first)

    def finish(self) -> None:
        self._drop_cache()
        self._method = Method()

    def close(self) -> None:
        self.finish()
        del self._loaded, self.decoder

    # what the passes share; hf_memory and hf_scoring are the other halves of this class's work

    def _new_cache(self, prompt_tokens: int, new_tokens: int) -> AnyCache:
        if self._method.press:
            return PressCache(self.decoder.layers, self.device)
        return self._eviction_cache(prompt_tokens, new_tokens)

    def _eviction_cache(self, prompt_tokens: int, new_tokens: int) -> EvictionCache:
        plans = self.plan(prompt_tokens, new_tokens)
        capacity = (plans[0].capacity, plans[1].capacity) if plans else (0, 0)
        return self.decoder.new_cache(self._method.policy, capacity, self._implementation, self._rotary)

    def _persistent_cache(self, key: tuple[int, int]) -> AnyCache:
        """The cache of the timed rounds: its buffers stay, as a serving pool's do."""
        if self._method.press:
            return PressCache(self.decoder.layers, self.device)
        if self._cache is None or self._cache[0] != key:
            self._drop_cache()
            self._cache = (key, self._eviction_cache(*key))
        self._cache[1].reset()
        return self._cache[1]

    def _drop_cache(self) -> None:
        self._captured.clear()
        self._cache = None

    @contextlib.contextmanager
    def _pressed(self) -> Iterator[None]:
        """The case's press on the model, a new one every time; nothing for a policy."""
        if self._method.press is None:
            yield
            return
        with self._method.press.session(self._loaded.model, tokenizer=self.tokenizer, seed=self._seed) as press:
            self._press = press
            try:
                yield
            finally:
                self._press = None

    def _forward(self, ids: Tensor, cache: AnyCache) -> Tensor:
        """Prefill: logits of the last position ``[1, 1, vocab]``."""
        if self._press is None:
            return self.decoder.forward(ids, cache)
        with self._press.prefill():
            return self.decoder.forward(ids, cache)

    def _prefill(self, ids: Tensor, cache: AnyCache) -> Tensor:
        return self._forward(ids, cache)[:, -1].argmax(-1, keepdim=True)

    def _adopt(self, token: Tensor, cache: AnyCache, new_tokens: int) -> tuple[Tensor, AnyCache]:
        """Move what a prefill press left into preallocated slots, so that every method decodes on the same cache."""
        if isinstance(cache, EvictionCache) or self._method.eager_only:
            return token, cache
        assert self._press is not None
        key = (cache.seen, new_tokens)
        if self._cache is None or self._cache[0] != key:
            room = max(cache.lengths()) + new_tokens - 1
            self._cache = (key, self.decoder.new_cache(None, (0, room), "ring", None))
        target = self._cache[1]
        target.adopt(cache.layers, self._press.first_decode_position(cache, cache.seen))
        return token, target

    def _step(self, token: Tensor, cache: AnyCache) -> Tensor:
        """One decode step: the following token ``[1, 1]``; waits for nothing."""
        return self.decoder.forward(token, cache)[:, -1].argmax(-1, keepdim=True)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)

    def _eager_reason(self) -> str | None:
        if self.device.type != "cuda":
            return "CUDA graphs need a CUDA device"
        if self._decode_step == "eager":
            return "--kv-decode-step=eager"
        if self._implementation == "copy":
            return "a copying cache moves at every step"
        return self._method.eager_only

    def _set_threads(self, threads: int | None) -> int:
        if threads is not None:
            torch.set_num_threads(threads)
            return threads
        step: Callable[[], object] = self.decoder.probe_step
        return choose_threads(step)


def _token_list(output: list[Tensor]) -> list[int]:
    """Token ids of ``[1, n]`` pieces, in order."""
    return [int(token) for token in torch.cat(output, dim=1)[0].tolist()]
