"""From a `ModelSpec` to a model on its device: real weights, or random ones of a real architecture."""

from __future__ import annotations

import hashlib
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.case import canonical_json
from kvsuite.errors import UserError
from kvsuite.options.dtypes import parse_dtype

from .resolve import ModelSpec

if TYPE_CHECKING:
    import torch

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
# text whose ids differ between tokenizers that share a vocabulary but cut text in another way
_PROBE = "In 1969, Neil\u00a0Armstrong didn't say:\n\n  'x = 3.14159'  naïve 北京 🙂\r\n"


@dataclass
class LoadedModel:
    """A model ready to run.

    Parameters
    ----------
    model
        The transformers model, in ``eval`` mode, gradients off.
    tokenizer
        ``None`` for dummies and for folders without one.
    spec
        What was asked for; a hub model's ``revision`` is filled in.
    text_config
        The configuration of the language model, also for a multimodal one.
    device, dtype
        Where the weights are, and their dtype.
    weights_bytes
        Sum of the distinct parameter and buffer storages, in bytes: tied weights count once.
    parameters
        Number of distinct parameters.
    trained_length
        Positions the configuration promises, ``None`` if it does not say.
    load_s
        Seconds from the call to the model on its device.
    notes
        What a reader of a result must know.
    tokenizer_hash
        SHA-256 over the vocabulary and the ids of a fixed text; the same on every transformers version.
    attention
        transformers' attention function that it was loaded with.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    spec: ModelSpec
    text_config: Any = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    weights_bytes: int
    parameters: int
    trained_length: int | None
    load_s: float
    notes: list[str] = field(default_factory=list)
    tokenizer_hash: str | None = None
    attention: str = "sdpa"


def import_libraries() -> None:
    """Import what `load_model` needs: it takes seconds, which are no model's and no case's."""
    import transformers.modeling_utils  # noqa: F401


def load_model(
    spec: ModelSpec,
    *,
    device: str,
    dtype: str | None,
    seed: int = 0,
    attention: str = "auto",
    sdpa: str = "sdpa",
    cache_dir: Path | None = None,
) -> LoadedModel:
    """Load a model, or make a dummy of it.

    Parameters
    ----------
    spec
        From `kvsuite.models.resolve_model`.
    device
        Torch device, for example ``"cpu"`` or ``"cuda:0"``.
    dtype
        Name of the compute dtype; ``None`` means float32 on the CPU, and elsewhere the checkpoint's own dtype
        (bfloat16 for dummies, float16 for quantised GGUF weights, which have none).
    seed
        Of a dummy's random weights: the same seed gives the same weights on the same kind of device. The global random
        state is left as it was.
    attention
        ``sdpa``, ``eager``, or ``auto``: sdpa where the model's class has it, else eager, with a note.
    sdpa
        What transformers calls the function that computes sdpa here: ``sdpa``, or one that was registered for it.
    cache_dir
        Where the default model is converted to; the folder named by ``spec`` if left out.

    Raises
    ------
    UserError
        If the device, the dtype or the checkpoint cannot be used, ``attention="sdpa"`` is asked of a class without it, or
        it is no causal language model with a KV cache.
    CaseInvalid
        If a weight is not finite in the dtype.
    """
    from .measurable import require_decoder, require_finite_weights

    if spec.kind == "mlc":
        raise UserError(f"--kv-model={spec.request}: MLC weights run on the mlc engine only; give --kv-engine=mlc")
    wanted = None if dtype is None else parse_dtype(dtype)
    target = _usable_device(device, wanted)
    if wanted is None and target.type == "cpu":
        wanted = "float32"
    notes = list(spec.notes)
    choose = _AttentionChoice(spec, attention, sdpa, notes)
    import_libraries()
    started = time.perf_counter()
    with _no_progress_bars():
        if spec.kind == "dummy":
            model, tokenizer = _dummy(spec, target, wanted or "bfloat16", seed, choose), None
        elif spec.kind == "gguf":
            model, tokenizer = _gguf(spec, wanted, choose, notes)
            model = model.to(target)
        else:
            model, tokenizer = _pretrained(spec, target, wanted, choose, cache_dir, notes)
    model = model.eval().requires_grad_(False)
    load_s = time.perf_counter() - started
    if not spec.is_dummy:
        require_finite_weights(model)
        with _user_errors(spec):
            require_decoder(model, f"--kv-model={spec.request}")

    commit = getattr(model.config, "_commit_hash", None)
    if spec.kind == "hub" and commit:
        spec = replace(spec, revision=commit)
    text_config = model.config.get_text_config()
    if getattr(model.config, "vision_config", None) is not None:
        notes.append("it reads images; measured on text alone where a case has none")
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        text_config=text_config,
        device=target,
        dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()),
        weights_bytes=sum(storages.values()),
        parameters=sum(p.numel() for p in model.parameters()),
        trained_length=getattr(text_config, "max_position_embeddings", None),
        load_s=load_s,
        notes=notes,
        tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
        attention=choose.chosen,
    )


def load_tokenizer(spec: ModelSpec, *, cache_dir: Path | None = None) -> Any:
    """The tokenizer of a model whose weights somebody else holds; ``None`` for dummies and for folders without one.

    Raises
    ------
    UserError
        If it cannot be read.
    """
    if spec.kind == "dummy":
        return None
    if spec.kind == "gguf":
        from .gguf import gguf_tokenizer, read_fields

        return gguf_tokenizer(Path(spec.source), read_fields(Path(spec.source)))
    source, local = _source(spec, cache_dir)
    with _no_progress_bars(), _user_errors(spec):
        return _tokenizer(spec, source, {"local_files_only": local, "trust_remote_code": False}, [])


def tokenizer_hash(tokenizer: Any) -> str:
    """Return ``sha256:<hex>`` over the vocabulary and the ids of a fixed text."""
    ids = tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
    text = canonical_json({"vocabulary": tokenizer.get_vocab(), "probe": list(ids)})
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class _AttentionChoice:
    """Which attention function a model is loaded with, known once its class is."""

    def __init__(self, spec: ModelSpec, attention: str, sdpa: str, notes: list[str]) -> None:
        self._spec, self._attention, self._sdpa, self._notes = spec, attention, sdpa, notes
        self.chosen = "eager" if attention == "eager" else sdpa

    def of(self, config: Any) -> str:
        """transformers' name for it.

        Raises
        ------
        UserError
            If sdpa is asked for and the class has none.
        """
        if self._attention != "eager" and (reason := _no_sdpa(config)):
            if self._attention == "sdpa":
                raise UserError(f"--kv-attention=sdpa: {reason}; use auto or eager")
            self._notes.append(f"computed with eager attention: {reason}")
            self.chosen = "eager"
        return self.chosen


def _no_sdpa(config: Any) -> str | None:
    """Why the class of a configuration's model has no sdpa, ``None`` if it has."""
    made = getattr(_auto_class(config), "_model_mapping", {}).get(type(config), None)
    text = config.get_text_config()
    # several releases say that they have sdpa for models with capped scores, and leave the cap out
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if made is None or isinstance(made, tuple) or (getattr(made, "_supports_sdpa", False) and not capped):
        return None
    why = " (its scores are capped)" if capped else " (its attention has sinks)" if text.model_type == "gpt_oss" else ""
    return f"{made.__name__} has no sdpa in transformers{why}"


