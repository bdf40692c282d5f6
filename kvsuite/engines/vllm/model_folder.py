"""A model as vLLM takes it: a folder with config.json and weights, or without weights for random ones."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.models.hub import require_hub
from kvsuite.models.presets import PRESETS
from kvsuite.models.resolve import ModelSpec
from kvsuite.models.smollm2 import cache_root, smollm2_folder

# what transformers calls the classes of the presets' families
_CLASSES = {
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def model_folder(spec: ModelSpec, cache_dir: Path | None) -> str:
    """What vLLM is given as its model.

    The path counts in what vLLM calls the same program: a preset's folder keeps its name, or every case would compile anew.

    Parameters
    ----------
    spec
        The model.
    cache_dir
        Where converted models and the configurations of presets lie.

    Raises
    ------
    UserError
        If vLLM cannot take it.
    """
    if spec.kind == "smollm2":
        return str(smollm2_folder(cache_dir))
    if spec.kind == "local":
        return spec.source
    if spec.kind == "hub":
        from huggingface_hub import snapshot_download

        offline = not require_hub("--kv-model", spec.request, repo_id=spec.source)
        found: str = snapshot_download(
            spec.source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"], local_files_only=offline
        )
        return found
    if spec.kind != "dummy":
        what = "a .gguf file" if spec.kind == "gguf" else "MLC weights"
        raise UserError(
            f"--kv-model={spec.request}: engine vllm takes no {what.removeprefix('a ')}; give a folder or a hub id with "
            "safetensors, smollm2, or another --kv-engine"
        )
    return str(_preset_folder(spec, cache_root(cache_dir)))


def _preset_folder(spec: ModelSpec, root: Path) -> Path:
    written = json.dumps(_preset_config(spec))
    folder = root / "vllm" / f"{spec.source}-{hashlib.sha256(written.encode()).hexdigest()[:12]}"
    config = folder / "config.json"
    try:
        if not config.is_file() or config.read_text(encoding="utf-8") != written:
            folder.mkdir(parents=True, exist_ok=True)
            # whole for whoever reads it at the same time
            part = folder / f".config.json.{uuid.uuid4().hex}"
            part.write_text(written, encoding="utf-8")
            os.replace(part, config)
    except OSError as error:
        raise UserError(
            f"--kv-model={spec.request}: its configuration for vLLM cannot be written to {folder} ({error}); "
            "give another folder with --kv-cache-dir or $KVSUITE_CACHE"
        ) from error
    return folder


def _preset_config(spec: ModelSpec) -> dict[str, Any]:
    fields = PRESETS[spec.source]
    family = str(fields["model_type"])
    if family not in _CLASSES:
        known = ", ".join(name for name, one in PRESETS.items() if one["model_type"] in _CLASSES)
        raise UserError(
            f"--kv-model={spec.request}: engine vllm is run with text alone, and {family} reads images; use one of {known}"
        )
    return {"architectures": [_CLASSES[family]], "torch_dtype": "bfloat16", **fields}


def checkpoint_dtype(folder: Path) -> str:
    """The dtype that a checkpoint says it has; float32 where it says none, as transformers takes it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def is_quantised(folder: Path) -> bool:
    """Whether vLLM takes a checkpoint for a quantised one: by its config.json, or by ModelOpt's file beside it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("quantization_config")) or (folder / "hf_quant_config.json").exists()