def _usable_device(device: str, dtype: str | None) -> torch.device:
    import torch

    try:
        target = torch.device(device)
        # also answers whether this device computes in that dtype at all
        probe = torch.ones(2, 2, device=target, dtype=getattr(torch, dtype or "float32"))
        torch.softmax(probe @ probe, dim=-1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = _first_line(error)
        raise UserError(
            f"--kv-device={device}{f' --kv-dtype={dtype}' if dtype else ''}: this torch cannot use it ({reason}); "
            "give a device that it can use, cpu for example"
        ) from error
    if str(target) == "cuda":
        target = torch.device("cuda", torch.cuda.current_device())
    return target


def _dummy(spec: ModelSpec, device: torch.device, dtype: str, seed: int, attention: _AttentionChoice) -> Any:
    import torch

    from .presets import build_config

    config = build_config(spec.source)
    # a device context makes the weights where they stay: no copy in float32, none on the CPU
    with _seeded(device, seed), torch.device(device):
        return _auto_class(config).from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention.of(config)
        )


def _gguf(spec: ModelSpec, dtype: str | None, attention: _AttentionChoice, notes: list[str]) -> tuple[Any, Any]:
    from .gguf import gguf_model, gguf_tokenizer, read_fields

    path = Path(spec.source)
    fields = read_fields(path)
    if dtype is None:
        dtype = "float16"
        notes.append("GGUF weights computed in float16; --kv-dtype chooses another dtype")
    notes.append("GGUF weights dequantised on loading; memory is that of the dense model")
    with _user_errors(spec):
        return gguf_model(path, dtype=dtype, attention=attention.of), gguf_tokenizer(path, fields)


def _pretrained(
    spec: ModelSpec,
    device: torch.device,
    dtype: str | None,
    attention: _AttentionChoice,
    cache_dir: Path | None,
    notes: list[str],
) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig

    from .measurable import require_causal_class

    source, local = _source(spec, cache_dir)
    common: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    with _user_errors(spec):
        config = AutoConfig.from_pretrained(source, **common)
        require_causal_class(config, f"--kv-model={spec.request}")
        model, info = _auto_class(config).from_pretrained(
            source,
            dtype="auto" if dtype is None else getattr(torch, dtype),
            attn_implementation=attention.of(config),
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
            **common,
        )
        tokenizer = _tokenizer(spec, source, common, notes)
    # transformers fills absent weights with random numbers and only logs it
    if missing := sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(
            f"--kv-model={spec.request}: the checkpoint lacks {len(missing)} weight(s), {missing[0]} first; "
            "give a complete checkpoint"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        notes.append(f"{len(unexpected)} weight(s) of the checkpoint are not used, {unexpected[0]} first")
    return model, tokenizer


def _source(spec: ModelSpec, cache_dir: Path | None) -> tuple[str, bool]:
    """Where transformers finds the model, and whether it may look at local files alone."""
    from .hub import require_hub
    from .smollm2 import smollm2_folder

    if spec.kind == "smollm2":
        return str(smollm2_folder(cache_dir or Path(spec.source).parent)), True
    return spec.source, spec.kind != "hub" or not require_hub("--kv-model", spec.request, repo_id=spec.source)


def _tokenizer(spec: ModelSpec, source: str, common: dict[str, Any], notes: list[str]) -> Any:
    from transformers import AutoTokenizer

    if spec.kind == "local" and not any((Path(source) / name).is_file() for name in _TOKENIZER_FILES):
        notes.append("the folder holds no tokenizer, so no text can be scored")
        return None
    return AutoTokenizer.from_pretrained(source, **common)


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    multimodal = getattr(config, "vision_config", None) is not None
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


@contextmanager
def _user_errors(spec: ModelSpec) -> Iterator[None]:
    """Turn the many ways in which a checkpoint can be bad into one line; what the device does stays as it is."""
    import torch

    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise UserError(
            f"--kv-model={spec.request}: cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "check the checkpoint or give another model"
        ) from error


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    import torch

    # only the generators in use are seeded: torch.manual_seed would reseed every GPU, and restore none
    cuda = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 300, placeholder=" …") if lines else type(error).__name__
